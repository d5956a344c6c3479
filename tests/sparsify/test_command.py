"""`hotcold sparsify` from the command line: what it writes, prints and refuses."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hotcold import cli


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
    assert f"{summary['perplexity_sparse']:.2f}" in printed
    assert summary["config"]["activation"] == "relu"


def test_a_dry_run_says_what_would_be_done_and_does_nothing(model_folder, tmp_path, capsys):
    out = tmp_path / "sparse"
    status, printed, _ = sparsify(
        capsys, "--model", model_folder, "--out", out, "--tokens", 102_400, "--dry-run"
    )
    assert status == 0
    assert list(tmp_path.iterdir()) == []
    rows = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    assert rows["warm start"][-1] == "14,336"
    assert (
        sum(int(rows[f"stage {i}"][-1].replace(",", "")) for i in range(3))
        + int(rows["last"][-1].replace(",", ""))
        == 102_400 - 14_336
    )
    assert {"weights, float32", "AdamW, float32", "dense model, bfloat16", "in all"} <= rows.keys()
    assert "2 CPU cores" in rows


def test_a_dry_run_of_another_models_recipe(model_folder, tmp_path, capsys):
    arguments = ["--method", "prosparse", "--config", "llama-2-7b", "--dry-run"]
    status, printed, errors = sparsify(capsys, "--model", model_folder, "--out", tmp_path / "x", *arguments)
    assert (status, printed) == (2, "")
    assert "this config is for a model of another size" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--method", "lottery"],
            "--method: unknown method (got lottery, expected relu | prosparse | ",
        ),
        (["--method", "prosparse"], "--method prosparse needs a config"),
        (["--config", "smollm2-135m"], "--config: is for --method prosparse"),
        (
            ["--method", "prosparse", "--config", "smollm2-135m", "--tokens", "9"],
            "--tokens: is for --method relu or cats; say it in smollm2-135m",
        ),
        (["--method", "pretrained", "--seed", "1"], "--seed: is for --method relu"),
        (["--tokens", "7"], "--tokens: too few tokens (got 7, expected >= 1024)"),
        (["--generated", "1.5"], "--generated: out of range (got 1.5, expected 0 to 1)"),
        (["--text", "/no/such.txt"], "/no/such.txt: no such file"),
        (["--sparsity", "0.5"], "--sparsity: is for --method cats"),
        (["--method", "cats"], "--sparsity: --method cats needs the share of values to be made zero"),
        (["--method", "cats", "--sparsity", "1.5"], "(got 1.5, expected 0 to 1)"),
        (["--method", "cats", "--sparsity", "0.5", "--l1", "0"], "--l1: is for --method relu"),
        (["--method", "pretrained", "--dry-run"], "--dry-run: is for --method relu or prosparse"),
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
    assert "not empty, and hotcold did not write it" in errors
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_output_that_is_a_file(model_folder, text_file, capsys):
    status, _, errors = sparsify(capsys, "--model", model_folder, "--out", text_file)
    assert status == 2
    assert "a file, not a folder" in errors


def test_interrupting_leaves_no_checkpoint(model_folder, text_file, tmp_path, capsys, monkeypatch):
    from hotcold.sparsify.training.trainer import Trainer

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_step", interrupt)
    out = tmp_path / "sparse"
    status, *_ = sparsify(
        capsys, "--model", model_folder, "--text", text_file, "--out", out, "--tokens", 4096
    )
    assert status == 130
    assert not out.exists()
