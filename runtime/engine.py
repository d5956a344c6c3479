"""The native CPU engine behind a small Python face: load a bundle, feed tokens, read logits and counts.

One call into C++ per token or block of tokens, with the GIL released; this file only checks, chooses the mode
and accounts for what was read.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np

from hotcold.cpus import thread_count
from hotcold.errors import InputError, UnsupportedError
from hotcold.files.gguf_split import open_gguf
from hotcold.model.inputs import rules_of_file
from hotcold.model.limits import check_tokens
from hotcold.runtime.bundle_files import ModelPath
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.cpu.load import load_model
from hotcold.runtime.stats import Stats

__all__ = ["Engine", "check_input_sparsity"]

_MOST_TOKENS = (1 << 31) - 1  # the native engine counts in 32 bits


class Engine:
    """One sequence of tokens through a model on the CPU."""

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
        if not 1 <= n_ctx <= _MOST_TOKENS:
            expected = f"1 to {_MOST_TOKENS} tokens"
            raise InputError("no such size of a context", got=n_ctx, expected=expected, fix="change -c")
        check_input_sparsity(input_sparsity)
        if input_sparsity and input_rows is None:
            raise _no_rows(path)
        self.mode, self.n_ctx, self.input_sparsity = mode, n_ctx, input_sparsity
        self.n_threads = thread_count(n_threads)
        file, rows = open_gguf(path), None if input_rows is None else open_gguf(input_rows)
        self._model, self._shape = load_model(file, mode, self.n_threads, n_ctx, _isa(), rows)
        if input_sparsity and rules_of_file(file, self._shape.n_layers):
            raise _has_rules(path)
        self._model.input_sparsity = input_sparsity
        self.n_vocab = self._shape.n_vocab

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
        return self._model.isa

    @property
    def position(self) -> int:
        """Number of tokens in the cache."""
        return self._model.position

    @property
    def audit(self) -> bool:
        """Predicted mode: also compute the gates that were left out, to count the misses. Costs speed."""
        return self._model.audit

    @audit.setter
    def audit(self, on: bool) -> None:
        self._model.audit = on

    def reset(self) -> None:
        """Forget all tokens."""
        self._model.position = 0

    def prefill(self, ids: Sequence[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Append tokens; logits after the last one, float32 [n_vocab], or after each, [len(ids), n_vocab]."""
        tokens = np.ascontiguousarray(ids, np.int32)
        check_tokens(tokens, self.position, self.n_ctx, self.n_vocab)
        return self._model.forward(tokens, all_logits)

    def decode(self, token: int) -> np.ndarray:
        """Append one token; logits of the next one, float32 [n_vocab]."""
        return self.prefill([token])

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._model.reset_stats()

    def stats(self) -> Stats:
        """What was computed since `reset_stats()`."""
        counts = self._model.stats()
        fired, predicted, missed = (
            np.asarray(counts[name], np.int64) for name in ("fired", "predicted", "missed")
        )
        inputs = {site: (seen, kept) for site, (_, seen, kept) in counts["inputs"].items() if seen}
        return Stats(
            counts["tokens"], self._shape.d_ff, fired, predicted, missed, audit=self.audit, inputs=inputs
        )

    def bytes_per_token(self, position: int | None = None) -> dict[str, float]:
        """Bytes that one decoded token needs, by part, at a cache position (default: the present one).

        Panels are read whole. Of matrices by input and of neuron rows counts what the tokens since
        `reset_stats()` needed, without padding to cache lines: inputs that were not left out, gate rows of
        predicted neurons, up and down rows of fired ones.
        """
        sizes, shape, stats = self._model.sizes(), self._shape, self.stats()
        tokens = max(stats.tokens, 1)
        by_input = {site: part[0] / tokens for site, part in self._model.stats()["inputs"].items()}
        all_neurons = tokens * shape.n_layers * shape.d_ff
        fired = stats.fired.sum() / all_neurons if self.mode != "dense" else 1.0
        predicted = stats.predicted.sum() / all_neurons if self.mode == "predicted" else 1.0
        down = fired
        if self.mode != "dense" and "down" in stats.inputs:
            down = stats.inputs["down"][1] / stats.inputs["down"][0]
        position = self.position if position is None else position
        return {
            "attention": sizes["attention"] + by_input["qkv"] + by_input["o"],
            "predictor": float(sizes["predictor"]),
            "ffn": predicted * sizes["gate"]
            + fired * sizes["up"]
            + down * sizes["down"]
            + by_input["gate_up"]
            + by_input["down"],
            "head": float(sizes["head"]),
            "kv": float(2 * 2 * shape.n_layers * shape.n_kv_heads * shape.head_dim * position),
            "other": float(4 * shape.d_model * (2 * shape.n_layers + 1)),
        }


def check_input_sparsity(share: float) -> None:
    """Raise InputError unless it is a share of inputs that can be left out."""
    if not 0 <= share < 1:
        raise InputError("no such share of inputs", got=share, expected="0 to 1, less than 1")


def _no_rows(path: str | Path) -> InputError:
    what = "to leave inputs out takes a bundle with the attention matrices by input"
    return InputError(what, where=path, fix="`hotcold export --attention-rows` writes one")


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
