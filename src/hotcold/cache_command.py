"""`hotcold cache`: list what hotcold keeps to avoid repeating work, or remove it."""

from __future__ import annotations

import argparse
import time

from hotcold import cache
from hotcold.errors import InputError
from hotcold.progress import log

HELP = (
    "List or clear what hotcold keeps in $XDG_CACHE_HOME/hotcold (~/.cache/hotcold): converted models, the "
    "fastest mode of each model, tile sizes of GPU kernels, and file hashes. Everything is recreated when "
    "needed. HOTCOLD_CACHE_LIMIT=20G limits the converted models (default: 50 GiB, or a tenth of the free "
    "disk space if that is less); the least recently used ones are removed first."
)
EXAMPLE = "hotcold cache list"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("action", choices=("list", "clear"), help="show the entries, or remove them")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="names of entries, or prefixes of them (default: all)"
    )


def run(args: argparse.Namespace) -> int:
    """List the entries, or remove them and print what was freed."""
    found = _matching(args.names)
    if args.action == "list":
        for entry in reversed(found):
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
            print(f"{entry.name:<36}  {entry.bytes:>15,} bytes  {used}  {entry.source}")
        return 0
    if not args.names:
        cache.sweep()
    removed = [entry for entry in found if _removed(entry)]
    print(f"{len(removed)} entries removed, {sum(entry.bytes for entry in removed):,} bytes")
    return 0


def _matching(names: list[str]) -> list[cache.Entry]:
    found = cache.entries()
    for name in names:
        if not any(entry.name.startswith(name) for entry in found):
            raise InputError("no such entry in the cache", got=name, fix="see `hotcold cache list`")
    return [entry for entry in found if not names or any(entry.name.startswith(name) for name in names)]


def _removed(entry: cache.Entry) -> bool:
    if cache.remove(entry):
        return True
    log(f"{entry.name}: in use, not removed")
    return False
