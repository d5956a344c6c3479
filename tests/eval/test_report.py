"""Every form of the report holds the same figures, and its JSON is JSON even where nothing was measured."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest

from hotcold.eval.perplexity import Quality
from hotcold.eval.report import FORMATS, as_json_object, render
from hotcold.eval.results import Activity, Ratio, Report, Row, Spread, StockSpeed
from hotcold.eval.roofline import Roofline

PARTS = {"attention": 30e6, "predictor": 5e6, "ffn": 40e6, "head": 20e6, "kv": 4e6, "other": 1e6}
EXACT = Activity(0.7, float("nan"), float("nan"), PARTS)
PREDICTED = Activity(0.71, 0.55, 0.97, PARTS)


def make_row(side, speed, ratio, activity=None, quality=None):
    """A side that is ten times as fast on prompts."""
    spread = Spread(speed, speed - 1, speed + 1)
    return Row(
        side, Spread(10 * speed, 9 * speed, 11 * speed), spread, Ratio(1, 1, 1, 1, 1),
        Ratio(ratio, ratio, ratio, 0.9 * ratio, 1.1 * ratio), Roofline(PARTS, 40.0),
        Spread(speed / 400, speed / 500, speed / 300), activity, quality,
        {"original (dense)": Ratio(ratio / 2, ratio / 2, ratio / 2, 0.4 * ratio, 0.6 * ratio)},
    )  # fmt: skip


@pytest.fixture
def report():
    return Report(
        rows=[
            make_row("llama.cpp (smallthinker)", 190.0, 0.95, quality=Quality(34.5, 0.9, 8176)),
            make_row("llama.cpp (llama)", 200.0, 1.0),
            make_row("exact", 400.0, 2.0, EXACT, Quality(34.6, 0.9, 8176, 0.99, 1e-3)),
            make_row("predicted", 440.0, 2.2, PREDICTED, Quality(35.0, 0.9, 8176, 0.95, 0.01)),
        ],
        baseline="llama.cpp (llama)",
        baseline_prompt="llama.cpp (smallthinker)",
        truth="llama.cpp (smallthinker)",
        bandwidth=Spread(46.0, 43.0, 47.0),
        bandwidth_plain=Spread(40.0, 38.0, 41.0),
        bandwidth_prefetching=Spread(44.0, 42.0, 45.0),
        settings={"threads": 2, "rounds": 7},
        machine={"cpu": "A CPU", "system": "Linux", "isa": ["avx2"]},
    )


def test_json_is_one_line_with_flat_keys(report):
    text = render(report, "json")
    assert "\n" not in text
    found = json.loads(text)
    assert found["tok_s_llama_cpp"] == 200.0
    assert found["tok_s_llama_cpp_smallthinker"] == 190.0
    assert found["pp_tok_s_llama_cpp"] == 1900.0  # the other file is the faster one there
    speeds = [found[f"{metric}_exact"] for metric in ("tok_s", "tok_s_low", "tok_s_high")]
    assert speeds == [400.0, 399.0, 401.0]
    assert (found["ratio_exact"], found["ratio_predicted"]) == (2.0, 2.2)
    assert (found["ratio_ci_low_exact"], found["ratio_ci_high_exact"]) == (1.8, 2.2)
    assert found["ratio_to_original_dense_exact"] == 1.0
    assert found["ratio_to_original_dense_ci_low_exact"] == 0.8
    assert (found["sparsity"], found["predicted_sparsity"], found["recall"]) == (0.7, 0.55, 0.97)
    assert (found["ppl_llama_cpp"], found["ppl_exact"], found["ppl_predicted"]) == (34.5, 34.6, 35.0)
    assert found["same_top_predicted"] == 0.95
    assert found["bytes_per_token_exact"] == 100e6
    assert found["gb_s_exact"] == pytest.approx(40.0)
    assert (found["bandwidth_share_exact"], found["bandwidth_share_low_exact"]) == (1.0, 0.8)
    assert found["threads"] == 2


def test_what_was_not_measured_is_null_not_nan(report):
    assert "NaN" not in render(report, "json")
    assert as_json_object(report)["recall_exact"] is None
    assert as_json_object(report)["sparsity_llama_cpp"] is None


def test_without_predicted_mode_there_is_no_recall(report):
    found = as_json_object(replace(report, rows=report.rows[:3]))
    assert (found["sparsity"], found["recall"], found["predicted_sparsity"]) == (0.7, None, None)


def test_csv_and_jsonl_hold_the_rows(report):
    rows = as_json_object(report)["rows"]
    lines = [json.loads(line) for line in render(report, "jsonl").splitlines()]
    assert [{key: line[key] for key in row} for line, row in zip(lines, rows, strict=True)] == rows
    bandwidths = [lines[0][f"bandwidth_{name}gb_s"] for name in ("", "plain_", "prefetching_")]
    assert bandwidths == [46.0, 40.0, 44.0]
    table = list(csv.DictReader(io.StringIO(render(report, "csv"))))
    assert [row["side"] for row in table] == [row["side"] for row in rows]
    assert [float(row["tok_s"]) for row in table] == [row["tok_s"] for row in rows]
    assert table[1]["ppl"] == ""


def test_markdown_has_quality_beside_speed(report):
    lines = render(report, "md").splitlines()
    predicted = next(line for line in lines if line.startswith("| predicted"))
    for figure in (
        "440.0 (439.0–441.0)",
        "2.20x (1.98–2.42)",
        "1.10x (0.88–1.32)",
        "110.0%",
        "71.0%",
        "55.0%",
        "97.0%",
        "35.00 ± 0.90",
        "95.0%",
    ):
        assert figure in predicted
    twin = next(line for line in lines if line.startswith("| llama.cpp (llama)"))
    assert twin.count("–") >= 6  # a range and dashes: no sparsity, no quality
    for figure in ("46.0 GB/s (43.0–47.0) the best", "40.0 GB/s (38.0–41.0) with plain", "44.0 GB/s"):
        assert figure in lines[-2]
    assert "95% confidence" in render(report, "md")
    assert "threads 2" in lines[-1] and "A CPU" in lines[-1]


def test_nothing_that_was_not_judged_looks_like_quality(report):
    bare = replace(report, rows=[replace(row, quality=None) for row in report.rows])
    for form in FORMATS:
        text = render(bare, form)
        for word in ("perplexity", "ppl", "KL", '"kl', "kl_", "same_top", "same top"):
            assert word not in text, (form, word)
    assert "97.0%" in render(bare, "md")  # recall is counted, not judged


def test_a_stock_llama_bench_is_there_for_the_record(report):
    stock = StockSpeed("llama.cpp (llama)", "b6789 (abc1234)", 128, (1500.0, 20.0), (260.5, 3.25))
    found = replace(report, stock=[stock])
    line = next(line for line in render(found, "md").splitlines() if line.startswith("For the record"))
    assert "llama-bench b6789 (abc1234) on the file of llama.cpp (llama), at depth 128" in line
    assert "generate 260.5 ± 3.2 t/s" in line and "prompt 1500.0 ± 20.0 t/s" in line
    assert as_json_object(found)["llama_bench"][0]["generation"] == (260.5, 3.25)
    assert json.loads(render(found, "jsonl").splitlines()[0])["llama_bench"][0]["build"] == "b6789 (abc1234)"
    table = list(csv.DictReader(io.StringIO(render(found, "csv"))))
    assert table[-1]["side"].startswith("llama-bench b6789") and table[-1]["tok_s"] == "260.5"
    assert "llama_bench" not in as_json_object(report)


def test_markdown_tables_are_rectangles(report):
    blocks = [block for block in render(report, "md").split("\n\n") if block.startswith("|")]
    assert len(blocks) == 2
    for block in blocks:
        assert len({len(line) for line in block.splitlines()}) == 1
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_spread_is_of_the_samples():
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)
