"""The whole job on a small real model: from a SiLU checkpoint to speed and perplexity of its sparse self.

Every step is one of the commands that a user would give; `report.json` gathers what they measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hotcold import storage
from hotcold.eval.pipeline import Done, Step, run_steps
from hotcold.json_file import read_json
from hotcold.shipped import BASE, FILE

__all__ = ["build_report", "demo", "demo_steps", "summary"]

_BENCH = "bench.json"
_SIDES = {
    "llama_cpp": "sparse, llama.cpp",
    "dense": "sparse, hotcold dense",
    "exact": "sparse, hotcold exact",
    "predicted": "sparse, hotcold predicted",
}
_PROMPT = "A computer program is"
_SAMPLE_TOKENS = 64
_TRACE_TOKENS = 40_000  # about two minutes of collecting
_PPL_MODES = ("dense", "exact", "predicted", "llama.cpp")


def demo_steps(
    out: Path, *, model: str, quant: str, n_threads: int, from_scratch: bool = False
) -> list[Step]:
    """The commands of the demo, in order. `model` must be a GGUF file, or a name that stands for one.

    The FFNs that come with hotcold are taken where they fit, unless `from_scratch`.
    """
    trained = model == BASE and FILE.is_file() and not from_scratch
    method = "pretrained" if trained else "relu"
    sparse, traces, predictors, bundle = (out / name for name in ("sparse", "traces", "predictors", "bundle"))
    threads = ("-t", n_threads)
    modes = ("--mode", ",".join(_PPL_MODES), "--gguf", model)
    return [
        _step("sparsify", "--model", model, "--method", method, "--out", sparse, output=sparse),
        _step("collect-traces", "--model", sparse, "--tokens", _TRACE_TOKENS, "--out", traces, *threads,
              output=traces),
        _step("train-predictors", "--traces", traces, "--out", predictors, *threads, output=predictors),
        _step(
            "export", "--model", sparse, "--predictors", predictors, "--quant", quant, "--out", bundle,
            "--name", f"{Path(model).stem}-relu", output=bundle,
        ),
        _step("run", "--bundle", bundle, "-p", _PROMPT, "-n", _SAMPLE_TOKENS, "--temp", 0, *threads),
        _step("perplexity", "--bundle", bundle, *modes, *threads, "--json"),
        _step("bench", "--bundle", bundle, *threads, "--save", out / _BENCH, output=out / _BENCH),
    ]  # fmt: skip


def _step(command: str, *arguments: object, output: Path | None = None) -> Step:
    return Step(command, (command, *map(str, arguments)), output)


def demo(
    out: Path, *, model: str, quant: str, n_threads: int, from_scratch: bool = False
) -> dict[str, object]:
    """Run what is left of the demo in folder `out`, write `report.json` there and return it.

    Raises StepError where a step fails; a rerun goes on from there.
    """
    out.mkdir(parents=True, exist_ok=True)
    steps = demo_steps(out, model=model, quant=quant, n_threads=n_threads, from_scratch=from_scratch)
    done = run_steps(steps, out / "steps.jsonl")
    report = build_report(done, read_json(out / _BENCH), model=model, quant=quant)
    storage.write_json(out / "report.json", report)
    return report


def build_report(
    done: Mapping[str, Done], bench: Mapping[str, object], *, model: str, quant: str
) -> dict[str, object]:
    """One flat object of what the steps measured; perplexities are those of the perplexity step.

    `ppl_teacher` is that of `model` as it came, before anything was made sparse.
    """
    return {
        "model": model,
        "quant": quant,
        **bench,
        **_perplexities(done["perplexity"], teacher=model),
        "sample": done["run"].stdout,
        "seconds": {name: round(step.seconds, 1) for name, step in done.items()},
        "seconds_total": round(sum(step.seconds for step in done.values()), 1),
    }


def _perplexities(step: Done, teacher: str) -> dict[str, object]:
    found = [json.loads(line) for line in step.stdout.splitlines() if line.startswith("{")]
    figures: dict[str, object] = {"ppl_tokens": found[-1]["tokens"]}
    for entry in found:
        name = "teacher" if entry["mode"] == teacher else entry["mode"].replace(".", "_")
        figures |= {f"ppl_{name}": entry["ppl"], f"ppl_stderr_{name}": entry["stderr"]}
    return figures


def summary(report: Mapping[str, Any]) -> str:
    """The figures that matter, as a Markdown table."""
    rows = [("", "perplexity", "tokens/s", "ratio to llama.cpp"), ("---", "---:", "---:", "---:")]
    rows.append((f"{report['model']} as it came, llama.cpp", _ppl(report, "teacher"), "", ""))
    for side, name in _SIDES.items():
        speed, ratio = f"{report[f'tok_s_{side}']:.1f}", f"{report[f'ratio_{side}']:.2f}x"
        rows.append((name, _ppl(report, side), speed, ratio))
    shares = ("sparsity", "predicted_sparsity", "recall")
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", ", ".join(f"{name.replace('_', ' ')} {report[name]:.1%}" for name in shares)]
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["seconds"].items())
    return "\n".join([*lines, f"{times}; in all {report['seconds_total'] / 60:.1f} minutes"])


def _ppl(report: Mapping[str, Any], side: str) -> str:
    return f"{report[f'ppl_{side}']:.2f} ± {report[f'ppl_stderr_{side}']:.2f}"
