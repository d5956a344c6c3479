"""`--mode auto`: the fastest of the modes that a model offers, measured once per model and machine.

Which one wins depends on row length, sparsity, and memory bandwidth: predictors pay off on wide models and
cost more than they save on narrow ones. So it is measured. Since the modes round differently, the answer is
kept in the user's cache under the content of the model, hotcold's version, and the CPU. So greedy decoding
gives one text per model and machine, regardless of the number of threads at the first time.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hotcold import __version__, cache
from hotcold.cpuinfo import available_memory, cpu_name
from hotcold.errors import StorageError
from hotcold.files.gguf_split import open_gguf
from hotcold.progress import Progress, log
from hotcold.runtime.bundle_files import ModelPath
from hotcold.storage import write_json

if TYPE_CHECKING:
    from hotcold.runtime.engine import Engine

__all__ = ["choose_mode"]

_PROMPT, _TOKENS, _LEAST_TOKENS = 4, 24, 4  # of a pass: the prompt is not timed
_SAMPLE_SECONDS = 0.3  # a slow model gets shorter passes
_ROUNDS, _LEAST_ROUNDS, _SECONDS = 7, 3, 3.0  # the first round is not counted
_WAITING = "auto mode: another process is measuring this model; waiting for it"


def choose_mode(model: ModelPath, n_threads: int | None) -> str:
    """Choose one of the modes that the model offers, from the cache or from a measurement of a second or two,
    and log it with the reason."""
    if len(model.modes) == 1:
        mode = model.modes[0]
        log(f"auto mode: {mode}, the only mode that {model.name} offers")
        return mode
    record = _record(model)
    mode, speeds = _remembered(record, model.modes)
    when = "measured earlier"
    if not mode:
        with cache.exclusive(record.with_suffix(""), _WAITING, needed=False):
            mode, speeds = _remembered(
                record, model.modes
            )  # another process may have measured it in the meantime
            if not mode:
                mode, speeds, when = *_measured(model, n_threads, record), "measured now"
    told = ", ".join(f"{name} {speed:.1f}" for name, speed in speeds.items())
    log(f"auto mode: {mode}, the fastest ({told} tokens/s, {when} on this machine)")
    return mode


def _record(model: ModelPath) -> Path:
    isa = os.environ.get("HOTCOLD_CPU_ISA", "")
    key = cache.digest(model.content(), __version__, cpu_name(), isa)
    return cache.folder("auto-mode") / f"{key}.json"


def _remembered(record: Path, modes: Sequence[str]) -> tuple[str, dict[str, float]]:
    """The mode, or "", and tokens per second of each."""
    found = cache.read_record(record)
    mode, speeds = found.get("mode"), found.get("tok_s")
    speeds = speeds if isinstance(speeds, dict) else {}
    if not isinstance(mode, str) or mode not in modes:
        return "", {}
    return mode, {str(name): speed for name, speed in speeds.items() if isinstance(speed, int | float)}


def _measured(model: ModelPath, n_threads: int | None, record: Path) -> tuple[str, dict[str, float]]:
    speeds = _tokens_per_second(model, n_threads)
    mode = max(speeds, key=speeds.__getitem__)
    try:
        write_json(record, {"mode": mode, "tok_s": speeds, "source": str(model.path)})
    except StorageError as error:
        log(f"auto mode: could not save the result: {error}")
    return mode, speeds


def _tokens_per_second(model: ModelPath, n_threads: int | None) -> dict[str, float]:
    """Medians of passes over the same tokens, in turns, so that a busy moment affects all modes."""
    groups = [model.modes] if _fit(model) else [[mode] for mode in model.modes]
    races = [_race(_open(model, modes, n_threads)) for modes in groups]
    return {mode: speed for race in races for mode, speed in race.items()}


def _fit(model: ModelPath) -> bool:
    """Whether the weights of all modes fit in half of the free memory together."""
    files = [path for mode in model.modes for path in open_gguf(model.file_for(mode)).paths]
    return 2 * sum(path.stat().st_size for path in files) < available_memory()


def _open(model: ModelPath, modes: Sequence[str], n_threads: int | None) -> dict[str, Engine]:
    from hotcold.runtime.cpu.engine import CpuEngine

    log(f"auto mode: measuring {', '.join(modes)} for {model.name}, once per machine")
    n_ctx = _PROMPT + _TOKENS
    rows = model.input_rows(any_share=False)
    return {mode: CpuEngine(model.file_for(mode), mode, n_threads, n_ctx, input_rows=rows) for mode in modes}


def _race(engines: dict[str, Engine]) -> dict[str, float]:
    ids = _sample(next(iter(engines.values())))
    found: dict[str, list[float]] = {mode: [] for mode in engines}
    end = time.monotonic() + _SECONDS
    with Progress("auto mode", total=_ROUNDS * len(engines), unit="pass") as progress:
        for number in range(_ROUNDS):
            if number > _LEAST_ROUNDS and time.monotonic() > end:
                break
            for mode in list(engines)[:: -1 if number % 2 else 1]:
                found[mode].append(_pass(engines[mode], ids))
                progress.advance(1)
    return {mode: len(ids[_PROMPT:]) / statistics.median(seconds[1:]) for mode, seconds in found.items()}


def _sample(engine: Engine) -> np.ndarray:
    """Greedy text from a fixed start: what the model says itself is closer to real use than random tokens."""
    ids = [at % engine.n_vocab for at in range(_PROMPT)]
    logits, end = engine.prefill(ids), time.monotonic() + _SAMPLE_SECONDS
    for number in range(_TOKENS):
        if number >= _LEAST_TOKENS and time.monotonic() > end:
            break
        ids.append(int(logits.argmax()))
        logits = engine.decode(ids[-1])
    return np.array(ids, np.int32)


def _pass(engine: Engine, ids: np.ndarray) -> float:
    """Seconds to decode the tokens after the prompt."""
    engine.reset()
    engine.prefill(ids[:_PROMPT])
    start = time.perf_counter()
    for token in ids[_PROMPT:]:
        engine.decode(int(token))
    return time.perf_counter() - start
