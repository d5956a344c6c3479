"""Run `hotcold` command lines one after the other, each once: a rerun continues where the last one stopped.

Each step is a separate process, so that its memory and its thread settings end with it. A journal keeps
what a finished step printed and how long it took. A step is done if the journal has it with the same command,
after the same steps with the same commands, by the same version, and its output is still there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hotcold import __version__, storage
from hotcold.errors import HotcoldError
from hotcold.files.json import read_json_lines
from hotcold.progress import log

__all__ = ["Done", "Step", "StepError", "child_command", "child_environment", "run_steps"]

_PATIENCE_S = 20.0  # for the child to save its work
_RUN = "import sys; from hotcold.cli import main; sys.exit(main())"


def child_command(arguments: Sequence[str]) -> list[str]:
    """The command line of a process that runs `hotcold` with these arguments, in this Python."""
    return [sys.executable, "-c", _RUN, *arguments]


def child_environment() -> dict[str, str]:
    """That of such a process: its output is UTF-8, independent of the terminal, which is our own concern."""
    return os.environ | {"PYTHONIOENCODING": "utf-8"}


class StepError(HotcoldError):
    """A step ended with an exit status other than 0; it has printed the reason on stderr."""


@dataclass(frozen=True, slots=True)
class Step:
    """`hotcold ARGUMENTS`, which makes the file or folder `output`, if any."""

    name: str
    arguments: tuple[str, ...]
    output: Path | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """A finished step: what it printed to stdout, and its wall time in seconds."""

    name: str
    key: str
    seconds: float
    stdout: str


def run_steps(steps: Sequence[Step], journal: Path) -> dict[str, Done]:
    """Run what is not done yet; prints commands, their output, and their time as they come.

    Raises StepError if a step fails; those before it stay done.
    """
    done = _read(journal)
    results: dict[str, Done] = {}
    key = hashlib.sha256(__version__.encode()).hexdigest()
    fresh = False  # if a step runs again, so do all later ones, because its output may differ
    for number, step in enumerate(steps, start=1):
        key = hashlib.sha256(json.dumps([key, *step.arguments]).encode()).hexdigest()
        title = f"[{number}/{len(steps)}] hotcold {shlex.join(step.arguments)}"
        if not fresh and key in done and (step.output is None or step.output.exists()):
            log(f"{title}\n      already done, in {done[key].seconds:.0f} s")
            results[step.name] = done[key]
            continue
        fresh = True
        log(title)
        results[step.name] = _run(step, key)
        storage.append_line(journal, json.dumps(asdict(results[step.name])))
        log(f"      took {results[step.name].seconds:.0f} s")
    return results


def _read(journal: Path) -> dict[str, Done]:
    """The finished steps by key; what is damaged was not done."""
    found = {}
    for entry in read_json_lines(journal, skip_damaged=True):
        match entry:
            case {"name": str(name), "key": str(key), "seconds": int() | float() as took, "stdout": str(out)}:
                found[key] = Done(name, key, took, out)
            case _:
                log(f"ignored: {journal}: not a finished step")
    return found


def _run(step: Step, key: str) -> Done:
    """Run the command in a child whose stdout is shown and kept; Ctrl-C reaches both of us."""
    start = time.monotonic()
    command = child_command(step.arguments)
    kept: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace", env=child_environment()
    ) as child:
        try:
            for line in child.stdout or ():
                print(line, end="", flush=True)
                kept.append(line)
        except KeyboardInterrupt:
            _end(child)
            raise
    if child.returncode != 0:
        raise StepError(
            "a step failed", where=step.name, got=f"exit status {child.returncode}", expected=0,
            fix="see above; run the same command again to continue from there",
        )  # fmt: skip
    return Done(step.name, key, time.monotonic() - start, "".join(kept))


def _end(child: subprocess.Popen[str]) -> None:
    """Wait till the child has cleaned up; a terminal has sent it the Ctrl-C too, `kill -INT` has not, and one
    that ignores it must not keep us here."""
    for next_signal in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            child.wait(timeout=_PATIENCE_S)
            return
        except subprocess.TimeoutExpired:
            child.send_signal(next_signal)
    child.wait()
