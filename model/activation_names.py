"""Activations that give exact zeros, known to transformers by name as soon as hotcold is imported.

`config.json` of a sparse checkpoint says `"hidden_act": "fatrelu_0.01"`, and transformers looks that name up
in its table when it builds the model. `import hotcold` arranges that these names are in the table once
transformers is imported, without importing it; no code comes out of a checkpoint.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import re
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hotcold.model.ffn_modules import GATED

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["NAMES", "install", "parse"]

# What a name may be; a threshold or shift is a number after the underscore.
NAMES = ("relu", "relu2", "drelu", "fatrelu_T", "shifted_relu_B")
_PARAMETERIZED = re.compile(r"(fatrelu|shifted_relu)_(\d+(?:\.\d+)?(?:e-?\d+)?)")
_ACTIVATIONS = "transformers.activations"
# The gated FFNs of transformers that `drelu` needs to change: there, an activation only sees the gate.
_GATED = {f"transformers.models.{name}.modeling_{name}": f"{name.capitalize()}MLP" for name in GATED}


def parse(name: str) -> tuple[str, float] | None:
    """Kind and parameter of an activation of ours, or None: `fatrelu_0.01` is `("fatrelu", 0.01)`."""
    if name in ("relu2", "drelu"):
        return name, 0.0
    match = _PARAMETERIZED.fullmatch(name)
    return (match[1], float(match[2])) if match else None


def _extend_table(module: ModuleType) -> None:
    """Make transformers' table of activations give ours for names that it does not know itself."""
    table = module.ACT2FN

    class Extended(type(table)):
        def __missing__(self, name: str) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
            found = parse(name) if isinstance(name, str) else None
            if found is None:
                raise KeyError(name)
            from hotcold.model.activations import make_activation

            return make_activation, {"kind": found[0], "parameter": found[1]}

    table.__class__ = Extended


def _rectify_up(module: ModuleType) -> None:
    """Make a gated FFN of transformers apply ReLU to `up` too where its activation asks for that."""
    ffn = getattr(module, _GATED[module.__name__])
    plain = ffn.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        if getattr(self.act_fn, "rectifies_up", False):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.act_fn(self.up_proj(x)))
        return plain(self, x)

    ffn.forward = forward


_CHANGES: dict[str, Callable[[ModuleType], None]] = {_ACTIVATIONS: _extend_table}
_CHANGES |= dict.fromkeys(_GATED, _rectify_up)


class _AfterImport(importlib.abc.MetaPathFinder):
    """Changes each module of `_CHANGES` right after it is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in _CHANGES:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_change(module: ModuleType) -> None:
                load(module)
                _CHANGES[name](module)

            spec.loader.exec_module = load_and_change
        return spec


def install() -> None:
    """Change what is imported already, and the rest when it is. Once per process."""
    if any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _AfterImport())
    for name, change in _CHANGES.items():
        if name in sys.modules:
            change(sys.modules[name])
