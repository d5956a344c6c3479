"""Steps run once, in order, as real commands; a rerun goes on where the last one stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hotcold.eval.demo import pipeline
from hotcold.eval.demo.pipeline import Step, StepError, run_steps

# stands in for the command line: appends a mark to the file given, and ends with the status given
MARK = """
import sys
_, name, path, status = sys.argv[:4]
open(path, "a").write("x")
print("figures of", name)
sys.exit(int(status))
"""
# runs until it is stopped, if asked to; its process id is in the file given
WAIT = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(float(sys.argv[2]))"
# A suite that was started in the background ignores SIGINT, and so would all that it starts.
DRIVER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from pathlib import Path
from hotcold.eval.demo import pipeline
pipeline._PATIENCE_S = 0.5
pipeline._RUN, folder = sys.argv[1], Path(sys.argv[2])
seconds = {"a": "0", "b": "60"}
steps = [pipeline.Step(name, (str(folder / name), s), folder / name) for name, s in seconds.items()]
pipeline.run_steps(steps, folder / "journal")
"""


@pytest.fixture
def steps(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_RUN", MARK)

    def make(*statuses):
        return [
            Step(f"step{i}", (f"step{i}", str(tmp_path / f"out{i}"), str(status)), tmp_path / f"out{i}")
            for i, status in enumerate(statuses)
        ]

    return make


def runs(tmp_path, n):
    return [len(path.read_text()) if (path := tmp_path / f"out{i}").exists() else 0 for i in range(n)]


def test_each_step_runs_once_and_keeps_what_it_printed(steps, tmp_path, capsys):
    for _ in range(2):
        done = run_steps(steps(0, 0), tmp_path / "journal")
    assert runs(tmp_path, 2) == [1, 1]
    assert done["step1"].stdout == "figures of step1\n"
    assert capsys.readouterr().out == "figures of step0\nfigures of step1\n"  # shown once, when it ran


def test_a_failed_step_stops_and_is_run_again(steps, tmp_path):
    with pytest.raises(StepError, match=r"step1: a step failed \(got exit status 3, expected 0\)"):
        run_steps(steps(0, 3, 0), tmp_path / "journal")
    assert runs(tmp_path, 3) == [1, 1, 0]
    run_steps(steps(0, 0, 0), tmp_path / "journal")
    assert runs(tmp_path, 3) == [1, 2, 1]


def test_lost_output_is_made_again_with_all_that_follows(steps, tmp_path):
    run_steps(steps(0, 0, 0), tmp_path / "journal")
    (tmp_path / "out1").unlink()
    run_steps(steps(0, 0, 0), tmp_path / "journal")
    assert runs(tmp_path, 3) == [1, 1, 2]


def test_another_command_is_run_with_all_that_follows(steps, tmp_path):
    run_steps(steps(0, 0, 0), tmp_path / "journal")
    changed = steps(0, 0, 0)
    changed[1] = Step("step1", (*changed[1].arguments, "--more"), changed[1].output)
    run_steps(changed, tmp_path / "journal")
    assert runs(tmp_path, 3) == [1, 2, 2]


def test_a_journal_cut_in_the_middle_of_a_line_is_read(steps, tmp_path):
    run_steps(steps(0, 0), tmp_path / "journal")
    whole = (tmp_path / "journal").read_bytes()
    first = whole.index(b"\n") + 1
    for cut in (first + 1, (first + len(whole)) // 2, len(whole) - 1):
        (tmp_path / "journal").write_bytes(whole[:cut])
        assert list(pipeline._read(tmp_path / "journal")) == [json.loads(whole[:first])["key"]]


@pytest.mark.parametrize("damage", [b"{}\n", b"no JSON\n", b'{"name": 3}\n', b"\xff\xfe\n"])
def test_damaged_lines_of_a_journal_are_not_done(steps, tmp_path, capsys, damage):
    run_steps(steps(0, 0), tmp_path / "journal")
    first, second = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal").write_bytes(first + damage + second)
    capsys.readouterr()
    run_steps(steps(0, 0), tmp_path / "journal")
    assert runs(tmp_path, 2) == [1, 1] and "journal" in capsys.readouterr().err


def test_a_step_prints_utf8_whatever_the_terminal(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(pipeline, "_RUN", "print('Größe 谢谢')")
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    done = run_steps([Step("words", ("words",))], tmp_path / "journal")
    assert done["words"].stdout == "Größe 谢谢\n"


def test_a_child_that_ignores_ctrl_c_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_PATIENCE_S", 0.3)
    code = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print(1, flush=True);"
        "time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "1\n"
        pipeline._end(child)
    assert child.returncode == -signal.SIGTERM


@pytest.mark.parametrize("send", [os.killpg, os.kill], ids=["to the group", "to the parent alone"])
def test_ctrl_c_ends_the_child_and_keeps_what_is_done(send, tmp_path):
    """SIGINT comes while the second step runs: from a terminal, or from `kill -INT`."""
    command = [sys.executable, "-c", DRIVER, WAIT, tmp_path]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    child = tmp_path / "b"
    while not (child.exists() and child.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    send(process.pid, signal.SIGINT)
    assert process.wait(timeout=20) != 0
    assert not Path(f"/proc/{child.read_text()}").exists()
    assert [json.loads(line)["name"] for line in (tmp_path / "journal").read_text().splitlines()] == ["a"]
