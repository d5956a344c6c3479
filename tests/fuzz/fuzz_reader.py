"""Fuzz one reader with atheris: `python fuzz_reader.py NAME --seconds 60`. See run.py, which runs them all.

An input is the number of a file and its content; the other files of the folder are good. An input that
raises anything but a HotcoldError, takes `--timeout` seconds or a gigabyte, ends the run with status 77 and
lies in `--crashes`. With a `--seed`, and PYTHONHASHSEED set, the inputs are the same in every run.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from types import FunctionType

import atheris

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
import gguf_values
import malformed_gguf
import mutations
import readers

from hotcold.errors import HotcoldError


def instrument() -> None:
    """Count branches and comparisons of all of hotcold. (Atheris' import hook fails in editable installs.)"""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "hotcold":
            for holder in (module, *(value for value in vars(module).values() if isinstance(value, type))):
                for value in list(vars(holder).values()):
                    function = getattr(value, "__func__", getattr(value, "fget", value))
                    if isinstance(function, FunctionType) and function.__module__ == name:
                        atheris.instrument_func(function)


class Target:
    """Feeds inputs to one reader, in one folder."""

    def __init__(self, name: str, folder: Path) -> None:
        self.reader, self.folder = readers.READERS[name], folder
        self.reader.make(folder)
        self.good = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def seeds(self) -> list[bytes]:
        """The good files, more of the first kind, and all hand-made GGUF files."""
        seeds = [bytes([i]) + self.good[self.folder / name] for i, name in enumerate(self.reader.files)]
        seeds += [b"\0" + content for content in self.reader.seeds]
        for i, name in enumerate(self.reader.files):
            if name.endswith(".gguf"):
                bad = [content for content, _ in malformed_gguf.BAD.values()]
                seeds += [bytes([i]) + content for content in (*bad, *malformed_gguf.GOOD.values())]
        return seeds

    def __call__(self, data: bytes) -> None:
        if not data:
            return
        path = self.folder / self.reader.files[data[0] % len(self.reader.files)]
        path.write_bytes(data[1:])
        try:
            self.reader.sign(self.folder)
            self.reader.read(self.folder)
        except HotcoldError as error:
            assert str(error).isprintable()
        finally:
            path.write_bytes(self.good[path])
            for name in ("manifest.json", "manifest.jsonl"):
                if self.folder / name in self.good:
                    (self.folder / name).write_bytes(self.good[self.folder / name])


def custom_mutator(data: bytes, max_size: int, seed: int) -> bytes:
    """Half of the mutations are of values in JSON or GGUF metadata, where there are any."""
    known = gguf_values if data[1:5] in (b"GGUF", b"PWRI") else mutations
    changed = known.mutate(data[1:], seed) if seed % 2 else None
    mutated = atheris.Mutate(data, max_size) if changed is None else data[:1] + changed
    return mutated[:max_size]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=readers.READERS)
    parser.add_argument("--seconds", type=int, required=True)
    parser.add_argument("--crashes", type=Path, required=True, help="folder for inputs that break a reader")
    parser.add_argument("--timeout", type=int, default=60, help="seconds for one input")
    parser.add_argument("--seed", type=int, default=0, help="the same inputs in each run; 0: others")
    args = parser.parse_args()
    instrument()
    crashes = args.crashes.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)  # what is compared with a path must not differ from run to run
        folder, corpus = Path("folder"), Path("corpus")
        folder.mkdir()
        corpus.mkdir()
        target = Target(args.name, folder)
        for number, seed in enumerate(target.seeds()):
            (corpus / f"{number:03d}").write_bytes(seed)
        options = {
            "max_total_time": args.seconds, "max_len": 16384, "timeout": args.timeout, "rss_limit_mb": 1024,
            "seed": args.seed, "reload": 0, "print_final_stats": 1,
            "artifact_prefix": f"{crashes / args.name.replace(' ', '-')}-",
        }  # fmt: skip
        flags = [f"-{key}={value}" for key, value in options.items()]
        atheris.Setup([sys.argv[0], *flags, str(corpus)], target, custom_mutator=custom_mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
