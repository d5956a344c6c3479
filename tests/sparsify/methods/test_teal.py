"""TEAL's thresholds: quantiles of what a dense pass shows, and a checkpoint that leaves so much out."""

import json

import numpy as np
import pytest
import torch

from hotcold import cli
from hotcold.files.json import read_json
from hotcold.model import checkpoint
from hotcold.model.input_hooks import on_inputs, set_input_rules
from hotcold.model.inputs import SCORES, SITES, rules_of_config
from hotcold.sparsify.methods.teal import calibrate, measured_sparsity


@pytest.fixture
def windows():
    return torch.randint(0, 400, (6, 32), generator=torch.Generator().manual_seed(0))


def recorded(model, windows):
    """What each site reads, float32 [n, inputs], without the first tokens."""
    seen = {}

    def keep(site, layer, x):
        seen.setdefault((site, layer), []).append(x.reshape(-1, x.shape[-1])[1:].clone())

    with torch.no_grad(), on_inputs(model, tuple(SITES), keep):
        for ids in windows:
            model(ids[None])
    return {place: torch.cat(parts) for place, parts in seen.items()}


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_threshold_is_the_quantile_of_a_dense_pass(dense, windows, share):
    rules = calibrate(dense, windows, SITES, "magnitude", share)
    assert [rule.site for rule in rules] == list(SITES)
    seen = recorded(dense, windows)
    for rule in rules:
        for layer, threshold in enumerate(rule.thresholds):
            expected = np.quantile(seen[rule.site, layer].abs().numpy(), share)
            assert threshold == pytest.approx(expected, rel=0.01)


def test_winas_score_weighs_inputs_by_their_columns(dense, windows):
    (rule,) = calibrate(dense, windows, ["gate_up"], "wina", 0.5)
    seen = recorded(dense, windows)
    for layer, threshold in enumerate(rule.thresholds):
        mlp = dense.model.layers[layer].mlp
        norms = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).norm(dim=0)
        scores = (seen["gate_up", layer].abs() * norms).detach().numpy()
        assert threshold == pytest.approx(np.quantile(scores, 0.5), rel=0.01)


@pytest.mark.parametrize("score", SCORES)
def test_one_site_leaves_out_the_share_that_was_asked_for(dense, windows, score):
    """With one site and layer nothing before it is changed by what is left out, so the share is met."""
    rules = calibrate(dense, windows, ["qkv"], score, 0.4)
    set_input_rules(dense, rules)
    assert measured_sparsity(dense, windows, ["qkv"])["qkv"][0] == pytest.approx(0.4, abs=0.005)


def sparsify(model_folder, text_file, out, *more):
    arguments = ["sparsify", "--method", "teal", "--model", str(model_folder), "--out", str(out)]
    return cli.main([*arguments, "--text", str(text_file), "--tokens", "2048", *more])


def test_the_command_writes_the_original_with_rules(model_folder, text_file, tmp_path, capsys):
    out = tmp_path / "teal"
    assert sparsify(model_folder, text_file, out, "--sparsity", "0.4", "--sites", "o,down") == 0
    assert "inputs left out on them, mean over layers: o 4" in capsys.readouterr().out
    rules = rules_of_config(read_json(out / "config.json"), 2)
    assert [rule.site for rule in rules] == ["o", "down"]
    summary = json.loads((out / "inputs.json").read_text())
    for shares in summary["sparsity_per_layer"].values():
        assert shares == pytest.approx([0.4, 0.4], abs=0.05)
    original, made = (checkpoint.load_model(str(path)) for path in (model_folder, out))
    for name, weight in made.named_parameters():
        torch.testing.assert_close(weight, original.get_parameter(name), rtol=1e-3, atol=1e-3)
    capsys.readouterr()
    assert sparsify(out, text_file, tmp_path / "again", "--sparsity", "0.1") == 2
    assert "leaves inputs out already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, what",
    [
        ([], "not a share of inputs"),
        (["--sparsity", "1"], "not a share of inputs"),
        (["--sparsity", "0.5", "--sites", "q"], "unknown site"),
        (["--sparsity", "0.5", "--score", "size"], "unknown score"),
    ],
)
def test_what_cannot_be_left_out_is_refused(model_folder, text_file, tmp_path, capsys, options, what):
    assert sparsify(model_folder, text_file, tmp_path / "teal", *options) == 2
    assert what in capsys.readouterr().err
