"""Decoding speed with a GPU: all on the device, or shared with the CPU at several memory budgets.

Sides are loaded one after the other, because two of them may not fit. A machine with a GPU is assumed to be
quiet, and the spread over the rounds shows whether it was. Every side decodes the same text, fed token by
token. Peak memory is what torch's allocator held at most; the plan's is what `runtime/placement/` expected,
and for accelerate the weights that stay on the device.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hotcold import table
from hotcold.errors import HotcoldError, InputError
from hotcold.eval.bench import Segment
from hotcold.eval.peers.llama_cpp import LlamaCpp
from hotcold.eval.results import Spread
from hotcold.files.gguf_split import open_gguf
from hotcold.progress import Progress, log
from hotcold.runtime.backends import BackendOptions, make_placement, open_engine
from hotcold.runtime.bundle_files import file_of_role
from hotcold.runtime.gpu.device import memory_or_error, open_devices

__all__ = ["PEERS", "GpuRow", "GpuSide", "bench_gpu", "sides_of"]

PEERS = ("llama.cpp", "accelerate")


@dataclass(frozen=True, slots=True)
class GpuSide:
    """What is measured: a backend in a mode. `budget` is in bytes, for all but `gpu`."""

    backend: str  # gpu, hybrid, or one of PEERS
    mode: str
    budget: int | None = None
    share: float | None = None  # of the model's bytes, if the budget is that

    @property
    def name(self) -> str:
        """Its name in the table."""
        at = f" {self.share:.0%}" if self.share is not None else ""
        return f"{self.backend}{at} {self.mode}".strip()


@dataclass(frozen=True, slots=True)
class GpuRow:
    """What one side did. Speeds in tokens/s, sizes in bytes; what a side does not report is None.

    For a side that could not run, only `error` is set.
    """

    side: GpuSide
    prompt: Spread | None = None
    generation: Spread | None = None
    bytes_per_token: float | None = None
    bandwidth_share: float | None = None  # of the device's, `gpu` alone
    sparsity: float | None = None
    peak_bytes: int | None = None
    planned_bytes: int | None = None
    expected_tok_s: float | None = None
    telemetry: dict[str, float] | None = None
    error: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"name": self.side.name}


def sides_of(
    bundle: str | Path, backends: Sequence[str], modes: Sequence[str], shares: Sequence[float]
) -> list[GpuSide]:
    """All sides: each mode on the GPU alone, and at each share of the model's bytes each mode of `hybrid`.

    `dense` is among the hybrid modes as the baseline: whole layers on either side. InputError for unknown
    names.
    """
    known = ("gpu", "hybrid", *PEERS)
    for backend in backends:
        if backend not in known:
            raise InputError("unknown backend", got=backend, expected=" | ".join(known))
    total = sum(t.data.nbytes for t in open_gguf(file_of_role(bundle, "dense")).tensors.values())
    sides = [GpuSide("gpu", mode) for mode in modes] if "gpu" in backends else []
    for share in shares if set(backends) - {"gpu"} else ():
        budget = int(share * total)
        sides += [GpuSide(peer, "", budget, share) for peer in PEERS if peer in backends]
        if "hybrid" in backends:
            sides += [GpuSide("hybrid", mode, budget, share) for mode in modes]
    return sides


def bench_gpu(
    bundle: str | Path,
    sides: Sequence[GpuSide],
    texts: Sequence[Segment],
    *,
    device: str,
    n_threads: int,
    bandwidth: float,
) -> list[GpuRow]:
    """Measure all sides on `texts`; `bandwidth` is the device's, in bytes per second.

    A side that cannot run, for example for lack of memory, does not affect the others; if none can, the last
    one raises.
    """
    n_ctx = max(len(text.prompt) + len(text.generated) for text in texts)
    rows = []
    with Progress("bench", total=len(sides) * len(texts), unit="run") as progress:
        for side in sides:
            try:
                with memory_or_error(open_devices(device)[0]):
                    row = _measure(bundle, side, texts, device, n_threads, n_ctx, bandwidth, progress)
            except HotcoldError as error:
                if side is sides[-1] and all(row.error for row in rows):
                    raise
                log(f"{side.name}: {error}")
                row = GpuRow(side, error=str(error))
            rows.append(row)
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return rows


def _measure(
    bundle: str | Path,
    side: GpuSide,
    texts: Sequence[Segment],
    device: str,
    n_threads: int,
    n_ctx: int,
    bandwidth: float,
    progress: Progress,
) -> GpuRow:
    if side.backend == "llama.cpp":
        return _time(side, _llama_cpp(bundle, side, device, n_threads, n_ctx), texts, progress)
    _forget_peak(device)
    if side.backend == "accelerate":
        return _time_accelerate(bundle, side, device, texts, progress)
    options = BackendOptions(side.backend, device, f"{side.budget}B" if side.budget else "auto")
    engine = open_engine(bundle, side.mode, n_threads, n_ctx, options)
    row = _time(side, engine, texts, progress)
    per_token = sum(engine.bytes_per_token(texts[0].middle).values())
    stats = engine.stats()
    placement, measured = (getattr(engine, name, None) for name in ("placement", "measured"))  # of a hybrid
    return replace(
        row,
        bytes_per_token=per_token,
        bandwidth_share=_share(row.generation, per_token, bandwidth) if side.backend == "gpu" else None,
        sparsity=None if side.mode == "dense" or math.isnan(stats.sparsity) else stats.sparsity,
        peak_bytes=_peak(device),
        planned_bytes=placement.device_bytes if placement else None,
        expected_tok_s=placement.tokens_per_second if placement else None,
        telemetry=measured().as_json() if measured else None,
    )


def _time(side: GpuSide, engine: Any, texts: Sequence[Segment], progress: Progress) -> GpuRow:
    """One run that compiles and records, then one per text."""
    _run(engine, texts[0])
    if hasattr(engine, "reset_stats"):
        engine.reset_stats()
    found = []
    for text in texts:
        found.append(_run(engine, text))
        progress.advance(1, side=side.name, tok_s=found[-1][1])
    prompts, generations = zip(*found, strict=True)
    return GpuRow(side, Spread.of(prompts), Spread.of(generations))


def _run(engine: Any, text: Segment) -> tuple[float, float]:
    """Tokens per second of the prompt and of the generation."""
    engine.reset()
    return (
        len(text.prompt) / _seconds(lambda: engine.prefill(text.prompt)),
        len(text.generated) / _seconds(lambda: [engine.decode(int(token)) for token in text.generated]),
    )


def _seconds(work: Callable[[], object]) -> float:
    """Logits come back to the host at every call, so that all of the work is inside."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _llama_cpp(bundle: str | Path, side: GpuSide, device: str, n_threads: int, n_ctx: int) -> LlamaCpp:
    """llama.cpp with as many layers on the GPU as fit the same budget by our own count."""
    options = BackendOptions("hybrid", device, f"{side.budget}B")
    plan = make_placement(bundle, "dense", n_threads, n_ctx, options)
    # It counts the output layer as one, which is the first to go there; our plan always has it there.
    n_layers = 1 + sum(layer.on_device for layer in plan.layers)
    path = file_of_role(bundle, "dense")
    return LlamaCpp(path, n_threads=n_threads, n_ctx=n_ctx, n_gpu_layers=n_layers)


def _time_accelerate(
    bundle: str | Path, side: GpuSide, device: str, texts: Sequence[Segment], progress: Progress
) -> GpuRow:
    """transformers with accelerate at the same budget, all of whose memory on the device is torch's."""
    from hotcold.eval.peers.offloading import Accelerate  # brings transformers, which no other side needs

    with closing(Accelerate(file_of_role(bundle, "dense"), device=device, budget=side.budget or 0)) as peer:
        row = _time(side, peer, texts, progress)
        return replace(row, peak_bytes=_peak(device), planned_bytes=peer.device_bytes)


def _share(generation: Spread | None, per_token: float, bandwidth: float) -> float | None:
    """Of the device's bandwidth, what the weights come to that were read."""
    return generation.median * per_token / bandwidth if generation else None


def _gpus(device: str) -> list[torch.device]:
    return [each for each in open_devices(device) if each.type == "cuda"]


def _forget_peak(device: str) -> None:
    for gpu in _gpus(device):
        torch.cuda.reset_peak_memory_stats(gpu)


def _peak(device: str) -> int | None:
    """Of several GPUs the sum."""
    return sum(map(torch.cuda.max_memory_allocated, _gpus(device))) or None


_HEAD = (
    "side", "prompt t/s", "generate t/s", "MB/token", "of bandwidth", "sparsity", "peak GiB", "planned GiB",
    "hot hits", "cold/token", "overlap", "KiB/token on the bus",
)  # fmt: skip


def as_table(rows: Sequence[GpuRow]) -> str:
    """The rows as a Markdown table."""
    lines = []
    for row in rows:
        told = row.telemetry or {}
        bus = told.get("bus_bytes_per_token")
        cells = [
            row.side.name,
            _spread(row.prompt),
            _spread(row.generation),
            _figure(row.bytes_per_token, 1e-6, ".1f"),
            _figure(row.bandwidth_share, 1, ".1%"),
            _figure(row.sparsity, 1, ".1%"),
            _figure(row.peak_bytes, 2**-30, ".2f"),
            _figure(row.planned_bytes, 2**-30, ".2f"),
            _figure(told.get("hot_hit_rate"), 1, ".1%"),
            _figure(told.get("cold_per_token"), 1, ".1f"),
            _figure(told.get("overlap"), 1, ".0%"),
            _figure(bus, 2**-10, ".1f"),
        ]
        lines.append(cells)
    errors = [f"\n{row.side.name}: {row.error}" for row in rows if row.error]
    return "\n".join([table.markdown(_HEAD, lines), *errors])


def _spread(spread: Spread | None) -> str:
    return "–" if spread is None else f"{spread.median:.1f} ({spread.low:.1f}–{spread.high:.1f})"


def _figure(value: float | None, scale: float, form: str) -> str:
    return "–" if value is None or not np.isfinite(value) else format(value * scale, form)
