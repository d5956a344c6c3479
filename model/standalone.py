"""What goes beside a checkpoint so that it can be loaded without hotcold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hotcold.model.ffn_modules import is_known_to_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["standalone_files"]

_FILE = Path(__file__).parent / "modeling_sparse.py"


def standalone_files(model: PreTrainedModel) -> dict[str, bytes]:
    """A modeling file, by name, where transformers alone does not know the activation of `model`."""
    return {} if is_known_to_transformers(model.config) else {_FILE.name: _FILE.read_bytes()}
