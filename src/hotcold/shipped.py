"""Where the trained FFNs that come with hotcold are; `hotcold.sparsify.methods.pretrained` reads them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["BASE", "CARD", "FILE"]

BASE = "smollm2"  # the dense model that they belong to
FILE = Path(__file__).parent / "models" / "smollm2-135m-sparse.safetensors"
CARD = FILE.with_name("MODEL_CARD.md")
