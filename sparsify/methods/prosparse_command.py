"""The `prosparse` method on the command line: a training run as a config file says."""

from __future__ import annotations

import argparse
from typing import Any

from hotcold.errors import InputError
from hotcold.sparsify.config import load_config, recipes
from hotcold.sparsify.training.command import train

__all__ = ["run"]


def run(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """Train. InputError where there is no config."""
    if args.config is None:
        known = " | ".join(recipes())
        raise InputError("--method prosparse needs a config", expected=f"--config FILE or one of {known}")
    return train(args, load_config(args.config))
