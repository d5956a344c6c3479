"""Shifted thresholds: the curve is monotone where it must be, folding changes nothing, the search resumes."""

import json

import pytest
import torch
from torch.nn import functional

from hotcold import cli
from hotcold.errors import UnsupportedError
from hotcold.model import checkpoint
from hotcold.model.checkpoint import ffn_layers
from hotcold.sparsify.activations import set_activation
from hotcold.sparsify.measure.evaluate import measure
from hotcold.sparsify.methods.shift_thresholds import (
    STEPS,
    Point,
    best,
    curve,
    fold,
    per_layer,
    tail_errors,
    thresholded,
)
from hotcold.sparsify.training.data import read_windows
from hotcold.text import documents

from ..conftest import make_model


@pytest.fixture
def sparse(dense):
    set_activation(dense, "relu")
    return dense.requires_grad_(False)


@pytest.fixture
def windows():
    return torch.randint(0, 400, (8, 32), generator=torch.Generator().manual_seed(0))


def test_the_curve_rises_with_the_threshold(sparse, windows):
    points = curve(sparse, windows, [(t, [t, t]) for t in (0.0, 0.05, 0.2, 1.0)])
    shares = [point.sparsity for point in points]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]
    assert isinstance(sparse.model.layers[0].mlp.act_fn, torch.nn.ReLU)  # put back


def test_the_sparsest_within_the_budget_is_chosen():
    points = [
        Point(t, [t], ppl, s, [s])
        for t, ppl, s in [(0, 10, 0.7), (1, 10.1, 0.8), (2, 9.9, 0.75), (3, 12, 0.9)]
    ]
    assert [best(points, budget).knob for budget in (1.0, 1.01, 1.2)] == [2, 1, 3]


def test_an_ffns_error_is_that_of_what_is_cut(sparse, windows):
    top = 0.4
    errors = tail_errors(sparse, windows, top)
    assert errors.shape == (2, STEPS)
    assert (errors[:, :-1] >= errors[:, 1:]).all()
    inputs = []
    handle = ffn_layers(sparse)[1].mlp.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    sparse(windows)
    handle.remove()
    layer = ffn_layers(sparse)[1]
    gate, up = layer.gate(inputs[0]), layer.up(inputs[0])
    whole, kept = (layer.down(g * up) for g in (functional.relu(gate), torch.where(gate >= top / 4, gate, 0)))
    spread = (whole - whole.mean((0, 1))).square().mean()
    assert errors[1, 2].item() == pytest.approx(((whole - kept).square().mean() / spread).item(), rel=1e-4)
    assert per_layer(errors, top, errors[1, 2].item())[1] == top / 4
    assert per_layer(errors, top, 0.0) == [top / 2 ** (STEPS - 1)] * 2


def test_folding_leaves_the_function_as_it_was(sparse, windows):
    thresholds = [0.4, 0.05]
    with thresholded(sparse, thresholds):
        expected = sparse(windows).logits
    common = fold(sparse, thresholds)
    assert common in thresholds
    set_activation(sparse, f"fatrelu_{common}")
    assert torch.equal(sparse(windows).logits, expected)


def test_only_powers_of_two_can_be_folded(sparse):
    with pytest.raises(ValueError, match=r"not 0\.3 times a power of two"):
        fold(sparse, [0.1, 0.3])


def test_a_silu_model_has_no_threshold(dense):
    with (
        pytest.raises(
            UnsupportedError, match=r"only ReLU models have thresholds to shift \(got silu, expected relu"
        ),
        thresholded(dense, [0, 0]),
    ):
        pass


@pytest.fixture
def sparse_folder(tmp_path, tokenizer):
    model = make_model(n_vocab=tokenizer.get_vocab_size())
    set_activation(model, "relu")
    checkpoint.save(model, tokenizer, tmp_path / "sparse")
    return tmp_path / "sparse"


@pytest.mark.parametrize("option", [[], ["--per-layer"]])
def test_the_command_prints_the_curve_saves_and_resumes(
    sparse_folder, text_file, tokenizer, tmp_path, capsys, option, monkeypatch
):
    out = tmp_path / "out"
    arguments = [
        "--model",
        sparse_folder,
        "--text",
        text_file,
        "--out",
        out,
        "--tokens",
        1024,
        "--window",
        64,
    ]
    arguments = ["shift-thresholds", *map(str, arguments), "--budget", "1.05", *option]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "thresholds.json").read_text())
    assert len(printed.splitlines()) == 1 + len(found["curve"]) + 1
    assert printed.count("<- chosen") == 1
    chosen = found["chosen"]
    assert chosen["perplexity"] <= 1.05 * found["curve"][0]["perplexity"]
    tested = found["test"]
    assert [point["knob"] for point in tested.values()] == [0, chosen["knob"]]
    shown = " -> ".join(f"{point['perplexity']:.3f}" for point in tested.values())
    assert printed.splitlines()[-1].startswith(f"on the test part: perplexity {shown}")
    for part, point in (("calibrate", found["curve"][0]), ("test", tested["unshifted"])):
        windows = read_windows(documents(str(text_file), part), tokenizer, 64, 1024, part)
        quality = measure(checkpoint.load_model(str(sparse_folder)), windows)
        assert quality.perplexity == pytest.approx(point["perplexity"], rel=1e-2)
    model = checkpoint.load_model(str(out))
    assert model.config.hidden_act.startswith("fatrelu_")
    monkeypatch.setattr(
        "hotcold.sparsify.methods.shift_thresholds.measure", None
    )  # nothing is measured again
    journal = tmp_path / "out.curve.jsonl"
    run = json.loads(journal.read_text().splitlines()[0])["run"]
    journal.write_text(json.dumps({"run": run, "point": {"knob": 0}}) + "\n" + journal.read_text())
    assert cli.main(arguments) == 0
    told = capsys.readouterr()
    assert told.out == printed and told.err.count("ignored: ") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0.5"], "--budget: must be a factor on perplexity (got 0.5, expected >= 1)"),
        (["--try", "a,b"], "--try: not a comma-separated list of numbers (got a,b)"),
        (["--try", "-1"], "--try: must not be negative (got -1.0)"),
    ],
)
def test_bad_arguments(sparse_folder, tmp_path, capsys, arguments, message):
    arguments = ["--model", str(sparse_folder), "--out", str(tmp_path / "out"), *arguments]
    assert cli.main(["shift-thresholds", *arguments]) == 2
    assert message in capsys.readouterr().err
