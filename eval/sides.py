"""One interface for everything that is measured: an engine with a stopwatch.

A side is hotcold in one mode, or llama.cpp. `seconds` grows only while the engine computes, so that preparing
batches and reading logits is not counted.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from hotcold.errors import InputError
from hotcold.runtime.bundle_files import ModelPath

if TYPE_CHECKING:
    from hotcold.runtime.engine import Engine

__all__ = [
    "LLAMA_CPP",
    "MODES",
    "EngineSide",
    "Peer",
    "Side",
    "check_offered",
    "checked_modes",
    "chosen_modes",
    "open_llama_cpp",
    "open_ours",
    "open_peers",
    "open_side",
    "side_name",
]

LLAMA_CPP = "llama.cpp"
MODES = ("dense", "exact", "predicted", "auto")


class Side(Protocol):
    """What a benchmark needs from an engine. Ids are integers, logits float32."""

    n_vocab: int
    n_ctx: int
    seconds: float

    def reset(self) -> None:
        """Forget the sequence and set `seconds` to zero."""
        ...

    def prefill(self, ids: Sequence[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        """Logits [n_vocab] after the block, or [len(ids), n_vocab]."""
        ...

    def decode(self, token: int) -> np.ndarray:
        """Logits [n_vocab] after one more token."""
        ...


class Peer(Side, Protocol):
    """A side that is not ours; `path` is the dense file that it reads."""

    path: Path


class EngineSide:
    """hotcold's engine with a stopwatch; `engine` gives its statistics."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.n_vocab, self.n_ctx = engine.n_vocab, engine.n_ctx
        self.seconds = 0.0

    def reset(self) -> None:
        self.engine.reset()
        self.seconds = 0.0

    def prefill(self, ids: Sequence[int] | np.ndarray, all_logits: bool = False) -> np.ndarray:
        start = time.perf_counter()
        logits = self.engine.prefill(ids, all_logits=all_logits)
        self.seconds += time.perf_counter() - start
        return logits

    def decode(self, token: int) -> np.ndarray:
        start = time.perf_counter()
        logits = self.engine.decode(token)
        self.seconds += time.perf_counter() - start
        return logits


def checked_modes(names: str, known: Sequence[str] = MODES) -> list[str]:
    """The comma-separated modes of a command line, once each. InputError for one that is not known."""
    modes = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for mode in modes:
        if mode not in known:
            raise InputError("unknown mode", got=mode, expected=" | ".join(known))
    return modes


def check_offered(modes: Sequence[str], bundle: str | Path) -> None:
    """Raise InputError for a mode that the model does not offer."""
    model = ModelPath(bundle)
    for mode in modes:
        if mode != "auto":
            model.file_for("dense" if mode == LLAMA_CPP else mode)


def chosen_modes(modes: Sequence[str], bundle: str | Path, n_threads: int) -> list[str]:
    """The same with `auto` replaced by its choice; all that the model offers if none are given."""
    from hotcold.runtime.auto_mode import choose_mode

    model = ModelPath(bundle)
    chosen = [choose_mode(model, n_threads) if mode == "auto" else mode for mode in modes or model.modes]
    return list(dict.fromkeys(chosen))


def side_name(mode: str, input_sparsity: float) -> str:
    """The name of a mode in reports."""
    return f"{mode} (attention inputs {1 - input_sparsity:.0%})" if input_sparsity else mode


def open_side(
    bundle: str | Path, mode: str, *, n_threads: int, n_ctx: int, input_sparsity: float = 0.0
) -> Peer | EngineSide:
    """Load a bundle in a mode of ours, with `input_sparsity` of the attention's inputs left out, or its dense
    file in llama.cpp.

    Raises InputError for an unknown mode, and what the engines raise for files they cannot take.
    """
    checked_modes(mode, (*MODES, LLAMA_CPP))
    if mode == LLAMA_CPP:
        return open_llama_cpp(str(ModelPath(bundle).file_for("dense")), n_threads=n_threads, n_ctx=n_ctx)
    return open_ours(bundle, mode, n_threads=n_threads, n_ctx=n_ctx, input_sparsity=input_sparsity)


def open_ours(
    bundle: str | Path, mode: str, *, n_threads: int, n_ctx: int, input_sparsity: float = 0.0
) -> EngineSide:
    """The part of `open_side` that has no llama.cpp."""

    from hotcold.runtime.cpu.engine import CpuEngine

    return EngineSide(CpuEngine.load(bundle, mode, n_threads, n_ctx, input_sparsity))


def open_llama_cpp(model: str, *, n_threads: int, n_ctx: int) -> Peer:
    """llama.cpp on a GGUF file, or on a name that stands for one, such as `smollm2`."""
    from hotcold.eval.peers.llama_cpp import LlamaCpp
    from hotcold.model.checkpoint import resolve

    return LlamaCpp(resolve(model), n_threads=n_threads, n_ctx=n_ctx)


def open_peers(
    bundle: str | Path, scratch: Path, *, n_threads: int, n_ctx: int
) -> tuple[dict[str, Peer], str]:
    """llama.cpp on each dense form of a bundle, and the name of the one that computes the bundle's function.

    The second form, a plain `llama` twin of a `smallthinker` file, is written into the folder `scratch`.
    """
    from hotcold.convert.gguf.llama_cpp import write_llama_twin
    from hotcold.files.gguf_split import open_gguf

    dense, twin = ModelPath(bundle).file_for("dense"), scratch / "twin.gguf"
    if open_gguf(dense).find("general.architecture", str) != "smallthinker":
        return {LLAMA_CPP: open_llama_cpp(str(dense), n_threads=n_threads, n_ctx=n_ctx)}, LLAMA_CPP
    write_llama_twin(dense, twin)
    names = {f"{LLAMA_CPP} (smallthinker)": dense, f"{LLAMA_CPP} (llama)": twin}
    peers = {
        name: open_llama_cpp(str(path), n_threads=n_threads, n_ctx=n_ctx) for name, path in names.items()
    }
    return peers, next(iter(names))
