"""What goes beside a checkpoint so that it can be loaded without hotcold."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from hotcold.model.activation_names import parse

__all__ = ["standalone_files"]

_FILE = Path(__file__).parent / "modeling_sparse.py"
_KNOWN_TO_TRANSFORMERS = ("relu", "relu2", "silu")


def standalone_files(model: PreTrainedModel) -> dict[str, bytes]:
    """A modeling file, by name, where transformers alone does not know the activation of `model`."""
    name = model.config.hidden_act
    if name in _KNOWN_TO_TRANSFORMERS or parse(name) is None:
        return {}
    return {_FILE.name: _FILE.read_bytes()}
