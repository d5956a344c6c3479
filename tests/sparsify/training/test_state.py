"""A working folder whose files were damaged is named, and never an error of Python's."""

from __future__ import annotations

import shutil

import pytest
import torch

from hotcold.errors import FormatError, MismatchError
from hotcold.sparsify.training.state import WorkFolder

PHASES = ["warm", "end"]


@pytest.fixture
def work(tmp_path):
    made = WorkFolder(tmp_path / "work", {"model": "m"}, PHASES)
    for step in (1, 2):
        made.log({"phase": "warm", "step": step, "loss": 1.0})
    made.save("warm", 1, {"w": torch.ones(2)}, {"w/step": torch.ones(1)}, {})
    return made


def test_the_log_is_cut_back_to_the_last_state(work):
    work.log_path.write_bytes(work.log_path.read_bytes() + b'{"phase": "end", "st')
    work.cut_log()
    assert [(record["phase"], record["step"]) for record in work.records()] == [("warm", 1)]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"format": 1, "format": 2}'])
def test_a_damaged_run_file(work, content):
    (work.path / "run.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"run\.json, content: "):
        WorkFolder(work.path, {"model": "m"}, PHASES)


def test_another_runs_folder(work):
    with pytest.raises(MismatchError, match="of another run: its model differs"):
        WorkFolder(work.path, {"model": "n"}, PHASES)


@pytest.mark.parametrize(
    "content",
    [
        b"{", b"[]", b"{}", b'{"phase": "nowhere", "step": 1, "extra": {}}',
        b'{"phase": "warm", "step": "1", "extra": {}}', b'{"phase": "warm", "step": 1, "extra": 3}',
    ],
)  # fmt: skip
def test_a_damaged_state(work, content):
    [state] = work.path.glob("state-*")
    (state / "manifest.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"not a training state.*; delete it"):
        work.last()


@pytest.mark.parametrize("line", [b"{\n", b"3\n", b'{"step": 1}\n', b'{"phase": "warm", "step": "x"}\n'])
def test_a_damaged_log(work, line):
    work.log_path.write_bytes(line + work.log_path.read_bytes())
    with pytest.raises(FormatError, match=r"training\.jsonl, line 1: "):
        work.cut_log()


def test_what_only_looks_like_a_state_is_left_alone(work, tmp_path):
    """A copy under another name, notes, this state has the wrong file name."""
    shutil.copytree(next(work.path.glob("state-warm-*")), work.path / "state-best-mine")
    notes = work.path / "state-notes"
    notes.mkdir()
    (notes / "model.safetensors").write_bytes(b"mine")
    before = {path: path.read_bytes() for path in work.path.glob("state-[bn]*/*")}
    work.cut_log()
    for step in (2, 3, 4, 5):
        work.save("warm", step, {}, {}, {})
    assert len(work.states()) == 2
    assert {path: path.read_bytes() for path in work.path.glob("state-[bn]*/*")} == before
    work.states()[0].path.rename(work.path / "state-warm-000099")
    with pytest.raises(FormatError, match="this state has the wrong file name"):
        work.states()
