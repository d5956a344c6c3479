"""A session on a GPU, with commands that run on a CPU: nothing that fails costs another its result."""

from __future__ import annotations

import argparse
import importlib
import json

import pytest

from hotcold.cli import COMMANDS, main
from hotcold.eval.gpu.session import PARTS, Part, parts, run_parts

TINY = ("bench-kernels", "--device", "cpu", "--d-model", "32", "--d-ff", "32", "--check")


def test_a_failing_part_costs_no_other(tmp_path):
    todo = [
        Part("wrong", 1, (*TINY, "--dtype", "q4")),
        Part("long", 10_000, TINY),
        Part("right", 1, TINY),
    ]
    found = run_parts(todo, tmp_path / "session.json", 600)
    assert json.loads((tmp_path / "session.json").read_text())["parts"] == found
    assert [part["status"] for part in found] == ["failed", "skipped", "done"]
    assert "unknown type" in found[0]["error"] and "10000 s needed" in found[1]["error"]
    assert set(found[2]["result"]) == {"dot_rows", "s2", "s3", "ffn", "select"}


def test_a_part_that_takes_too_long_is_ended(tmp_path):
    (found,) = run_parts([Part("late", 0.1, TINY)], tmp_path / "session.json", 0.5)
    assert found["status"] == "timed out" and found["result"] is None


@pytest.mark.parametrize("part", parts([part.name for part in PARTS], "cuda", "kept"), ids=lambda p: p.name)
def test_every_part_is_a_command_line(part):
    command, *arguments = part.arguments
    parser = argparse.ArgumentParser(exit_on_error=False)
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    args = parser.parse_args(arguments)
    assert args.output == "json" and args.device == "cuda"
    assert getattr(args, "cache", "kept") == "kept"


def test_unknown_parts(capsys, tmp_path):
    assert main(["bench-gpu-all", "--save", str(tmp_path / "s.json"), "--parts", "check,all"]) == 2
    assert "unknown part (got all" in capsys.readouterr().err
