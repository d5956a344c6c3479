"""The user's cache: where it is, what is remembered of files, and that only hotcold's own is removed."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from hotcold import cache, storage
from hotcold.cli import main
from hotcold.errors import StorageError

KEY = "0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "hotcold"


def model(root: Path, key: str = KEY, n_bytes: int = 100) -> Path:
    """A model's entry, as runtime/model_cache.py leaves it."""
    bundle = root / "models" / key
    (bundle / "predictors").mkdir(parents=True)
    for name in ("m.gguf", "predictors/p", "manifest.json"):
        (bundle / name).write_bytes(bytes(n_bytes))
    files = ["m.gguf", "predictors/p", "manifest.json"]
    storage.write_json(bundle.with_name(f"{key}.json"), {"source": "org/model", "files": files})
    return bundle


LARGE = bytes(1 << 20)  # what is worth remembering


def python(code: str, **more) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, **more)


def test_a_relative_place_is_ignored(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("", "cache"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert cache.folder("models") == tmp_path / ".cache" / "hotcold" / "models"


def test_a_hash_is_remembered_till_the_file_changes(tmp_path, root):
    path = tmp_path / "weights"
    path.write_bytes(b"one" + LARGE)
    assert cache.sha256(path) == hashlib.sha256(b"one" + LARGE).hexdigest()
    (record,) = (root / "hashes").iterdir()
    storage.write_json(record, json.loads(record.read_text()) | {"sha256": "remembered"})
    assert cache.sha256(path) == "remembered"
    path.write_bytes(b"two" + LARGE)
    assert cache.sha256(path) == hashlib.sha256(b"two" + LARGE).hexdigest()


@pytest.mark.parametrize("content", ["", "[]", "{", '{"state": 1, "sha256": 2}', "[" * 100_000])
def test_a_damaged_record_is_as_none(tmp_path, root, content):
    path = tmp_path / "weights"
    path.write_bytes(b"one" + LARGE)
    expected = cache.sha256(path)
    (record,) = (root / "hashes").iterdir()
    record.write_text(content)
    assert cache.sha256(path) == expected


def test_one_process_at_a_time_and_the_other_says_that_it_waits(tmp_path, capsys):
    code = (
        "import sys, time; from pathlib import Path; from hotcold import cache\n"
        f"with cache.exclusive(Path({str(tmp_path / 'x')!r}), 'waits'):\n"
        "    print('has it', flush=True); time.sleep(0.5); print(time.monotonic(), flush=True)"
    )
    with python(code) as child:
        assert child.stdout.readline() == "has it\n"
        with cache.exclusive(tmp_path / "x", "waits for the child"):
            import time

            assert time.monotonic() >= float(child.stdout.readline())
    assert capsys.readouterr().err == "waits for the child\n"


def test_a_lock_that_is_not_needed_does_without_a_place(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with cache.exclusive(blocked / "x", "waits", needed=False):
        pass
    with pytest.raises(StorageError, match="set XDG_CACHE_HOME"), cache.exclusive(blocked / "x", "waits"):
        pass


def test_list_and_clear(root, capsys):
    model(root)
    storage.write_json(root / "auto-mode" / f"{KEY}.json", {"mode": "exact", "source": "b"})
    storage.write_json(root / "triton" / "H100-triton-3.5.json", {})
    assert main(["cache", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {
        f"models/{KEY}",
        f"auto-mode/{KEY}",
        "triton/H100-triton-3.5",
    }
    (line,) = (line for line in lines if line.startswith("models"))
    record = (root / "models" / f"{KEY}.json").stat().st_size
    assert f"{300 + record} bytes" in line and line.endswith("org/model")
    assert main(["cache", "clear", "auto"]) == 0
    assert not (root / "auto-mode" / f"{KEY}.json").exists() and (root / "models" / KEY).exists()
    assert main(["cache", "clear"]) == 0
    assert [path for path in root.rglob("*") if path.is_file()] == []
    capsys.readouterr()
    assert main(["cache", "clear", "models/nothing"]) == 2
    assert "no such entry in the cache (got models/nothing)" in capsys.readouterr().err


def test_clearing_leaves_what_others_wrote(root, tmp_path):
    bundle = model(root)
    outside = tmp_path / "outside"
    outside.write_text("mine")
    record = bundle.with_name(f"{KEY}.json")
    files = ["m.gguf", "../../../outside", str(outside), "link", 7]
    storage.write_json(record, {"source": "x", "files": files})
    (bundle / "link").symlink_to(outside)
    linked = model(tmp_path / "elsewhere", KEY[::-1])
    linked.with_name(f"{KEY[::-1]}.json").rename(root / "models" / f"{KEY[::-1]}.json")
    (root / "models" / KEY[::-1]).symlink_to(linked)
    foreign = [bundle / "notes.txt", root / "models" / "notes.txt", root / "auto-mode" / "mine.json"]
    foreign += [root / "triton" / "mine.json", root / "notes.txt"]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    assert main(["cache", "clear"]) == 0
    assert all(path.read_text() == "mine" for path in [*foreign, outside])
    assert not (bundle / "m.gguf").exists() and not record.exists()
    assert (linked / "m.gguf").exists() and (linked / "predictors" / "p").exists()


def test_what_is_in_use_stays(root, capsys):
    bundle = model(root)
    code = (
        "import sys; from pathlib import Path; from hotcold import cache\n"
        f"cache.hold(Path({str(bundle)!r}), ''); print('held', flush=True); sys.stdin.read()"
    )
    with python(code, stdin=subprocess.PIPE) as child:
        assert child.stdout.readline() == "held\n"
        assert main(["cache", "clear"]) == 0
        assert "in use, not removed" in capsys.readouterr().err and (bundle / "m.gguf").exists()
        child.stdin.close()
    assert main(["cache", "clear"]) == 0
    assert not bundle.exists()


def test_what_killed_conversions_left_is_swept(root):
    left = root / "models" / f".{KEY}.0a1b2c3d.tmp"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"half")
    with storage.atomic_directory(root / "models" / KEY, "bundle") as at_work:
        cache.sweep()
        assert not left.exists() and at_work.exists()
