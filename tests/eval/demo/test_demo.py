"""The demo's commands are ones that the command line takes, and its report holds what they measured."""

from __future__ import annotations

import argparse
import importlib
import json
from itertools import islice

import pytest

from hotcold.cli import COMMANDS, main
from hotcold.eval.demo.demo import build_report, demo_steps, summary
from hotcold.eval.demo.pipeline import Done
from hotcold.eval.machine import describe
from hotcold.model import checkpoint
from hotcold.text import documents

from ..conftest import make_model, make_tokenizer

PERPLEXITY = """\
{"mode": "dense", "ppl": 34.0, "stderr": 0.5, "tokens": 8176}
{"mode": "exact", "ppl": 33.9, "stderr": 0.5, "tokens": 8176}
{"mode": "predicted", "ppl": 34.4, "stderr": 0.5, "tokens": 8176}
{"mode": "llama.cpp", "ppl": 34.1, "stderr": 0.5, "tokens": 8176}
{"mode": "smollm2", "ppl": 28.6, "stderr": 0.4, "tokens": 8176}
"""
PERPLEXITY_ORIGINAL = """\
{"mode": "dense", "ppl": 32.0, "stderr": 0.5, "tokens": 8176}
{"mode": "llama.cpp", "ppl": 32.1, "stderr": 0.5, "tokens": 8176}
"""
SPARSE = ("llama_cpp", "dense", "exact", "predicted")
ORIGINALS = ("as_it_came_llama_cpp", "original_llama_cpp", "original_dense")
SIDES = (*ORIGINALS, *SPARSE)
BENCH = {
    "sparsity": 0.7,
    "predicted_sparsity": 0.6,
    "recall": 0.97,
    "ppl_exact": 99.0,
    "machine": {"cores": 2},
}
BENCH |= {f"tok_s_{side}": 100.0 + i for i, side in enumerate(SIDES)}
for of in ORIGINALS:
    BENCH |= {f"ratio_to_{of}_{side}": 1.0 + i for i, side in enumerate(SIDES)}
    BENCH |= {f"ratio_to_{of}_ci_low_{side}": 1.0 + 0.9 * i for i, side in enumerate(SIDES)}
    BENCH |= {f"ratio_to_{of}_ci_high_{side}": 1.0 + 1.1 * i for i, side in enumerate(SIDES)}


@pytest.fixture
def steps(tmp_path):
    return demo_steps(tmp_path, model="smollm2", quant="q4_0", n_threads=2)


def test_every_step_is_a_valid_command_line(steps):
    for step in steps:
        name, *arguments = step.arguments
        module = importlib.import_module(COMMANDS[name][0])
        parser = argparse.ArgumentParser(exit_on_error=False)
        module.add_arguments(parser)
        parser.parse_args(arguments)


def test_each_step_takes_what_the_one_before_made(steps):
    made = set()
    for step in steps:
        inputs = {
            value
            for option, value in zip(step.arguments, step.arguments[1:], strict=False)
            if option in ("--model", "--traces", "--predictors", "--bundle", "--original")
            and value != "smollm2"
        }
        assert inputs <= made
        made |= {str(step.output)} if step.output else set()


def test_the_trained_ffns_are_taken_where_they_fit(tmp_path, monkeypatch):
    def method(model, **options):
        first = demo_steps(tmp_path, model=model, quant="q4_0", n_threads=2, **options)[0].arguments
        return first[first.index("--method") + 1]

    for there in (True, False):
        file = tmp_path / "ffns"
        file.touch() if there else file.unlink()
        monkeypatch.setattr("hotcold.eval.demo.demo.FILE", file)
        assert method("smollm2") == ("pretrained" if there else "relu")
        assert method("smollm2", from_scratch=True) == "relu"
        assert method("other.gguf") == "relu"


@pytest.fixture
def report():
    steps = [
        Done("run", "", 3.0, "A text.\n"),
        Done("perplexity", "", 50.0, PERPLEXITY),
        Done("perplexity original", "", 7.0, PERPLEXITY_ORIGINAL),
    ]
    done = {step.name: step for step in steps}
    return build_report(done, BENCH, model="smollm2", quant="q4_0")


def test_report_has_every_promised_figure(report):
    assert report["ppl_as_it_came_llama_cpp"] == 28.6
    assert (report["ppl_original_dense"], report["ppl_original_llama_cpp"]) == (32.0, 32.1)
    assert (report["ppl_dense"], report["ppl_exact"], report["ppl_predicted"]) == (34.0, 33.9, 34.4)
    assert report["ppl_llama_cpp"] == 34.1
    assert {"sparsity", "recall", "predicted_sparsity", "machine"} <= set(report)
    assert {f"{metric}_{side}" for metric in ("tok_s", "ppl") for side in SIDES} <= set(report)
    assert report["seconds"] == {"run": 3.0, "perplexity": 50.0, "perplexity original": 7.0}
    assert report["seconds_total"] == 60.0
    assert json.loads(json.dumps(report)) == report


def test_summary_shows_quality_beside_speed(report):
    text = summary(report)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split(" | ")[0] for row in rows[2:5]] == [
        "| smollm2 as it came, llama.cpp",
        "| smollm2 as Q4_0, llama.cpp",
        "| smollm2 as Q4_0, hotcold dense",
    ]
    assert "| smollm2 as it came, llama.cpp | 28.60 ± 0.40 | 100.0 | 1.00x |  |" in rows
    assert "| smollm2 as Q4_0, hotcold dense | 32.00 ± 0.50 | 102.0 | 3.00x (2.80–3.20) |  |" in rows
    predicted = "7.00x (6.40–7.60)"
    assert f"| sparse, hotcold predicted | 34.40 ± 0.50 | 106.0 | {predicted} | {predicted} |" in rows
    assert "exact 1.19x the original as it came, 1.06x the original as Q4_0; predicted 1.20x" in text
    assert "exact and dense of one bundle differ" in text and "two axes" in text
    assert "sparsity 70.0%, predicted sparsity 60.0%, recall 97.0%" in text
    assert "in all 1.0 minutes" in text


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A GGUF file of a tiny random SiLU model."""
    folder = tmp_path_factory.mktemp("teacher")
    prose = "".join(document.text for document in islice(documents("stdlib"), 100))
    tokenizer = make_tokenizer(prose, vocab_size=1000)
    model = make_model(tokenizer.get_vocab_size(), hidden_act="silu", max_position_embeddings=1024)
    checkpoint.save(model, tokenizer, folder / "model")
    export = ["export", "--model", folder / "model", "--quant", "f16", "--out", folder / "bundle"]
    assert main([*map(str, export), "--name", "tiny"]) == 0
    return folder / "bundle" / "tiny.gguf"


@pytest.mark.slow
def test_the_whole_demo_on_a_tiny_model(teacher, tmp_path, capfd):
    arguments = ["demo", "--model", str(teacher), "--out", str(tmp_path / "demo"), "-t", "1"]
    assert main(arguments) == 0
    report = json.loads((tmp_path / "demo" / "report.json").read_text())
    for side in SIDES:
        assert report[f"tok_s_{side}"] > 0
        assert report[f"ppl_{side}"] > 1
    assert report["recall"] > 0.9
    assert report["ppl_exact"] == pytest.approx(report["ppl_dense"], rel=0.05)
    assert report["ppl_original_dense"] == pytest.approx(report["ppl_original_llama_cpp"], rel=0.05)
    assert {name.split()[0] for name in report["seconds"]} <= set(COMMANDS)
    first = capfd.readouterr()
    assert "[9/9] hotcold bench" in first.err
    assert "| sparse, hotcold predicted |" in first.out

    assert main(arguments) == 0  # all is there: nothing runs again
    again = capfd.readouterr()
    assert again.err.count("already done") == 9
    assert json.loads((tmp_path / "demo" / "report.json").read_text()) == report


def test_machine_description_is_of_plain_values():
    found = describe()
    assert found["cores"] >= 1
    assert found["versions"]["torch"]
    assert json.loads(json.dumps(found)) == found
