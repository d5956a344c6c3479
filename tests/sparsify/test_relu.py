"""The whole method on a tiny model: it repairs, it sparsifies, it is deterministic, it fails cleanly."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from hotcold import checkpoint, cli
from hotcold.errors import InputError
from hotcold.sparsify.methods import load_method
from hotcold.sparsify.recipe import Recipe
from hotcold.sparsify.relu import sparsify_relu

RECIPE = Recipe(
    tokens=6144,
    sequence=64,
    batch=4,
    heldout_tokens=1024,
    warmup_steps=2,
    l1_peak=0.0,
    distill_lr=3e-3,
    layerwise_lr=3e-3,
)


def run(model_folder, tokenizer, text_file, recipe=RECIPE):
    records = []
    result = sparsify_relu(
        checkpoint.load_model(str(model_folder)), tokenizer, str(text_file), recipe, records.append
    )
    return result, records


def phase(records, name):
    return [record for record in records if record["phase"] == name]


def test_both_phases_learn_and_every_term_is_logged(model_folder, tokenizer, text_file):
    result, records = run(model_folder, tokenizer, text_file)
    layerwise, distilled = phase(records, "layerwise"), phase(records, "distill")
    assert [len(layerwise), len(distilled)] == [RECIPE.layerwise_steps, RECIPE.distill_steps]
    assert layerwise[-1]["error"] < layerwise[0]["error"]
    quantised = int(RECIPE.quantise_from * RECIPE.distill_steps)
    assert distilled[quantised - 1]["kl"] < distilled[0]["kl"]
    for record in distilled:
        assert record["loss"] == pytest.approx(record["kl"] + record["lambda"] * record["l1"], rel=1e-5)
    assert result.sparse.mean_sparsity > 0.4
    assert result.dense.mean_sparsity < 0.01


def test_a_stronger_l1_is_sparser(model_folder, tokenizer, text_file):
    recipe = replace(RECIPE, tokens=12288, quantise_from=1.0, generated_share=0.0)
    norms = []
    for peak in (0.0, 20.0):
        _, records = run(model_folder, tokenizer, text_file, replace(recipe, l1_peak=peak))
        norms.append(phase(records, "distill")[-1]["l1"])
    assert norms[1] < 0.8 * norms[0]


def test_same_seed_same_model(model_folder, tokenizer, text_file):
    recipe = replace(RECIPE, tokens=1024)
    runs = [run(model_folder, tokenizer, text_file, recipe) for _ in range(2)]
    assert runs[0][1] == runs[1][1]
    for a, b in zip(*(result.model.parameters() for result, _ in runs), strict=True):
        assert torch.equal(a, b)


def sparsify(capsys, *arguments):
    status = cli.main(["sparsify", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_command_writes_a_checkpoint_that_transformers_loads(model_folder, text_file, tmp_path, capsys):
    out = tmp_path / "sparse"
    status, printed, _ = sparsify(
        capsys, "--model", model_folder, "--text", text_file, "--out", out, "--tokens", 4096
    )
    assert status == 0
    assert "perplexity  dense" in printed
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.hidden_act == "relu"
    assert isinstance(model.model.layers[0].mlp.act_fn, torch.nn.ReLU)
    records = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert len(records) == 8
    summary = json.loads((out / "sparsify.json").read_text())
    assert summary["recipe"]["tokens"] == 4096
    assert f"{summary['perplexity_sparse']:.2f}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "prosparse"], "--method: unknown method (got prosparse, expected relu)"),
        (["--tokens", "7"], "tokens: too few tokens to train on (got 7, expected >= 1024)"),
        (["--generated", "1.5"], "generated_share: out of range (got 1.5, expected 0 to 1)"),
        (["--l1", "-1"], "l1_peak: the L1 factor must not be negative (got -1.0)"),
        (
            ["--l1-reduction", "max"],
            "l1_reduction: unknown reduction (got max, expected mean | token_sum | sum)",
        ),
        (["--text", "/no/such.txt"], "/no/such.txt: no such file"),
    ],
)
def test_bad_arguments_get_one_line_and_no_output(model_folder, tmp_path, capsys, arguments, message):
    out = tmp_path / "sparse"
    status, printed, errors = sparsify(capsys, "--model", model_folder, "--out", out, *arguments)
    assert (status, printed) == (2, "")
    assert message in errors
    assert errors.count("\n") == 1
    assert not out.exists()


def test_an_output_folder_with_other_things_is_left_alone(model_folder, tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    status, _, errors = sparsify(capsys, "--model", model_folder, "--out", tmp_path)
    assert status == 2
    assert "holds something else than a checkpoint" in errors
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_output_that_is_a_file(model_folder, text_file, capsys):
    status, _, errors = sparsify(capsys, "--model", model_folder, "--out", text_file)
    assert status == 2
    assert "is a file" in errors


def test_interrupting_leaves_nothing(model_folder, text_file, tmp_path, capsys, monkeypatch):
    from hotcold.sparsify import distill as module

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "l1_norm", interrupt)
    out = tmp_path / "sparse"
    status, *_ = sparsify(
        capsys, "--model", model_folder, "--text", text_file, "--out", out, "--tokens", 4096
    )
    assert status == 130
    assert list(tmp_path.iterdir()) == []


def test_unknown_method_names_the_known_ones():
    with pytest.raises(InputError, match="expected relu"):
        load_method("lottery")


def test_the_phases_share_all_tokens():
    recipe = Recipe(tokens=100_000)
    steps = recipe.layerwise_steps + recipe.distill_steps
    assert steps == 100_000 // recipe.step_tokens
    assert recipe.l1_schedule()(recipe.distill_steps) == recipe.l1_peak
