"""`hotcold bench` with the real engines on a tiny bundle: all promised figures are there and agree."""

from __future__ import annotations

import json
import math

import pytest

from hotcold.cli import main

SMALL = ("-t", 1, "-r", 2, "-p", 8, "-n", 6, "--quality-tokens", 96, "--window", 32)
METRICS = (
    "tok_s",
    "pp_tok_s",
    "ratio",
    "ratio_ci_low",
    "ratio_pp",
    "bytes_per_token",
    "gb_s",
    "bandwidth_share",
)
SIDES = ("llama_cpp", "dense", "exact", "predicted")


def run(*arguments):
    return main(["bench", *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(bundle, text_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    assert run("--bundle", bundle, "--text", text_file, *SMALL, "--save", path) == 0
    return json.loads(path.read_text())


def test_the_last_line_of_stdout_is_one_json_object(bundle, text_file, capsys):
    assert run("--bundle", bundle, "--text", text_file, *SMALL, "--modes", "exact", "-o", "json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["tok_s_exact"] > 0
    assert "tok_s_dense" not in found


def test_every_side_has_speed_ratio_bytes_and_perplexity(measured):
    for side in SIDES:
        for metric in METRICS:
            assert measured[f"{metric}_{side}"] > 0, (metric, side)
        assert measured[f"tok_s_low_{side}"] <= measured[f"tok_s_{side}"] <= measured[f"tok_s_high_{side}"]
        assert math.isfinite(measured[f"ppl_{side}"])


def test_llama_cpp_runs_on_both_forms_and_the_faster_counts(measured):
    speeds = [measured[f"tok_s_llama_cpp_{form}"] for form in ("smallthinker", "llama")]
    assert measured["tok_s_llama_cpp"] == max(speeds)
    assert measured["ratio_llama_cpp"] == 1.0


def test_all_modes_compute_what_llama_cpp_computes(measured):
    """F16 weights, and predictors that miss nothing."""
    for side in ("dense", "exact", "predicted"):
        assert measured[f"ppl_{side}"] == pytest.approx(measured["ppl_llama_cpp"], rel=1e-3)
        assert measured[f"kl_{side}"] < 1e-4
        assert measured[f"same_top_{side}"] > 0.95


def test_activity_is_real(measured):
    assert 0.2 < measured["sparsity"] < 0.8
    assert measured["recall"] == pytest.approx(1.0)
    # These predictors are perfect, but position 0 of the 8 + 6 tokens is computed in full.
    assert measured["predicted_sparsity"] == pytest.approx(measured["sparsity"] * 13 / 14, abs=0.02)
    assert measured["recall_exact"] is None
    assert measured["bytes_per_token_exact"] < measured["bytes_per_token_dense"]


def test_recall_of_predictors_that_miss_neurons(lossy_bundle, text_file, tmp_path):
    arguments = ("--bundle", lossy_bundle, "--text", text_file, *SMALL, "--modes", "predicted")
    assert run(*arguments, "--save", tmp_path / "bench.json") == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    assert 0.1 < found["recall"] < 0.99
    assert found["kl_predicted"] > 1e-4


def test_modes_that_leave_inputs_out_are_sides_of_their_own(bundle, text_file, capsys):
    arguments = ("--bundle", bundle, "--text", text_file, *SMALL, "--modes", "dense,exact", "-o", "json")
    assert run(*arguments, "--input-sparsity", 0.5) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["input_sparsity"] == 0.5
    sides = [row["side"] for row in found["rows"]][2:]
    assert sides == ["dense", "dense (attention inputs 50%)", "exact", "exact (attention inputs 50%)"]
    for mode in ("dense", "exact"):
        other = f"{mode}_attention_inputs_50"
        assert 0 < found[f"bytes_attention_{other}"] < found[f"bytes_attention_{mode}"]
        assert found[f"kl_{other}"] > 10 * found[f"kl_{mode}"]


def test_synthetic_models_say_so_and_fire_as_asked(tmp_path, capsys):
    shape = ("--synthetic", "smollm2-135m", "--layers", 2, "--sparsity", 0.8, "--cache", tmp_path)
    assert run(*shape, *SMALL, "-o", "json") == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["synthetic"] == "smollm2-135m"
    assert found["sparsity"] == pytest.approx(0.8, abs=0.04)
    assert found["recall"] > 0.9
    assert 0.5 < found["predicted_sparsity"] < found["sparsity"]
    assert [path.name.startswith("synthetic-") for path in tmp_path.iterdir()] == [True]


def test_random_weights_have_no_quality_unless_it_is_asked_for(tmp_path, capsys):
    shape = ("--synthetic", "smollm2-135m", "--layers", 1, "--cache", tmp_path, "--modes", "exact")
    assert run(*shape, "-t", 1, "-r", 1, "-p", 4, "-n", 4, "-o", "csv") == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert not {"ppl", "kl", "same_top"} & set(head.split(",")) and len(rows) == 3
    assert run(*shape, "-t", 1, "-r", 1, "-p", 4, "-n", 4, "--quality-tokens", 32, "--window", 16) == 0
    assert "perplexity" in capsys.readouterr().out


def test_the_original_takes_turns_too(bundle, lossy_bundle, text_file, capsys):
    options = (
        "--original",
        lossy_bundle,
        "--gguf",
        lossy_bundle / "tiny.gguf",
        "--modes",
        "exact",
        "-o",
        "json",
    )
    assert run("--bundle", bundle, "--text", text_file, *SMALL, *options) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    for side in ("as_it_came_llama_cpp", "original_llama_cpp", "original_dense"):
        assert found[f"tok_s_{side}"] > 0
        assert found[f"ppl_{side}"] == pytest.approx(found["ppl_exact"], rel=1e-3)  # the same weights
        assert found[f"ratio_to_{side}_{side}"] == 1.0
        low, high = (found[f"ratio_to_{side}_ci_{end}_exact"] for end in ("low", "high"))
        assert low < found[f"ratio_to_{side}_exact"] < high  # two rounds: half way, in logarithms, or near
    assert found["ppl_llama_cpp"] == pytest.approx(found["ppl_exact"], rel=1e-3)


# prints what llama-bench prints (tools/llama-bench of llama.cpp), as far as it matters, for what it is asked
LLAMA_BENCH = """#!/usr/bin/env python3
import json, sys
asked = dict(zip(sys.argv[1::2], sys.argv[2::2]))
assert asked["-o"] == "json" and asked["-fa"] == "1" and asked["-r"] == "3", asked
shared = {
    "build_commit": "5c0eb5ef", "build_number": 6869, "cpu_info": "A CPU", "gpu_info": "", "backends": "CPU",
    "model_filename": asked["-m"], "model_type": "llama ?B Q4_0", "n_threads": int(asked["-t"]),
    "flash_attn": True, "n_depth": int(asked["-d"]), "test_time": "2025-10-29T10:00:00Z",
}
sizes = [(int(asked["-p"]), 0, 900.0), (0, int(asked["-n"]), 250.5)]
print(json.dumps([
    shared | {"n_prompt": p, "n_gen": n, "avg_ns": 1, "stddev_ns": 1, "avg_ts": speed, "stddev_ts": 2.5,
              "samples_ns": [1, 1, 1], "samples_ts": [speed] * 3}
    for p, n, speed in sizes
], indent=2))
"""


@pytest.fixture
def program(tmp_path):
    def write(text):
        path = tmp_path / "llama-bench"
        path.write_text(text)
        path.chmod(0o755)
        return path

    return write


def test_a_stock_llama_bench_runs_on_the_same_files(bundle, text_file, program, capsys):
    arguments = ("--bundle", bundle, "--text", text_file, *SMALL, "--modes", "exact", "-o", "json")
    assert run(*arguments, "--llama-bench", program(LLAMA_BENCH)) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["llama_bench"]
    assert [stock["side"] for stock in found] == ["llama.cpp (smallthinker)", "llama.cpp (llama)"]
    for stock in found:
        assert stock["build"] == "b6869 (5c0eb5ef)" and stock["depth"] == 8
        assert (stock["prompt"], stock["generation"]) == ([900.0, 2.5], [250.5, 2.5])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "#!/bin/sh\necho 'error: unknown model' >&2\nexit 1\n",
            "ended with status 1 (got error: unknown model)",
        ),
        ("#!/bin/sh\necho hello\n", "llama-bench printed no JSON (got hello)"),
        ("#!/bin/sh\necho '{}'\n", "printed unexpected JSON"),
        (
            "#!/bin/sh\necho '[{\"n_prompt\": 8}]'\n",
            "printed no result (got 1 tests, expected n_prompt 8, n_gen 0",
        ),
        ("#!/no/such/interpreter\n", "No such file"),
    ],
)
def test_a_llama_bench_that_fails_gives_one_line(bundle, text_file, program, capsys, text, message):
    arguments = ("--bundle", bundle, "--text", text_file, *SMALL, "--modes", "exact")
    assert run(*arguments, "--llama-bench", program(text)) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err
    assert len([line for line in err.splitlines() if "error" in line]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bundle", "nowhere"), "nowhere"),
        (("--synthetic", "gpt-5"), "unknown synthetic shape (got gpt-5, expected llama-2-7b | llama-2-13b"),
        (("--synthetic", "smollm2-135m", "--sparsity", "2"), "--sparsity out of range (got 2.0"),
        (("--synthetic", "smollm2-135m", "--quant", "q2"), "unknown quantization (got q2"),
        (("--synthetic", "smollm2-135m", "--modes", "fast"), "unknown mode (got fast, expected dense"),
        (("--synthetic", "llama-2-13b", "--input-sparsity", "50"), "no such share of inputs (got 50.0"),
        (("--synthetic", "smollm2-135m", "-r", "0"), "rounds: must be at least 1"),
        (("--synthetic", "smollm2-135m", "-t", "0"), "--threads: must be at least 1"),
        (("--synthetic", "smollm2-135m", "--quality-tokens", "-1"), "--quality-tokens: must not be negative"),
    ],
)
def test_bad_arguments_give_one_line_and_status_2(capsys, arguments, message):
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len(err.splitlines()) == 1
