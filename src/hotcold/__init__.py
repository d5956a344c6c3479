"""hotcold: make LLMs sparsely activated, predict which neurons fire, and run only those.

Importing this package is cheap (no torch, no transformers): each folder is imported where it is used.

    hotcold.sparsify   make a model sparsely activated
    hotcold.predictor  activation traces and the predictors trained on them
    hotcold.convert    GGUF, PowerInfer files, bundles
    hotcold.runtime    the engine
    hotcold.eval       speed beside quality

To run a model:

    from hotcold import load_bundle

    engine = load_bundle("bundle", mode="predicted")  # an Engine: see hotcold.runtime.engine
    logits = engine.prefill([1, 2, 3])                # float32 [n_vocab], of the token after these
    logits = engine.decode(int(logits.argmax()))
    other = engine.sequence()                         # another text of the same weights
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hotcold.runtime.backends import load_bundle
    from hotcold.runtime.engine import Engine

__version__ = "0.1.0"
__all__ = ["Engine", "__version__", "load_bundle"]

_HOMES = {"Engine": "hotcold.runtime.engine", "load_bundle": "hotcold.runtime.backends"}


def __getattr__(name: str) -> object:
    """What lives in the rooms, imported when it is asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
