"""Fuzz every reader: `python tests/fuzz/run.py --seconds 60`, two at a time. Exit status 1 if one breaks.

Prints a line per reader: how many inputs it took, how many a second, and what came of it.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "support"))


def fuzz(name: str, args: argparse.Namespace) -> tuple[bool, str]:
    """Whether a reader took all inputs, and a line about it."""
    command = [sys.executable, HERE / "fuzz_reader.py", name]
    for option in ("seconds", "crashes", "timeout", "seed"):
        command += [f"--{option}", str(getattr(args, option))]
    # Sets of strings have another order in each process, unless their hashes are seeded too.
    environment = os.environ | ({"PYTHONHASHSEED": str(args.seed)} if args.seed else {})
    begun = time.monotonic()
    child = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    output = child.stdout.decode(errors="replace")
    found = re.search(r"stat::number_of_executed_units:\s*(\d+)", output)
    inputs = int(found[1]) if found else 0
    good = child.returncode == 0 and inputs > 0
    rate = inputs / (time.monotonic() - begun)
    line = f"{name:<18}{inputs:>12,} inputs {rate:>8,.0f}/s  {'ok' if good else 'BROKEN'}"
    return good, line if good else f"{line}\n{output[-2500:]}"


def main() -> int:
    from readers import READERS

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, help="for each reader (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="readers at a time (default: %(default)s)")
    parser.add_argument("--crashes", type=Path, default=Path("crashes"), help="folder for inputs that break")
    parser.add_argument("--timeout", type=int, default=60, help="for one input (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the same inputs in each run; 0: others")
    parser.add_argument("names", nargs="*", help="readers (default: all)", choices=[[], *READERS])
    args = parser.parse_args()
    args.crashes.mkdir(parents=True, exist_ok=True)
    broken = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        for good, line in pool.map(lambda name: fuzz(name, args), args.names or READERS):
            print(line, flush=True)
            broken += not good
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
