"""A benchmark's rows as a Markdown table, CSV, JSON lines, or one JSON object.

The JSON object has flat keys, `METRIC_SIDE`, so that a script can pick one figure, and `rows` with all.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from hotcold import table
from hotcold.eval.results import CONFIDENCE, Ratio, Report, Row, Spread, StockSpeed
from hotcold.eval.roofline import PARTS
from hotcold.files.json import json_text
from hotcold.identify import REPORT
from hotcold.runtime.stats import show_inputs

__all__ = ["FORMATS", "as_json_object", "markdown", "render"]

_DASH = "–"


def _csv(report: Report) -> str:
    rows = [_flat(row, report) for row in report.rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows([*rows, *map(_stock_row, report.stock)])
    return out.getvalue().rstrip("\n")


def _jsonl(report: Report) -> str:
    shared = {**_bandwidth(report), **report.settings, **_stock(report), "machine": dict(report.machine)}
    return "\n".join(json_text({**_flat(row, report), **shared}) for row in report.rows)


def _json(report: Report) -> str:
    return json_text(as_json_object(report))


def _bandwidth(report: Report) -> dict[str, object]:
    return {
        "bandwidth_gb_s": report.bandwidth.median,
        "bandwidth_plain_gb_s": report.bandwidth_plain.median,
        "bandwidth_prefetching_gb_s": report.bandwidth_prefetching.median,
    }


def _stock(report: Report) -> dict[str, object]:
    return {"llama_bench": list(map(asdict, report.stock))} if report.stock else {}


def _stock_row(stock: StockSpeed) -> dict[str, object]:
    side = f"llama-bench {stock.build} at depth {stock.depth}: {stock.side}"
    return {"side": side, "pp_tok_s": stock.prompt[0], "tok_s": stock.generation[0]}


def _judged(report: Report) -> bool:
    """Whether quality was measured. Where it was not, nothing that looks like it is shown."""
    return any(row.quality is not None for row in report.rows)


def _sites(report: Report) -> list[str]:
    """Where a side left inputs out."""
    activities = [row.activity for row in report.rows if row.activity]
    return list(dict.fromkeys(site for activity in activities for site in activity.inputs))


def _flat(row: Row, report: Report) -> dict[str, object]:
    """One row with plain values; what was not measured is None, never NaN, which is no JSON."""
    activity, quality = row.activity, row.quality
    values = {
        "side": row.side,
        **_spread("pp_tok_s", row.prompt),
        **_spread("tok_s", row.generation),
        **_ratio("ratio_pp", row.ratio_prompt),
        **_ratio("ratio", row.ratio),
        **{k: v for of, r in row.to_originals.items() for k, v in _ratio(f"ratio_to_{_key(of)}", r).items()},
        "bytes_per_token": row.roofline.bytes_per_token,
        **{f"bytes_{part}": row.roofline.parts[part] for part in PARTS},
        "gb_s": row.roofline.gb_s(row.generation.median),
        **_spread("bandwidth_share", row.share),
        "ceiling_tok_s": row.roofline.ceiling,
        "sparsity": activity and activity.sparsity,
        "predicted_sparsity": activity and activity.predicted_sparsity,
        "recall": activity and activity.recall,
        **{f"inputs_{site}": activity and activity.inputs.get(site) for site in _sites(report)},
    }
    if _judged(report):
        figures = {"ppl": "ppl", "ppl_stderr": "stderr", "same_top": "same_top", "kl": "kl"}
        values |= {name: quality and getattr(quality, figure) for name, figure in figures.items()}
    return {key: None if _is_nan(value) else value for key, value in values.items()}


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _spread(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}


def _ratio(name: str, ratio: Ratio) -> dict[str, float]:
    return _spread(name, ratio) | {f"{name}_ci_low": ratio.ci_low, f"{name}_ci_high": ratio.ci_high}


def _key(side: str) -> str:
    """`llama.cpp (smallthinker)` -> `llama_cpp_smallthinker`."""
    return "_".join("".join(c if c.isalnum() else " " for c in side).split())


def as_json_object(report: Report) -> dict[str, object]:
    """Flat keys `METRIC_SIDE` for every side; `llama_cpp` stands for the fastest of llama.cpp's files.

    `sparsity` is that of exact mode where it was run: the true one. `recall` and `predicted_sparsity` are
    those of predicted mode.
    """
    rows = {row.side: _flat(row, report) for row in report.rows}
    flat: dict[str, object] = {**REPORT}
    for side, row in [*rows.items(), ("llama_cpp", _llama_cpp(report, rows))]:
        flat |= {f"{metric}_{_key(side)}": value for metric, value in row.items() if metric != "side"}
    flat["sparsity"] = _first(rows, "sparsity", ("exact", "predicted", "auto"))
    flat["predicted_sparsity"] = _first(rows, "predicted_sparsity", ("predicted", "auto"))
    flat["recall"] = _first(rows, "recall", ("predicted", "auto"))
    return {
        **flat,
        **report.settings,
        "baseline": report.baseline,
        "baseline_prompt": report.baseline_prompt,
        **_bandwidth(report),
        **_stock(report),
        "rows": list(rows.values()),
        "machine": dict(report.machine),
    }


def _llama_cpp(report: Report, rows: Mapping[str, dict[str, object]]) -> dict[str, object]:
    """llama.cpp at its best: speeds of its fastest files, perplexity of the one that is like ours."""
    prompt = rows[report.baseline_prompt]
    judged = rows[report.truth]
    return {
        **rows[report.baseline],
        **{metric: prompt[metric] for metric in prompt if metric.startswith(("pp_tok_s", "ratio_pp"))},
        **{metric: judged[metric] for metric in ("ppl", "ppl_stderr") if metric in judged},
    }


def _first(rows: Mapping[str, Mapping[str, object]], metric: str, sides: Sequence[str]) -> object:
    return next((rows[side][metric] for side in sides if side in rows), None)


def _gb_s(spread: Spread) -> str:
    return f"{spread.median:.1f} GB/s ({spread.low:.1f}–{spread.high:.1f})"


def markdown(report: Report) -> str:
    """Two tables, speed with quality and bytes per token by part, with what they were measured on."""
    settings = ", ".join(f"{name} {value}" for name, value in report.settings.items())
    machine = ", ".join(f"{report.machine[name]}" for name in ("cpu", "system") if name in report.machine)
    lines = [
        _table(_speed_columns(report), report.rows),
        "",
        "t/s: median (smallest–largest) of the rounds. Ratios: medians of the rounds' own, of prompts to "
        f"{report.baseline_prompt}, of generation to {report.baseline}, with the {CONFIDENCE:.0%} confidence "
        "interval of their geometric mean. Shares of bandwidth: medians of the rounds', each of the best "
        "that a read loop had beside the run.",
        "",
        _table(_BYTES, report.rows),
        "",
        f"Read bandwidth in the same minutes: {_gb_s(report.bandwidth)} the best beside each run, which the "
        f"shares are of; {_gb_s(report.bandwidth_plain)} with plain loads, "
        f"{_gb_s(report.bandwidth_prefetching)} "
        "with prefetching.",
        *map(_stock_line, report.stock),
        f"{settings}; {machine}",
    ]
    return "\n".join(lines)


def _stock_line(stock: StockSpeed) -> str:
    (prompt, prompt_sd), (generation, generation_sd) = stock.prompt, stock.generation
    return (
        f"For the record, llama-bench {stock.build} on the file of {stock.side}, at depth {stock.depth}: "
        f"generate {generation:.1f} ± {generation_sd:.1f} t/s, prompt {prompt:.1f} ± {prompt_sd:.1f} t/s."
    )


_Column = tuple[str, Callable[[Row], str]]


def _table(columns: Sequence[_Column], rows: Sequence[Row]) -> str:
    return table.markdown([name for name, _ in columns], [[show(row) for _, show in columns] for row in rows])


def _number(value: float | None, form: str = ".2f") -> str:
    return _DASH if value is None or math.isnan(value) else f"{value:{form}}"


def _percent(value: float | None) -> str:
    return _number(value, ".1%")


def _show_spread(spread: Spread) -> str:
    return f"{spread.median:.1f} ({spread.low:.1f}–{spread.high:.1f})"


def _show_ratio(ratio: Ratio) -> str:
    """With its interval, unless there is none or all rounds are alike, as those of a side to itself."""
    if not ratio.ci_low < ratio.ci_high:
        return f"{ratio.median:.2f}x"
    return f"{ratio.median:.2f}x ({ratio.ci_low:.2f}–{ratio.ci_high:.2f})"


def _show_ppl(row: Row) -> str:
    return f"{row.quality.ppl:.2f} ± {row.quality.stderr:.2f}" if row.quality else _DASH


def _megabytes(part: str) -> Callable[[Row], str]:
    return lambda row: _number(row.roofline.parts[part] / 1e6, ".1f")


_SPEED: list[_Column] = [
    ("side", lambda row: row.side),
    ("prompt t/s", lambda row: _show_spread(row.prompt)),
    ("ratio", lambda row: _show_ratio(row.ratio_prompt)),
    ("generate t/s", lambda row: _show_spread(row.generation)),
    ("ratio", lambda row: _show_ratio(row.ratio)),
]
_WORK: list[_Column] = [
    ("MB/token", lambda row: _number(row.roofline.bytes_per_token / 1e6, ".1f")),
    ("GB/s", lambda row: _number(row.roofline.gb_s(row.generation.median), ".1f")),
    ("of bandwidth", lambda row: _percent(row.share.median)),
    ("sparsity", lambda row: _percent(row.activity and row.activity.sparsity)),
    ("predicted", lambda row: _percent(row.activity and row.activity.predicted_sparsity)),
    ("recall", lambda row: _percent(row.activity and row.activity.recall)),
]
_INPUTS: _Column = (
    "inputs left out",
    lambda row: (row.activity and show_inputs(row.activity.inputs)) or _DASH,
)
_QUALITY: list[_Column] = [
    ("perplexity", _show_ppl),
    ("same top-1", lambda row: _percent(row.quality and row.quality.same_top)),
    ("KL", lambda row: _number(row.quality and row.quality.kl, ".4f")),
]
_BYTES: list[_Column] = [
    ("MB/token", lambda row: row.side),
    *((part, _megabytes(part)) for part in PARTS),
    ("ceiling t/s", lambda row: _number(row.roofline.ceiling, ".1f")),
    ("reached", lambda row: _percent(row.share.median)),
]


def _speed_columns(report: Report) -> list[_Column]:
    originals = [
        (f"to {name}", lambda row, name=name: _show_ratio(row.to_originals[name]))
        for name in report.rows[0].to_originals
    ]
    inputs = [_INPUTS] if _sites(report) else []
    return [*_SPEED, *originals, *_WORK, *inputs, *(_QUALITY if _judged(report) else [])]


FORMATS: dict[str, Callable[[Report], str]] = {"md": markdown, "csv": _csv, "json": _json, "jsonl": _jsonl}


def render(report: Report, form: str) -> str:
    """The report as `md`, `csv`, `json` (one object on one line) or `jsonl` (a row per line)."""
    return FORMATS[form](report)
