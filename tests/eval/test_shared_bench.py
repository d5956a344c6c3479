"""The benchmark of shared CPUs: each situation really is what its row says, and its table's arithmetic."""

from __future__ import annotations

import os
import sys

import pytest

from hotcold.cpus import available_cpus
from hotcold.errors import UnsupportedError
from hotcold.eval import shared_bench
from hotcold.eval.demo.pipeline import StepError
from hotcold.eval.shared_bench import Result, Situation, measure, situations, table

# Stands in for `hotcold run`: its figure is the number of CPUs, of busy programs, and of arguments.
PROBE = """
import sys
from pathlib import Path
from hotcold.cpus import available_cpus
def line(process):
    try:
        return Path(process, "cmdline").read_bytes()
    except OSError:
        return b""
busy = sum(line(p).endswith(b"\\0while True: pass\\0") for p in Path("/proc").iterdir() if p.name.isdigit())
print(f"generation: 4 tokens, {available_cpus()}{busy}.{len(sys.argv)} tokens/s", file=sys.stderr)
"""


@pytest.fixture
def probe(monkeypatch):
    command = [sys.executable, "-c", PROBE]
    monkeypatch.setattr(shared_bench, "child_command", lambda arguments: [*command, *arguments])


def rate(situation: Situation) -> float:
    return measure([], [Situation("r", "r"), situation], 1)[1].tok_s[0]


def test_a_run_on_one_cpu_has_one(probe):
    assert rate(Situation("one", "r", cpus=1)) == 10.2
    assert rate(Situation("one", "r", threads=2, cpus=1)) == 10.4


def test_a_run_under_a_quota_has_what_it_leaves(probe):
    try:
        with shared_bench._quota(1.0) as group:
            assert group.is_dir()
    except UnsupportedError:
        assert all(situation.quota is None for situation in situations())
        return
    assert not group.exists()
    assert rate(Situation("quota", "r", quota=1.0)) == 10.2
    assert any(situation.quota for situation in situations())


def test_busy_programs_run_beside_it_and_end_with_it(probe):
    assert rate(Situation("busy", "r", busy=2, nice=19)) == float(f"{available_cpus()}2.2")
    assert rate(Situation("alone", "r")) == float(f"{available_cpus()}0.2")


def test_busy_programs_have_their_priority(monkeypatch):
    started = []
    popen = shared_bench.subprocess.Popen

    def start(*args, **options):
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(shared_bench.subprocess, "Popen", start)
    with shared_bench._busy(1, 19):
        assert os.getpriority(os.PRIO_PROCESS, started[0].pid) == 19
    assert started[0].returncode is not None


def test_a_failed_run_is_an_error_with_its_last_line(monkeypatch):
    code = "import sys; sys.exit('first\\nno such file')"
    monkeypatch.setattr(shared_bench, "child_command", lambda arguments: [sys.executable, "-c", code])
    with pytest.raises(StepError, match=r"^r: a run failed: no such file \(got exit status 1\)$"):
        measure([], [Situation("r", "r")], 1)


def test_ratios_are_of_the_same_round():
    assert shared_bench._ratio([10, 5, 30], [20, 10, 10]) == 0.5
    rows = table([Result(Situation("a", "b"), [2.0, 1.0, 4.0], 0.5)]).splitlines()
    assert " ".join(rows[-1].split()) == "| a | 2.0 (1.0–4.0) | 0.50x | b |"


def test_every_situation_comes_after_its_reference():
    names = [situation.name for situation in situations()]
    assert len(set(names)) == len(names)
    for number, situation in enumerate(situations()):
        assert situation.reference in names[: number + 1]
