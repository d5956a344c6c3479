"""The ways to make a model sparse, by the name that `--method` takes."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from hotcold.errors import InputError

__all__ = ["METHODS", "load_method"]

# name -> (module, function); the function has the signature of `hotcold.sparsify.relu.sparsify_relu`
METHODS: dict[str, tuple[str, str]] = {
    "relu": ("hotcold.sparsify.relu", "sparsify_relu"),
}


def load_method(name: str) -> Any:
    """The function behind a method's name. Raises InputError, with the known names, for another."""
    if name not in METHODS:
        raise InputError("unknown method", where="--method", got=name, expected=" | ".join(METHODS))
    module, function = METHODS[name]
    return getattr(import_module(module), function)
