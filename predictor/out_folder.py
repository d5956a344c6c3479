"""Where predictors go, and their layers until all are trained: checked before torch is imported."""

from __future__ import annotations

from pathlib import Path

from hotcold.ownership import beside, check_growing, check_replaceable

__all__ = ["check_out"]


def check_out(out: str | Path, traces: str | Path) -> Path:
    """Refuse an `out` that must not be written, before the training; returns where that keeps its layers."""
    check_replaceable(out, "predictors", [traces])
    partial = beside(out, ".partial")
    check_growing(partial, "partial", [traces])
    return partial
