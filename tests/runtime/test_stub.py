"""runtime/cpu/_cpu/ tells type checkers what the native module has: generated, never written by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STUBS = Path(__file__).parents[2] / "runtime" / "cpu" / "_cpu"


def test_the_stubs_are_those_of_the_built_module(tmp_path):
    command = ["nanobind.stubgen", "-q", "-r", "-m", "hotcold.runtime.cpu._cpu", "-O"]
    subprocess.run([sys.executable, "-m", *command, tmp_path], check=True)
    made = {path.name: path.read_text() for path in (tmp_path / "_cpu").iterdir()}
    fix = f"python -m {' '.join(command)} runtime/cpu"
    assert {path.name: path.read_text() for path in STUBS.iterdir()} == made, f"after a change run: {fix}"
