"""A benchmark's rows as a Markdown table, CSV, JSON lines, or one JSON object.

The JSON object has flat keys, `METRIC_SIDE`, so that a script can pick one figure, and `rows` with all.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence

from hotcold.eval.results import Report, Row, Spread
from hotcold.eval.roofline import PARTS
from hotcold.json_file import json_text

__all__ = ["FORMATS", "as_json_object", "markdown", "render"]

_DASH = "–"


def _csv(report: Report) -> str:
    rows = [_flat(row) for row in report.rows]
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().rstrip("\n")


def _jsonl(report: Report) -> str:
    shared = {
        "bandwidth_gb_s": report.bandwidth.median,
        "bandwidth_asking_gb_s": report.bandwidth_asking.median,
        **report.settings,
        "machine": dict(report.machine),
    }
    return "\n".join(json_text({**_flat(row), **shared}) for row in report.rows)


def _json(report: Report) -> str:
    return json_text(as_json_object(report))


def _flat(row: Row) -> dict[str, object]:
    """One row with plain values; what was not measured is None, never NaN, which is no JSON."""
    activity, quality = row.activity, row.quality
    values = {
        "side": row.side,
        **_spread("pp_tok_s", row.prompt),
        **_spread("tok_s", row.generation),
        **_spread("ratio_pp", row.ratio_prompt),
        **_spread("ratio", row.ratio),
        "bytes_per_token": row.roofline.bytes_per_token,
        **{f"bytes_{part}": row.roofline.parts[part] for part in PARTS},
        "gb_s": row.roofline.gb_s(row.generation.median),
        **_spread("bandwidth_share", row.share),
        "ceiling_tok_s": row.roofline.ceiling,
        "sparsity": activity and activity.sparsity,
        "predicted_sparsity": activity and activity.predicted_sparsity,
        "recall": activity and activity.recall,
        "ppl": quality and quality.ppl,
        "ppl_stderr": quality and quality.stderr,
        "same_top": quality and quality.same_top,
        "kl": quality and quality.kl,
    }
    return {key: None if _is_nan(value) else value for key, value in values.items()}


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _spread(name: str, spread: Spread) -> dict[str, float]:
    return {name: spread.median, f"{name}_low": spread.low, f"{name}_high": spread.high}


def _key(side: str) -> str:
    """`llama.cpp (smallthinker)` -> `llama_cpp_smallthinker`."""
    return "_".join("".join(c if c.isalnum() else " " for c in side).split())


def as_json_object(report: Report) -> dict[str, object]:
    """Flat keys `METRIC_SIDE` for every side; `llama_cpp` stands for the fastest of llama.cpp's files.

    `sparsity` is that of exact mode where it was run: the true one. `recall` and `predicted_sparsity` are
    those of predicted mode.
    """
    rows = {row.side: _flat(row) for row in report.rows}
    flat: dict[str, object] = {}
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
        "bandwidth_gb_s": report.bandwidth.median,
        "bandwidth_asking_gb_s": report.bandwidth_asking.median,
        "rows": list(rows.values()),
        "machine": dict(report.machine),
    }


def _llama_cpp(report: Report, rows: Mapping[str, dict[str, object]]) -> dict[str, object]:
    """llama.cpp at its best: speeds of its fastest files, perplexity of the one that is like ours."""
    prompt = rows[report.baseline_prompt]
    judged = (rows[row.side] for row in report.rows if row.activity is None and row.quality is not None)
    return {
        **rows[report.baseline],
        **{metric: prompt[metric] for metric in prompt if metric.startswith(("pp_tok_s", "ratio_pp"))},
        **{metric: row[metric] for row in judged for metric in ("ppl", "ppl_stderr")},
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
        _table(_SPEED, report.rows),
        "",
        "t/s: median (smallest–largest) of the rounds. Ratios: medians of the rounds' own, of prompts to "
        f"{report.baseline_prompt}, of generation to {report.baseline}. Shares of bandwidth: medians "
        "of the rounds', each of what was measured beside the run.",
        "",
        _table(_BYTES, report.rows),
        "",
        f"Read bandwidth in the same minutes: {_gb_s(report.bandwidth)} with plain loads, which the shares "
        f"are of; {_gb_s(report.bandwidth_asking)} when memory is asked ahead of them.",
        f"{settings}; {machine}",
    ]
    return "\n".join(lines)


_Column = tuple[str, Callable[[Row], str]]


def _table(columns: Sequence[_Column], rows: Sequence[Row]) -> str:
    """Padded, so that it reads as well on a terminal."""
    cells = [[name for name, _ in columns]] + [[show(row) for _, show in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        padded = [text.rjust(width) for text, width in zip(texts, widths, strict=True)]
        return f"| {' | '.join([texts[0].ljust(widths[0]), *padded[1:]])} |"

    rule = [f":{'-' * (widths[0] + 1)}", *(f"{'-' * (width + 1)}:" for width in widths[1:])]
    return "\n".join([line(cells[0]), f"|{'|'.join(rule)}|", *map(line, cells[1:])])


def _number(value: float | None, form: str = ".2f") -> str:
    return _DASH if value is None or math.isnan(value) else f"{value:{form}}"


def _percent(value: float | None) -> str:
    return _number(value, ".1%")


def _show_spread(spread: Spread) -> str:
    return f"{spread.median:.1f} ({spread.low:.1f}–{spread.high:.1f})"


def _show_ppl(row: Row) -> str:
    return f"{row.quality.ppl:.2f} ± {row.quality.stderr:.2f}" if row.quality else _DASH


def _megabytes(part: str) -> Callable[[Row], str]:
    return lambda row: _number(row.roofline.parts[part] / 1e6, ".1f")


_SPEED: list[_Column] = [
    ("side", lambda row: row.side),
    ("prompt t/s", lambda row: _show_spread(row.prompt)),
    ("ratio", lambda row: f"{row.ratio_prompt.median:.2f}x"),
    ("generate t/s", lambda row: _show_spread(row.generation)),
    ("ratio", lambda row: f"{row.ratio.median:.2f}x"),
    ("MB/token", lambda row: _number(row.roofline.bytes_per_token / 1e6, ".1f")),
    ("GB/s", lambda row: _number(row.roofline.gb_s(row.generation.median), ".1f")),
    ("of bandwidth", lambda row: _percent(row.share.median)),
    ("sparsity", lambda row: _percent(row.activity and row.activity.sparsity)),
    ("predicted", lambda row: _percent(row.activity and row.activity.predicted_sparsity)),
    ("recall", lambda row: _percent(row.activity and row.activity.recall)),
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

FORMATS: dict[str, Callable[[Report], str]] = {"md": markdown, "csv": _csv, "json": _json, "jsonl": _jsonl}


def render(report: Report, form: str) -> str:
    """The report as `md`, `csv`, `json` (one object on one line) or `jsonl` (a row per line)."""
    return FORMATS[form](report)
