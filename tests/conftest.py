"""What holds for every test: no network, no files left in the user's cache, no deadline on a busy machine."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Triton chooses between compiler and interpreter when it is imported, which transformers does too.
if "HOTCOLD_TEST_GPU" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("hotcold", deadline=None)
settings.load_profile("hotcold")


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """`--mode auto` remembers its measurements under XDG_CACHE_HOME."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
