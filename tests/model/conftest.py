"""The tiny seeded models of `tests/support/tiny_llama.py`."""

from __future__ import annotations

from tiny_llama import corpus, make_model, make_predictors

__all__ = ["corpus", "make_model", "make_predictors"]
