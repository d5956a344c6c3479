"""The whole job on a small real model, from a SiLU checkpoint to the speed and perplexity of its sparse
version.

Every step is a command that a user would run; `report.json` gathers what they measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hotcold import storage
from hotcold.eval.demo.pipeline import Done, Step, run_steps
from hotcold.files.json import read_json
from hotcold.identify import FIRST, REPORT, mark
from hotcold.ownership import check_file, check_growing
from hotcold.shipped import BASE, FILE

__all__ = ["build_report", "demo", "demo_steps", "summary"]

_BENCH, _REPORT = "bench.json", "report.json"
# What the table has, by the names that the figures have in the report.
_AS_IT_CAME, _DENSE = "as_it_came_llama_cpp", "original_dense"
_ROWS = {
    _AS_IT_CAME: "{model} as it came, llama.cpp",
    "original_llama_cpp": "{model} as {quant}, llama.cpp",
    _DENSE: "{model} as {quant}, hotcold dense",
    "llama_cpp": "sparse, llama.cpp",
    "dense": "sparse, hotcold dense",
    "exact": "sparse, hotcold exact",
    "predicted": "sparse, hotcold predicted",
}
_SPARSE = ("dense", "exact", "predicted")
_HEAD = ("", "perplexity", "tokens/s", "to the original in llama.cpp", "added by sparsity")
_NOTES = (
    "To the original in llama.cpp: tokens/s over those of the first row. Added by sparsity: over those of "
    "the original at the same bits in hotcold dense; what is before that is the engine's. In brackets 95% "
    "confidence intervals. Perplexities are of text that nothing was trained on and no threshold chosen by.",
    "exact and dense of one bundle differ in perplexity since down is quantized along two axes: by neuron in "
    "the sparse file, by output in the dense one.",
)
_PROMPT = "A computer program is"
_SAMPLE_TOKENS = 64
_TRACE_TOKENS = 40_000  # about two minutes of collecting
_PPL_MODES = ("dense", "exact", "predicted", "llama.cpp")


def demo_steps(
    out: Path, *, model: str, quant: str, n_threads: int, from_scratch: bool = False
) -> list[Step]:
    """The commands of the demo, in order. `model` must be a GGUF file, or a name that stands for one.

    The FFNs that come with hotcold are used if they fit the model, unless `from_scratch`.
    """
    trained = model == BASE and FILE.is_file() and not from_scratch
    method = "pretrained" if trained else "relu"
    sparse, traces, predictors, bundle = (out / name for name in ("sparse", "traces", "predictors", "bundle"))
    original, name, threads = out / "original", Path(model).stem, ("-t", n_threads)
    modes = ("--mode", ",".join(_PPL_MODES), "--gguf", model)
    return [
        _step("sparsify", "--model", model, "--method", method, "--out", sparse, output=sparse),
        _step("collect-traces", "--model", sparse, "--tokens", _TRACE_TOKENS, "--out", traces, *threads,
              output=traces),
        _step("train-predictors", "--traces", traces, "--out", predictors, *threads, output=predictors),
        _step(
            "export", "--model", sparse, "--predictors", predictors, "--quant", quant, "--out", bundle,
            "--name", f"{name}-relu", output=bundle,
        ),
        _step(
            "export", "--model", model, "--quant", quant, "--out", original, "--name", name, output=original,
            name="export original",
        ),
        _step("run", "--bundle", bundle, "-p", _PROMPT, "-n", _SAMPLE_TOKENS, "--temp", 0, *threads),
        _step("perplexity", "--bundle", bundle, *modes, *threads, "--json"),
        _step("perplexity", "--bundle", original, "--mode", "dense,llama.cpp", *threads, "--json",
              name="perplexity original"),
        _step(
            "bench", "--bundle", bundle, "--original", original, "--gguf", model, "--quality-tokens", 0,
            *threads, "--save", out / _BENCH, output=out / _BENCH,
        ),
    ]  # fmt: skip


def _step(command: str, *arguments: object, output: Path | None = None, name: str | None = None) -> Step:
    return Step(name or command, (command, *map(str, arguments)), output)


def demo(
    out: Path, *, model: str, quant: str, n_threads: int, from_scratch: bool = False
) -> dict[str, object]:
    """Run what is left of the demo in folder `out`, write `report.json` there and return it.

    Raises StepError if a step fails; a rerun goes on from there. StorageError if `out` is none.
    """
    check_growing(out, "demo")
    if not (out / FIRST["demo"]).exists():
        storage.write_json(out / FIRST["demo"], mark("demo"))
    check_file(out / _REPORT, "report")
    steps = demo_steps(out, model=model, quant=quant, n_threads=n_threads, from_scratch=from_scratch)
    done = run_steps(steps, out / "steps.jsonl")
    report = build_report(done, read_json(out / _BENCH), model=model, quant=quant)
    storage.write_json(out / _REPORT, REPORT | report)
    return report


def build_report(
    done: Mapping[str, Done], bench: Mapping[str, object], *, model: str, quant: str
) -> dict[str, object]:
    """One flat object of what the steps measured; perplexities are those of the perplexity steps.

    A figure's name ends in its side: `as_it_came_llama_cpp` is `model` before anything was made sparse,
    `original_llama_cpp` and `original_dense` the same rounded to `quant`, as all the other sides are.
    """
    return {
        "model": model,
        "quant": quant,
        **bench,
        **_perplexities(done["perplexity original"], model, prefix="original_"),
        **_perplexities(done["perplexity"], model),
        "sample": done["run"].stdout,
        "seconds": {name: round(step.seconds, 1) for name, step in done.items()},
        "seconds_total": round(sum(step.seconds for step in done.values()), 1),
    }


def _perplexities(step: Done, model: str, prefix: str = "") -> dict[str, object]:
    found = [json.loads(line) for line in step.stdout.splitlines() if line.startswith("{")]
    figures: dict[str, object] = {"ppl_tokens": found[-1]["tokens"]}
    for entry in found:
        name = _AS_IT_CAME if entry["mode"] == model else prefix + entry["mode"].replace(".", "_")
        figures |= {f"ppl_{name}": entry["ppl"], f"ppl_stderr_{name}": entry["stderr"]}
    return figures


def summary(report: Mapping[str, Any]) -> str:
    """The figures that matter, as a Markdown table, and what they mean."""
    rows = [_HEAD, ("---", "---:", "---:", "---:", "---:")]
    for side, name in _ROWS.items():
        label = name.format(model=report["model"], quant=report["quant"].upper())
        added = _ratio(report, f"ratio_to_{_DENSE}", side) if side in _SPARSE else ""
        speed = f"{report[f'tok_s_{side}']:.1f}"
        rows.append(
            (label, _ppl(report, side), speed, _ratio(report, f"ratio_to_{_AS_IT_CAME}", side), added)
        )
    shares = ("sparsity", "predicted_sparsity", "recall")
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += [
        "",
        ", ".join(f"{name.replace('_', ' ')} {report[name]:.1%}" for name in shares),
        _price(report),
    ]
    lines += ["", *_NOTES, ""]
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["seconds"].items())
    return "\n".join([*lines, f"{times}; in all {report['seconds_total'] / 60:.1f} minutes"])


def _ppl(report: Mapping[str, Any], side: str) -> str:
    return f"{report[f'ppl_{side}']:.2f} ± {report[f'ppl_stderr_{side}']:.2f}"


def _ratio(report: Mapping[str, Any], name: str, side: str) -> str:
    low, high = report[f"{name}_ci_low_{side}"], report[f"{name}_ci_high_{side}"]
    interval = f" ({low:.2f}–{high:.2f})" if low is not None and low < high else ""
    return f"{report[f'{name}_{side}']:.2f}x{interval}"


def _price(report: Mapping[str, Any]) -> str:
    """What sparsity costs, against both originals."""

    def times(side: str, of: str) -> str:
        return f"{report[f'ppl_{side}'] / report[f'ppl_{of}']:.2f}x"

    costs = (
        f"{side} {times(side, _AS_IT_CAME)} the original as it came, {times(side, _DENSE)} the original as "
        f"{report['quant'].upper()}"
        for side in ("exact", "predicted")
    )
    return f"price in perplexity: {'; '.join(costs)}"
