"""How long a context may be: no longer than the positions that a model has learned."""

from __future__ import annotations

from pathlib import Path

from hotcold.errors import InputError
from hotcold.files.gguf import GGUFFile
from hotcold.model.spec import ModelSpec
from hotcold.progress import log

__all__ = ["check_context", "check_positions"]


def check_context(file: GGUFFile, spec: ModelSpec, n_ctx: int) -> None:
    """Raise InputError for more context than the model has learned positions for; say where it is more than
    it was trained on."""
    if spec.structure.learned_positions:
        check_positions(spec.n_ctx, n_ctx, file.path)
    if 0 < spec.n_ctx < n_ctx:
        log(f"{file.path.name}: a context of {n_ctx} tokens, where the model was trained on {spec.n_ctx}")


def check_positions(n_positions: int, n_ctx: int, where: Path) -> None:
    """Raise InputError for a context that is longer than a table of positions."""
    if n_ctx > n_positions:
        what, limit = "the model has no positions for so long a context", f"at most {n_positions}"
        raise InputError(what, where=where, got=n_ctx, expected=limit, fix="lower it with -c")
