"""Whatever fails, at whatever operation: the old state or the new one, nothing half-written, no junk.

Every operation of every kind of write is made to fail in turn, with several errors, until a run gets through
without meeting the fault. Besides: real kills, a real limit on file size, and a reader beside a writer.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from faulty import FAULTS, FaultyFileSystem, WithoutExchange, tree
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save

from hotcold import storage
from hotcold.errors import StorageError


def put_file(folder, content):
    storage.write_bytes(folder / "file", content)


def put_json(folder, content):
    storage.write_json(folder / "value.json", {"content": content.decode()})


def put_tensors(folder, content):
    array = np.frombuffer(content, np.uint8)
    storage.write_tensors(folder / "t.safetensors", {"b": array, "a": array[:1]}, {"key": "value"})


def put_line(folder, content):
    storage.append_line(folder / "journal", content.decode())


def put_directory(folder, content):
    with storage.atomic_directory(folder / "sub", "checkpoint") as inside:
        (inside / "manifest.json").write_bytes(content)
        (inside / "deep").mkdir()
        storage.write_bytes(inside / "deep" / "data", content)


WRITES = [put_file, put_json, put_tensors, put_line, put_directory]


@pytest.mark.parametrize("before,fault", [(None, "ENOSPC"), *((b"old", fault) for fault in FAULTS)])
@pytest.mark.parametrize(
    "write,kind", [*((write, FaultyFileSystem) for write in WRITES), (put_directory, WithoutExchange)]
)
def test_a_fault_at_any_operation(tmp_path, monkeypatch, write, kind, before, fault):
    for n in range(1, 100):
        folder, expected = tmp_path / str(n), tmp_path / f"{n} new"
        for place in folder, expected:
            place.mkdir()
            if before:
                write(place, before)
        old = tree(folder)
        write(expected, b"new content")
        faulty = kind(n, fault)
        with monkeypatch.context() as patch:
            patch.setattr(storage, "fs", faulty)
            try:
                write(folder, b"new content")
            except (StorageError, KeyboardInterrupt) as error:
                raised = error
            else:
                raised = None
        assert (raised is not None) == faulty.struck
        assert tree(folder) in (old, tree(expected)) if raised else tree(folder) == tree(expected)
        if not raised:
            break
        if fault == "ENOSPC":
            assert "No space left on device; free some space and run again" in str(raised)
        if tree(folder) == old:
            write(folder, b"new content")
            assert tree(folder) == tree(expected)
    assert n > 2, "no fault was met"


def test_a_failed_delete_does_not_hide_the_first_error(tmp_path, monkeypatch):
    class Stuck(FaultyFileSystem):
        def unlink(self, path):
            raise OSError(errno.EACCES, "cannot delete")

    monkeypatch.setattr(storage, "fs", Stuck(2, "EIO"))
    with pytest.raises(StorageError, match="Input/output error"):
        put_file(tmp_path, b"content")


@pytest.mark.parametrize("write", [put_file, put_line, put_directory])
def test_a_real_limit_on_file_size(tmp_path, write):
    """The kernel itself refuses the write, at whatever call Python's buffering makes it in."""
    write(tmp_path, b"old")
    old = tree(tmp_path)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write(tmp_path, b"x" * 100_000)
        except (StorageError, OSError) as error:
            os._exit(7 if isinstance(error, StorageError) else 8)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert tree(tmp_path) == old


def test_errors_of_the_block_itself_pass_through(tmp_path):
    with pytest.raises(FileNotFoundError), storage.atomic_file(tmp_path / "file"):
        (tmp_path.parent / "no such input").read_bytes()
    with pytest.raises(ValueError), storage.atomic_directory(tmp_path / "sub", "checkpoint"):
        raise ValueError
    assert tree(tmp_path) == {} and list(tmp_path.iterdir()) == []


def test_a_disk_error_inside_of_the_block_is_a_storage_error(tmp_path):
    with (
        pytest.raises(StorageError, match="sub: No space left on device"),
        storage.atomic_directory(tmp_path / "sub", "checkpoint"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(StorageError, match="Is a directory"),
        storage.atomic_directory(tmp_path / "sub", "checkpoint") as folder,
    ):
        folder.write_bytes(b"")


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("years of work")
    with pytest.raises(
        StorageError, match="home: not empty, and hotcold did not write it; choose another folder"
    ):
        storage.atomic_directory(foreign, "checkpoint").__enter__()
    (tmp_path / "plain").write_text("file")
    with pytest.raises(StorageError, match="plain: a file, not a folder"):
        storage.atomic_directory(tmp_path / "plain", "checkpoint").__enter__()
    assert tree(tmp_path) == {"home/thesis.tex": b"years of work", "plain": b"file"}


def test_an_empty_folder_and_one_of_ours_are_replaced(tmp_path):
    (tmp_path / "sub").mkdir()
    put_directory(tmp_path, b"first")
    put_directory(tmp_path, b"second")
    found = tree(tmp_path)
    assert json.loads(found.pop("sub/hotcold.json"))["kind"] == "checkpoint"
    assert found == {"sub/manifest.json": b"second", "sub/deep/data": b"second"}


def test_the_current_folder_can_be_named_with_a_dot(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    with storage.atomic_directory(".", "checkpoint") as folder:
        (folder / "config.json").write_text("{}")
    assert set(tree(tmp_path)) == {"sub/config.json", "sub/hotcold.json"}


def test_parents_are_made_and_paths_may_hold_anything(tmp_path):
    for name in "[a]*?.json", "-n", "Größe 東京":
        path = tmp_path / "a" / name / name
        storage.write_bytes(path, b"1")
        assert path.read_bytes() == b"1"


class TestJournal:
    def test_lines_in_order(self, tmp_path):
        for line in "one", "two":
            storage.append_line(tmp_path / "journal", line)
        assert (tmp_path / "journal").read_text() == "one\ntwo\n"

    @given(torn=st.binary(max_size=30).filter(lambda data: b"\n" not in data), whole=st.integers(0, 3))
    def test_a_torn_last_line_is_cut_off(self, tmp_path_factory, torn, whole):
        path = tmp_path_factory.mktemp("journal") / "journal"
        path.write_bytes(b"line\n" * whole + torn)
        storage.append_line(path, "next")
        assert path.read_bytes() == b"line\n" * whole + b"next\n"

    def test_a_torn_line_longer_than_one_read(self, tmp_path):
        path = tmp_path / "journal"
        path.write_bytes(b"line\n" + b"x" * (3 << 20))
        storage.append_line(path, "next")
        assert path.read_bytes() == b"line\nnext\n"


WRITER = """
import sys
from pathlib import Path
from hotcold import storage
folder = Path(sys.argv[1])
print("ready", flush=True)
for i in range(10**9):
    content = b"%d " % i * 5000
    storage.write_bytes(folder / "file", content)
    with storage.atomic_directory(folder / "sub", "checkpoint") as inside:
        for name in "config.json", "b":
            (inside / name).write_bytes(content)
    storage.append_line(folder / "journal", str(i))
"""


def test_kill_at_any_moment(tmp_path):
    """SIGKILL leaves whole states, and the next write clears away what the killed process left."""
    rng = np.random.default_rng(0)
    for _ in range(12):
        command = [sys.executable, "-c", WRITER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            child.stdout.readline()
            time.sleep(float(rng.uniform(0.005, 0.1)))
            child.kill()
        for content in (tmp_path / "file", tmp_path / "sub" / "b", tmp_path / "sub" / "config.json"):
            if content.exists():
                numbers = content.read_bytes().split()
                assert len(numbers) == 5000 and len(set(numbers)) == 1
        if (tmp_path / "sub").exists():
            assert len({data for name, data in tree(tmp_path / "sub").items() if name != "hotcold.json"}) == 1
    put_file(tmp_path, b"x")
    put_directory(tmp_path, b"x")
    put_line(tmp_path, b"0")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "journal", "sub"]
    for line in (tmp_path / "journal").read_text().splitlines():
        int(line)


def test_a_living_writer_is_not_swept_away(tmp_path):
    with storage.atomic_file(tmp_path / "file") as first:
        first.write(b"first")
        child = os.fork()  # a second process: locks are between processes
        if child == 0:
            put_file(tmp_path, b"second")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert (tmp_path / "file").read_bytes() == b"second"
    assert tree(tmp_path) == {"file": b"first"}


def test_only_what_a_killed_process_left_is_swept_away(tmp_path):
    mine = {".file.backup.tmp", ".file.0123456.tmp", ".file.0123456g.tmp", ".file.01234567.tmp.old", "tmp"}
    for name in (*mine, ".file.01234567.tmp"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".sub.old.tmp").mkdir()
    (tmp_path / ".sub.89abcdef.tmp" / "deep").mkdir(parents=True)
    put_file(tmp_path, b"x")
    put_directory(tmp_path, b"x")
    assert {path.name for path in tmp_path.iterdir()} == {*mine, ".sub.old.tmp", "file", "sub"}


def test_nobody_sweeps_away_what_has_just_been_made(tmp_path):
    """Two processes write the same file and each its own folder, while a third does nothing but sweep."""
    sweeper = os.fork()
    if sweeper == 0:
        while True:
            for name in ("file", "sub", "other"):
                storage._sweep(tmp_path / name)
    try:
        writer = os.fork()
        if writer == 0:
            for _ in range(50):
                put_file(tmp_path, b"child")
                put_directory(tmp_path / "other", b"child")
            os._exit(0)
        for _ in range(50):
            put_file(tmp_path, b"parent")
            put_directory(tmp_path, b"parent")
        assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == 0
    finally:
        os.kill(sweeper, signal.SIGKILL)
        os.waitpid(sweeper, 0)
    put_file(tmp_path, b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other", "sub"]


def test_a_reader_sees_whole_folders_only(tmp_path):
    """While a folder is replaced over and over, it is never missing and its files are of one generation."""
    put_directory(tmp_path, b"start")
    child = os.fork()
    if child == 0:
        for i in range(30):
            put_directory(tmp_path, b"%d" % i)
        os._exit(0)
    seen = 0
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        folder = os.open(tmp_path / "sub", os.O_RDONLY)
        try:
            descriptor = os.open("manifest.json", os.O_RDONLY, dir_fd=folder)
            seen += len(os.read(descriptor, 10)) > 0
            os.close(descriptor)
        except FileNotFoundError:
            pass  # that generation was deleted after we had opened it
        os.close(folder)
    assert seen > 0


def test_what_is_written(tmp_path):
    storage.write_json(tmp_path / "a.json", {"name": "Größe", "n": 1})
    assert (tmp_path / "a.json").read_text() == '{\n  "name": "Größe",\n  "n": 1\n}\n'
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"name": "Größe", "n": 1}
    tensors = {"z": np.arange(6, dtype=np.float16).reshape(2, 3), "a": np.zeros(0, np.uint8)}
    storage.write_tensors(tmp_path / "t", tensors)
    first = (tmp_path / "t").read_bytes()
    storage.write_tensors(tmp_path / "t", dict(reversed(tensors.items())))
    assert (tmp_path / "t").read_bytes() == first
    loaded = load_file(tmp_path / "t")
    for name, array in tensors.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype


DTYPES = ["?", "u1", "i1", "i2", "u2", "f2", "i4", "u4", "f4", "f8", "i8", "u8"]


ARRAYS = st.tuples(st.sampled_from(DTYPES), st.integers(0, 5))


@given(st.dictionaries(st.text(max_size=9), ARRAYS, max_size=6))
def test_tensors_are_written_as_the_safetensors_library_does(tmp_path_factory, kinds):
    tensors = {name: np.ones((n, 2), dtype) for name, (dtype, n) in kinds.items()}
    tensors.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("tensors") / "t"
    for metadata in (None, {"format": "pt"}):
        storage.write_tensors(path, tensors, metadata)
        assert path.read_bytes() == save(tensors, metadata)


def test_sha256_with_progress(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 500_000)
    sizes: list[int] = []
    digest = storage.sha256_file(tmp_path / "file", sizes.append)
    assert digest == hashlib.sha256(b"abc" * 500_000).hexdigest()
    assert sum(sizes) == 1_500_000 and len(sizes) > 1
