"""Progress goes to stderr: a bar where someone watches, a line now and then where a log is kept."""

from __future__ import annotations

import io
import sys

import pytest

from hotcold import progress
from hotcold.progress import Progress, log


@pytest.fixture
def clock(monkeypatch):
    """Time that a test moves by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_goes_to_stderr_alone(capsys):
    log("hello")
    assert capsys.readouterr() == ("", "hello\n")


def test_a_line_every_thirty_seconds_with_rate_and_time_left(capsys, clock):
    with Progress("collect", total=1000, unit="tok") as shown:
        for _ in range(6):
            clock[0] += 10
            shown.advance(100, sparsity=0.66123, layer=3)
        lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "collect: 300/1000 tok, 10.0 tok/s, ETA 70 s, sparsity 0.6612, layer 3",
        "collect: 600/1000 tok, 10.0 tok/s, ETA 40 s, sparsity 0.6612, layer 3",
    ]


def test_the_rate_of_a_resumed_run_leaves_out_what_was_done_before(capsys, clock):
    with Progress("collect", total=1000, unit="tok", start=800) as shown:
        clock[0] += 50
        shown.advance(100)
    assert capsys.readouterr().err.splitlines()[0] == "collect: 900/1000 tok, 2.0 tok/s, ETA 50 s"


def test_short_steps_say_nothing_and_long_ones_end_with_a_line(capsys, clock):
    with Progress("short", total=1, unit="step") as shown:
        shown.advance(1)
    assert capsys.readouterr().err == ""
    with Progress("long", total=1, unit="step") as shown:
        clock[0] += 5
        shown.advance(1)
    assert capsys.readouterr().err == "long: 1/1 step, 0.2 step/s, ETA 0 s\n"


def test_no_last_line_after_an_error(capsys, clock):
    with pytest.raises(ValueError), Progress("long", total=1, unit="step"):
        clock[0] += 5
        raise ValueError
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with Progress("collect", total=10, unit="tok", start=5) as shown:
        shown.advance(5, loss=0.5)
    drawn = terminal.getvalue()
    assert "collect: 100%" in drawn and "10/10" in drawn and "loss=0.5" in drawn
