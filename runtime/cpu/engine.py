"""The CPU engine: a small Python face of the native one.

One call into C++ per token or block of tokens, with the GIL released; this file only checks, chooses the mode
and accounts for what was read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence as Many
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np

from hotcold.cpus import thread_count
from hotcold.errors import InputError, UnsupportedError
from hotcold.files.gguf_split import open_gguf
from hotcold.model.limits import check_tokens
from hotcold.runtime.bundle_files import ModelPath
from hotcold.runtime.context import check_context
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.cpu.load import load_model
from hotcold.runtime.engine import Engine, Sequence, check_context_size
from hotcold.runtime.stats import Stats

__all__ = ["CpuEngine", "check_input_sparsity"]


class CpuEngine(Engine):
    """A model packed for the CPU."""

    def __init__(
        self,
        path: str | Path,
        mode: str,
        n_threads: int | None = None,
        n_ctx: int = 2048,
        *,
        input_rows: str | Path | None = None,
        input_sparsity: float = 0.0,
    ) -> None:
        """Pack the GGUF file `path` for `mode` (`dense`, `exact` or `predicted`).

        `input_rows` is the bundle's file of matrices by input: those of the sites where the model has rules
        for its inputs, or what `hotcold export --attention-rows` wrote. From the latter the attention
        matrices leave out `input_sparsity`, that share of their inputs, the smallest ones, for each token but
        the first.
        `n_threads` is at most the number of CPUs that this process may use, which is the default. The kernels
        are the best that the CPU runs, or those that the environment variable HOTCOLD_CPU_ISA names. Raises
        InputError, FormatError, UnsupportedError.
        """
        check_context_size(n_ctx)
        check_input_sparsity(input_sparsity)
        if input_sparsity and input_rows is None:
            raise _no_rows(path)
        self.mode, self.n_ctx, self.input_sparsity = mode, n_ctx, input_sparsity
        self.n_threads = thread_count(n_threads)
        file, rows = open_gguf(path), None if input_rows is None else open_gguf(input_rows)
        self.model, self.shape = load_model(file, mode, self.n_threads, n_ctx, _isa(), rows)
        if input_sparsity and self.shape.inputs:
            raise _has_rules(path)
        self.model.input_sparsity = input_sparsity
        self.n_vocab = self.shape.n_vocab
        self._context_checked = partial(check_context, file, self.shape)
        self._open_first()

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        mode: str = "auto",
        n_threads: int | None = None,
        n_ctx: int = 2048,
        input_sparsity: float = 0.0,
    ) -> Self:
        """Open a bundle folder, or one GGUF file.

        `dense` reads the file that stock llama.cpp runs, `exact` and `predicted` the one by neurons; `auto`
        is the fastest on this machine of those that the model offers, measured once and remembered.
        `input_sparsity` takes a bundle that has the attention matrices by input, and no rules of its own.
        Raises InputError for a mode that the model does not offer, and what the constructor raises.
        """
        check_input_sparsity(input_sparsity)
        model = ModelPath(bundle)
        rows = model.input_rows(any_share=bool(input_sparsity))
        if input_sparsity and rows is None:
            raise _no_rows(bundle)
        if mode == "auto":
            from hotcold.runtime.auto_mode import choose_mode

            mode = choose_mode(model, n_threads)
        path = model.file_for(mode)
        return cls(path, mode, n_threads, n_ctx, input_rows=rows, input_sparsity=input_sparsity)

    @property
    def isa(self) -> str:
        """Name of the kernels in use."""
        return self.model.isa

    def _open(self, engine: Self, n_ctx: int) -> CpuSequence:
        return CpuSequence(engine, n_ctx)

    def _check_context(self, n_ctx: int) -> None:
        self._context_checked(n_ctx)


class CpuSequence(Sequence):
    """One text on the CPU. Its cache is taken by the first token."""

    def __init__(self, engine: CpuEngine, n_ctx: int) -> None:
        self._engine, self.mode, self.n_ctx, self.n_vocab = engine, engine.mode, n_ctx, engine.n_vocab
        self._native = _cpu.Sequence(engine.model, n_ctx)

    @property
    def position(self) -> int:
        return self._native.position

    @property
    def audit(self) -> bool:
        return self._native.audit

    @audit.setter
    def audit(self, on: bool) -> None:
        self._native.audit = on

    def prefill(self, ids: Many[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        tokens = np.ascontiguousarray(ids, np.int32)
        check_tokens(tokens, self.position, self.n_ctx, self.n_vocab)
        return self._native.forward(tokens, all_logits)

    def reset(self) -> None:
        self._native.position = 0

    def reset_stats(self) -> None:
        self._native.reset_stats()

    def stats(self) -> Stats:
        return self._stats_of(self._native.stats())

    def _stats_of(self, counts: dict[str, Any]) -> Stats:
        fired, predicted, missed = (
            np.asarray(counts[name], np.int64) for name in ("fired", "predicted", "missed")
        )
        inputs = {site: (seen, kept) for site, (_, seen, kept) in counts["inputs"].items() if seen}
        sizes = counts["tokens"], self._engine.shape.d_ff
        return Stats(*sizes, fired, predicted, missed, audit=self.audit, inputs=inputs)

    def bytes_per_token(self, position: int | None = None) -> dict[str, float]:
        sizes, shape, counts = self._engine.model.sizes(), self._engine.shape, self._native.stats()
        stats, tokens = self._stats_of(counts), max(counts["tokens"], 1)
        by_input = {site: part[0] / tokens for site, part in counts["inputs"].items()}
        all_neurons = tokens * shape.n_layers * shape.d_ff
        fired = stats.fired.sum() / all_neurons if self.mode != "dense" else 1.0
        predicted = stats.predicted.sum() / all_neurons if self.mode == "predicted" else 1.0
        down = fired
        if self.mode != "dense" and "down" in stats.inputs:
            down = stats.inputs["down"][1] / stats.inputs["down"][0]
        neurons = predicted * sizes["gate"] + fired * sizes["up"] + down * sizes["down"]
        position = self.position if position is None else position
        return {
            "attention": sizes["attention"] + by_input["qkv"] + by_input["o"],
            "predictor": float(sizes["predictor"]),
            "ffn": float(neurons + by_input["gate_up"] + by_input["down"]),
            "head": float(sizes["head"]),
            "kv": float(2 * 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * position),
            "other": float(4 * shape.d_model * (2 * shape.n_layers + 1)),
        }


def check_input_sparsity(share: float) -> None:
    """Raise InputError unless it is a share of inputs that can be left out."""
    if not 0 <= share < 1:
        raise InputError("--input-sparsity out of range", got=share, expected="0 to 1, less than 1")


def _no_rows(path: str | Path) -> InputError:
    what = "to leave inputs out takes a bundle with the attention matrices by input"
    return InputError(what, where=path, fix="create one with `hotcold export --attention-rows`")


def _has_rules(path: str | Path) -> InputError:
    what = "the model leaves inputs out by its own rules"
    return InputError(what, where=path, fix="run it without --input-sparsity")


def _isa() -> str | None:
    name = os.environ.get("HOTCOLD_CPU_ISA")
    known = _cpu.available_isas()
    if name and name not in known:
        raise UnsupportedError(
            "HOTCOLD_CPU_ISA names kernels that this CPU does not run", got=name, expected=", ".join(known)
        )
    return name
