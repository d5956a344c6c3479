"""A stock `llama-bench` on the files that we time llama.cpp on, for the record.

Our own llama.cpp runs in this process, in turns with the other sides, which is what ratios need. A reader may
ask whether it is as fast there as in the program that everybody uses. This is the answer.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hotcold.errors import InputError
from hotcold.eval.results import StockSpeed

__all__ = ["LlamaBench"]

_REPETITIONS = 3


@dataclass(frozen=True, slots=True)
class LlamaBench:
    """The program at `path`, with as many threads and tokens as the other sides."""

    path: str
    n_threads: int
    n_prompt: int
    n_gen: int

    @property
    def depth(self) -> int:
        """Tokens in the cache before timing starts: as many as our prompts leave there."""
        return self.n_prompt

    def run(self, side: str, model: Path) -> StockSpeed:
        """Time one file. InputError if the program cannot be run, fails, or prints something unexpected."""
        rows = _parsed(self._output(model), self.path)
        prompt = self._row(rows, self.n_prompt, 0)
        generation = self._row(rows, 0, self.n_gen)
        return StockSpeed(
            side=side,
            build=f"b{generation['build_number']} ({generation['build_commit']})",
            depth=self.depth,
            prompt=(float(prompt["avg_ts"]), float(prompt["stddev_ts"])),
            generation=(float(generation["avg_ts"]), float(generation["stddev_ts"])),
        )

    def _output(self, model: Path) -> str:
        sizes = {"-t": self.n_threads, "-p": self.n_prompt, "-n": self.n_gen, "-d": self.depth}
        options = {"-m": model, **sizes, "-fa": 1, "-r": _REPETITIONS, "-o": "json"}
        command = [self.path, *(str(item) for pair in options.items() for item in pair)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise InputError(
                error.strerror or str(error), where=f"--llama-bench {self.path}",
                fix="give the path to llama.cpp's llama-bench",
            ) from error  # fmt: skip
        if done.returncode != 0:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise InputError(
                f"llama-bench ended with status {done.returncode}",
                where=model,
                got=said[-1] if said else None,
            )
        return done.stdout

    def _row(self, rows: Sequence[Mapping[str, Any]], n_prompt: int, n_gen: int) -> Mapping[str, Any]:
        """The test of this size. Builds from before May 2025 have no depth, and refuse `-d` themselves."""
        wanted = {"n_prompt": n_prompt, "n_gen": n_gen, "n_depth": self.depth}
        needed = ("build_number", "build_commit", "avg_ts", "stddev_ts")
        for row in rows:
            if all(row.get(name) == value for name, value in wanted.items()) and all(
                n in row for n in needed
            ):
                return row
        raise InputError(
            "llama-bench printed no result", where=self.path, got=f"{len(rows)} tests",
            expected=", ".join(f"{name} {value}" for name, value in wanted.items()),
        )  # fmt: skip


def _parsed(output: str, path: str) -> list[Mapping[str, Any]]:
    try:
        rows = json.loads(output)
    except ValueError as error:
        raise InputError(
            "llama-bench printed no JSON", where=path, got=output.strip()[:80] or None
        ) from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError("llama-bench printed unexpected JSON", where=path, expected="an array of objects")
    return rows
