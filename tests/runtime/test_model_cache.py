"""Hugging Face checkpoints that are run: converted once, kept, shared by processes, given up when full."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_families import FAMILIES, IDS, write_model

from hotcold import cache, cli
from hotcold.convert.bundle.verify import verify_bundle
from hotcold.errors import InputError, UnsupportedError
from hotcold.runtime.bundle_files import find_model
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.model_cache import limit

RUN = "import sys; from hotcold.cli import main; sys.exit(main())"


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hotcold" / "models"


@pytest.fixture
def checkpoint(tmp_path, bundle) -> Path:
    """A tiny Llama with a tokenizer, in a folder with an odd name."""
    folder = tmp_path / ".my model (1)"
    write_model(folder, FAMILIES["llama"])
    bundle.model.save_pretrained(folder)
    bundle.tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def bundles(models: Path) -> list[Path]:
    return sorted(path for path in models.iterdir() if path.is_dir() and not path.name.startswith("."))


def test_a_checkpoint_is_converted_once(checkpoint, models, capsys):
    first = find_model(str(checkpoint), "f16")
    assert verify_bundle(first) == []
    assert "converting" in capsys.readouterr().err
    written = (first / "manifest.json").stat().st_ino
    assert find_model(str(checkpoint), "f16") == first
    assert "converting" not in capsys.readouterr().err
    assert (first / "manifest.json").stat().st_ino == written
    assert find_model(str(checkpoint)) != first  # q8_0
    (checkpoint / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert find_model(str(checkpoint), "f16") != first
    assert len(bundles(models)) == 3


def test_what_runs_is_the_checkpoint(checkpoint):
    import torch
    from transformers import AutoModelForCausalLM

    engine = Engine.load(find_model(str(checkpoint), "f16"), "exact", 1, 64)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(checkpoint)(
            torch.from_numpy(np.array([IDS[:20]], np.int64))
        ).logits[0, -1]
    np.testing.assert_allclose(engine.prefill(IDS[:20]), expected, atol=0.1, rtol=0.02)


def test_a_type_for_what_has_its_own_is_refused(bundle, checkpoint):
    with pytest.raises(InputError, match="weights of this model already have their types"):
        find_model(bundle.path, "q4_0")
    with pytest.raises(UnsupportedError, match="unknown quantization"):
        find_model(str(checkpoint), "q2")


def test_two_processes_convert_once_and_say_the_same(checkpoint, models):
    arguments = ("run", checkpoint, "-p", "The quick", "-n", "8", "--temp", "0", "-t", "1")
    racers = [start(*arguments) for _ in range(3)]
    told = [racer.communicate() for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0], told
    assert len({out for out, _ in told}) == 1
    assert sum("to q8_0; the result is kept" in err for _, err in told) == 1
    assert len(bundles(models)) == 1


def test_a_killed_conversion_leaves_nothing_that_is_used(checkpoint, models):
    code = (
        "import os, signal; from hotcold.convert.bundle import export\n"
        f"export.is_exact = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n{RUN}"
    )
    child = subprocess.run([sys.executable, "-c", code, "run", str(checkpoint), "-p", "a", "-n", "1"])
    assert child.returncode == -signal.SIGKILL
    assert list(models.glob(".*.tmp")) and bundles(models) == []
    bundle = find_model(str(checkpoint))
    assert verify_bundle(bundle) == [] and bundles(models) == [bundle] and not list(models.glob(".*"))
    record = bundle.with_name(f"{bundle.name}.json")
    record.unlink()  # as if killed before it was written
    cache.release(bundle)
    (bundle / "tokenizer.json").write_text("{}")
    assert find_model(str(checkpoint)) == bundle and verify_bundle(bundle) == [] and record.exists()


def test_a_bundle_that_lost_a_file_is_made_again(checkpoint):
    bundle = find_model(str(checkpoint))
    next(bundle.glob("*.gguf")).unlink()
    assert find_model(str(checkpoint)) == bundle and verify_bundle(bundle) == []


def test_the_least_recently_used_go_and_none_in_use(checkpoint, models, monkeypatch):
    """What this process has opened is in use, so that others have to make the entries."""
    old, used = (convert_elsewhere(checkpoint, quant) for quant in ("f16", "f32"))
    for entry, second in zip(cache.entries("models"), (20, 10), strict=True):
        os.utime(entry.record, (second, second))
    held = find_model(str(checkpoint), "f32")  # used now, and in use
    size = sum(entry.bytes for entry in cache.entries("models"))
    monkeypatch.setenv("HOTCOLD_CACHE_LIMIT", f"{size + 1000}B")
    newest = convert_elsewhere(checkpoint, "q8_0")
    assert set(bundles(models)) == {held, newest} and held == used and old not in bundles(models)
    monkeypatch.setenv("HOTCOLD_CACHE_LIMIT", "1B")
    convert_elsewhere(checkpoint, "q4_0")
    assert held in bundles(models) and newest not in bundles(models)


def convert_elsewhere(checkpoint: Path, quant: str) -> Path:
    find = "from hotcold.runtime.bundle_files import find_model"
    code = f"{find}; print(find_model({str(checkpoint)!r}, {quant!r}))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return Path(done.stdout.strip())


def test_the_limit(monkeypatch, tmp_path):
    monkeypatch.delenv("HOTCOLD_CACHE_LIMIT", raising=False)
    free = shutil.disk_usage(tmp_path).free
    assert limit() == pytest.approx(min(50 << 30, free / 10), rel=0.05)
    monkeypatch.setenv("HOTCOLD_CACHE_LIMIT", "3G")
    assert limit() == 3 << 30
    monkeypatch.setenv("HOTCOLD_CACHE_LIMIT", "much")
    with pytest.raises(InputError, match="not a size"):
        limit()


def test_a_folder_without_a_model(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert cli.main(["run", str(tmp_path / "empty"), "-p", "a"]) == 2
    assert "neither a bundle nor a checkpoint" in capsys.readouterr().err
