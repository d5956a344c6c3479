"""Run `hotcold` command lines one after the other, each once: a rerun goes on where the last one stopped.

Each step is a process of its own, so that its memory and its thread settings end with it. A journal keeps
what a finished step printed and how long it took. A step is done if the journal has it with the same command,
after the same steps with the same commands, by the same version, and its output is still there.
"""

from __future__ import annotations

import hashlib
import json
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
from hotcold.progress import log

__all__ = ["Done", "Step", "StepError", "child_command", "run_steps"]

_PATIENCE_S = 5.0
_RUN = "import sys; from hotcold.cli import main; sys.exit(main())"


def child_command(arguments: Sequence[str]) -> list[str]:
    """The command line of a process that runs `hotcold` with these arguments, in this Python."""
    return [sys.executable, "-c", _RUN, *arguments]


class StepError(HotcoldError):
    """A step ended with an exit status other than 0; what was wrong it has said itself, on stderr."""


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
    """Run what is not done yet; commands, their output and their time are shown as they come.

    Raises StepError where a step fails; those before it stay done.
    """
    done = _read(journal)
    results: dict[str, Done] = {}
    key = hashlib.sha256(__version__.encode()).hexdigest()
    fresh = False  # once a step is run anew, so are all after it: its output may differ
    for number, step in enumerate(steps, start=1):
        key = hashlib.sha256(json.dumps([key, *step.arguments]).encode()).hexdigest()
        title = f"[{number}/{len(steps)}] hotcold {shlex.join(step.arguments)}"
        if not fresh and key in done and (step.output is None or step.output.exists()):
            log(f"{title}\n      done before, in {done[key].seconds:.0f} s")
            results[step.name] = done[key]
            continue
        fresh = True
        log(title)
        results[step.name] = _run(step, key)
        storage.append_line(journal, json.dumps(asdict(results[step.name])))
        log(f"      took {results[step.name].seconds:.0f} s")
    return results


def _read(journal: Path) -> dict[str, Done]:
    """The finished steps by key; a last line cut by a kill is not there."""
    if not journal.exists():
        return {}
    lines = journal.read_text().split("\n")[:-1]
    return {done.key: done for done in (Done(**json.loads(line)) for line in lines)}


def _run(step: Step, key: str) -> Done:
    """Run the command in a child whose stdout is shown and kept; Ctrl-C reaches both of us."""
    start = time.monotonic()
    command = child_command(step.arguments)
    kept: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
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
            fix="see above; run the same command again to go on from there",
        )  # fmt: skip
    return Done(step.name, key, time.monotonic() - start, "".join(kept))


def _end(child: subprocess.Popen[str]) -> None:
    """Wait till the child has cleaned up; a terminal has sent it the Ctrl-C too, `kill -INT` has not."""
    try:
        child.wait(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        child.wait()
