"""Broken files of every format: the class of error, the place that it names, and little memory and time.

Each reader is given its good folder with one thing wrong. Time and memory are measured in a process of
their own, where nothing else is going on.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import malformed
import malformed_gguf
import pytest
from readers import READERS

ROOT = Path(__file__).parents[2]


def made(name: str, folder: Path) -> malformed.Case:
    """A broken folder, its hashes those of what lies in it."""
    case = malformed.CASES[name]
    reader = READERS[case.reader]
    reader.make(folder)
    case.edit(folder)
    if "altered" not in case.place and "missing" not in name:
        reader.sign(folder)
    return case


@pytest.mark.parametrize("name", READERS)
def test_what_is_made_by_hand_from_the_document_is_read(name, tmp_path):
    reader = READERS[name]
    reader.make(tmp_path)
    reader.read(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    reader.sign(tmp_path)
    reader.read(tmp_path)
    assert all(path in before for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", malformed.CASES)
def test_a_broken_folder_is_refused_by_what_is_broken(name, tmp_path):
    case = made(name, tmp_path)
    if case.reader == "bundle":
        from hotcold.convert.bundle.verify import verify_bundle

        (error,) = verify_bundle(tmp_path)
    else:
        with pytest.raises(case.error) as caught:
            READERS[case.reader].read(tmp_path)
        error = caught.value
    assert type(error) is case.error
    assert case.place in str(error)
    assert str(error).isprintable() and len(str(error)) < 1000


def test_every_reader_has_its_cases():
    """The table of docs/formats.md."""
    counted = Counter(case.reader for case in malformed.CASES.values())
    counted["gguf"] = len(malformed_gguf.BAD)
    table = (ROOT / "docs/formats.md").read_text().split("<!-- malformed -->")[1]
    rows = dict(line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:])
    assert rows == {name: str(n) for name, n in counted.items()}
    assert counted.total() >= 80


MEASURE = """
import json, resource, sys, tempfile, time
from pathlib import Path
from hotcold.errors import HotcoldError
import malformed, malformed_gguf
from readers import READERS
from hotcold.files.gguf import GGUFFile

def folders():
    for name, case in malformed.CASES.items():
        reader = READERS[case.reader]
        folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
        reader.make(folder)
        case.edit(folder)
        yield name, lambda: reader.read(folder)
    for name, (content, _) in malformed_gguf.BAD.items():
        path = Path(tempfile.mkdtemp(dir=sys.argv[1]), "m.gguf")
        path.write_bytes(content)
        yield name, lambda: GGUFFile(path)

for name, reader in READERS.items():  # imports and caches are not what is measured
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    reader.make(folder)
    reader.read(folder)
seconds = {}
pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + (256 << 20),) * 2)  # the engine reserves some for its weights
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name, read in folders():
    best = 1e9
    for _ in range(3):  # the least of three: others use the machine too
        begun = time.perf_counter()
        try:
            read()
        except HotcoldError:
            pass
        best = min(best, time.perf_counter() - begun)
    seconds[name] = best
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"seconds": seconds, "KiB": peak}))
"""


def measured(tmp_path: Path) -> tuple[dict[str, float], int]:
    """Seconds per case, and KiB of memory that all took at most beyond what reading good files did."""
    path = f"import sys; sys.path.insert(0, {str(ROOT / 'tests/support')!r})\n"
    child = subprocess.run(
        [sys.executable, "-c", path + MEASURE, tmp_path], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr[-2000:]
    result = json.loads(child.stdout)
    return result["seconds"], result["KiB"]


def test_no_broken_file_takes_64_megabytes(tmp_path):
    """A MemoryError would end that process; so would any other error that is not one of ours."""
    seconds, kib = measured(tmp_path)
    assert len(seconds) == len(malformed.CASES) + len(malformed_gguf.BAD)
    assert kib < 64 << 10


@pytest.mark.slow
def test_no_broken_file_takes_50_milliseconds(tmp_path):
    slowest = sorted(measured(tmp_path)[0].items(), key=lambda item: -item[1])
    assert slowest[0][1] < 0.05, slowest[:5]
