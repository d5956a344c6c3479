"""Decoding where CPUs are few or shared: one CPU, a quota, more threads than CPUs, other busy programs.

Every figure comes from a separate `hotcold run`, as a user would start it. The situations take turns in
each round, and a ratio is the median of the rounds' own ratios to the same round's reference.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

from hotcold.cpus import available_cpus, cgroups
from hotcold.errors import UnsupportedError
from hotcold.eval.demo.pipeline import StepError, child_command
from hotcold.progress import Progress, log
from hotcold.table import markdown

__all__ = ["Result", "Situation", "measure", "situations", "table"]

_RATE = re.compile(r"^generation: .*?, ([\d.]+) tokens/s", re.MULTILINE)
_PERIOD_US = 100_000
_NICED = 19


@dataclass(frozen=True, slots=True)
class Situation:
    """A way to run: with `threads` asked for (None: none), on so many `cpus` or with a `quota` of so many,
    beside `busy` endless loops of a `nice` level. `reference` names the situation that it is compared
    with."""

    name: str
    reference: str
    threads: int | None = None
    cpus: int | None = None
    quota: float | None = None
    busy: int = 0
    nice: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """Tokens/s per round, and the median ratio to the reference."""

    situation: Situation
    tok_s: list[float]
    ratio: float


def situations() -> list[Situation]:
    """What is measured, each after its reference."""
    n = available_cpus()
    alone, one = f"{n} CPUs", "1 CPU"
    found = [
        Situation(one, one, threads=1, cpus=1),
        Situation("1 CPU, -t 2", one, threads=2, cpus=1),
        Situation("1 CPU of quota", one, quota=1.0),
        Situation(alone, alone),
        Situation(f"{n} CPUs, -t 64", alone, threads=64),
        Situation(f"{n} CPUs, {n} busy programs", alone, busy=n),
        Situation(f"{n} CPUs, 1 busy program", alone, busy=1),
        Situation(f"{n} CPUs, {n} busy programs of low priority", alone, busy=n, nice=_NICED),
    ]
    try:
        with _quota(1.0):
            return found
    except UnsupportedError as error:
        log(f"skipped: {error}")
        return [situation for situation in found if situation.quota is None]


def measure(arguments: Sequence[str], chosen: Sequence[Situation], rounds: int) -> list[Result]:
    """Run `hotcold run ARGUMENTS` in all situations, `rounds` times. StepError if a run fails."""
    found: dict[str, list[float]] = {situation.name: [] for situation in chosen}
    with Progress("bench-shared", total=rounds * len(chosen), unit="run") as progress:
        for _ in range(rounds):
            for situation in chosen:
                found[situation.name].append(_tokens_per_second(arguments, situation))
                progress.advance(1, tok_s=found[situation.name][-1])
    return [Result(one, found[one.name], _ratio(found[one.name], found[one.reference])) for one in chosen]


def _ratio(speeds: Sequence[float], reference: Sequence[float]) -> float:
    return median(speed / other for speed, other in zip(speeds, reference, strict=True))


def _tokens_per_second(arguments: Sequence[str], situation: Situation) -> float:
    threads = [] if situation.threads is None else ["-t", str(situation.threads)]
    with ExitStack() as stack:
        group = stack.enter_context(_quota(situation.quota)) if situation.quota else None
        stack.enter_context(_busy(situation.busy, situation.nice))

        def prepare() -> None:
            if group is not None:
                (group / "cgroup.procs").write_text(str(os.getpid()))
            if situation.cpus is not None:
                os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: situation.cpus])

        command = child_command(["run", *arguments, *threads])
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", preexec_fn=prepare)
    rate = _RATE.search(done.stderr)
    if done.returncode or rate is None:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise StepError(f"a run failed: {last}", where=situation.name, got=f"exit status {done.returncode}")
    return float(rate[1])


@contextmanager
def _busy(n: int, nice: int) -> Iterator[None]:
    """`n` processes in an endless loop."""
    loop = [sys.executable, "-c", "while True: pass"]
    lower = partial(os.setpriority, os.PRIO_PROCESS, 0, nice) if nice else None
    processes = [subprocess.Popen(loop, preexec_fn=lower) for _ in range(n)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def _quota(cpus: float) -> Iterator[Path]:
    """A cgroup with a quota, gone afterwards. UnsupportedError if none can be made."""
    for own, _ in cgroups():
        group = own / f"hotcold-{os.getpid()}"
        try:
            group.mkdir()
            _limit(group, cpus)
        except OSError:
            with suppress(OSError):
                group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    raise UnsupportedError("cannot create a cgroup with a CPU quota", fix="run as root")


def _limit(group: Path, cpus: float) -> None:
    if (group / "cpu.cfs_quota_us").exists():
        (group / "cpu.cfs_period_us").write_text(str(_PERIOD_US))
        (group / "cpu.cfs_quota_us").write_text(str(round(cpus * _PERIOD_US)))
    elif (group / "cpu.max").exists():
        (group / "cpu.max").write_text(f"{round(cpus * _PERIOD_US)} {_PERIOD_US}")
    else:
        raise OSError("no CPU controller in this cgroup")


def table(results: Sequence[Result]) -> str:
    """Markdown: median, smallest and largest tokens/s, and the ratio to the reference."""
    lines = []
    for result in results:
        speeds, one = result.tok_s, result.situation
        spread = f"{median(speeds):.1f} ({min(speeds):.1f}–{max(speeds):.1f})"
        lines.append((one.name, spread, f"{result.ratio:.2f}x", one.reference))
    return markdown(("situation", "tokens/s", "ratio", "to"), lines, left=(0, 3))
