"""Killed at any moment, with any system call failing: collect-traces still comes out byte for byte."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from hotcold import storage
from hotcold.cli import main
from hotcold.errors import StorageError
from hotcold.model import checkpoint
from hotcold.predictor.traces.collect import collect, gather_tokens
from hotcold.predictor.traces.reader import TraceRun, read_manifest, tokens_digest
from hotcold.predictor.traces.writer import TraceWriter


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Real processes, forked from a server that has imported torch, so that each starts in no time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "hotcold.cli",
            "hotcold.predictor.traces.collect_command",
            "transformers.models.llama.modeling_llama",
        ]
    )
    return context


def _lines(out: Path) -> int:
    try:
        return (out / "manifest.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _kill_when(process: multiprocessing.Process, ready: Callable[[], bool]) -> bool:
    """Start a process, SIGKILL it as soon as `ready`; True if that was before its end."""
    process.start()
    while process.is_alive() and not ready():
        time.sleep(0.0002)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def test_sigkill_at_many_moments(
    processes: multiprocessing.context.BaseContext,
    model: Path, text: Path, traces: Path, tmp_path: Path, collect_arguments: Callable, snapshot: Callable,
) -> None:  # fmt: skip
    out = tmp_path / "traces"
    arguments = collect_arguments(model, text, out)
    rng = random.Random(0)
    moments: list[Callable[[], bool]] = [
        out.exists,
        lambda: any(out.glob(".tokens*")),
        lambda: (out / "tokens.safetensors").exists(),
        (out / "run.json").exists,
        lambda: any(out.glob("layer-*/.*.tmp")),
    ]
    for lines in (1, 2, 7, 16, 27):
        until, wait = lines, rng.uniform(0, 0.01)
        moments.append(lambda until=until, wait=wait: _lines(out) >= until and not time.sleep(wait))
    killed = 0
    for moment in moments:
        killed += _kill_when(processes.Process(target=main, args=(arguments,)), moment)
        shards = _lines(out)
    assert killed >= len(moments) - 2 and shards > 0
    finisher = processes.Process(target=main, args=(arguments,))
    finisher.start()
    finisher.join()
    assert finisher.exitcode == 0
    assert snapshot(out) == snapshot(traces)


class FailingDisk(storage.FileSystem):
    """Fails its `fail_at`-th call with `code`; a failing write leaves half of its bytes behind."""

    def __init__(self, fail_at: int, code: int) -> None:
        self.fail_at, self.code, self.calls = fail_at, code, 0

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise OSError(self.code, os.strerror(self.code))

    def open(self, path, mode):
        self._count()
        return super().open(path, mode)

    def write(self, file, data):
        try:
            self._count()
        except OSError:
            super().write(file, data[: len(data) // 2])
            raise
        super().write(file, data)

    def fsync(self, file):
        self._count()
        super().fsync(file)

    def replace(self, source, target):
        self._count()
        super().replace(source, target)

    def fsync_directory(self, path):
        self._count()
        super().fsync_directory(path)

    def unlink(self, path):
        self._count()
        super().unlink(path)


@pytest.fixture(scope="module")
def small_run(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`collect_into(folder)`: two shards of two layers in this process; `whole`: how they come out."""
    loaded = checkpoint.load_model(str(model))
    tokens = gather_tokens(str(text), checkpoint.load_tokenizer(str(model)), 60)
    run = TraceRun("tiny", "f" * 64, 2, 32, 44, "relu", "salad", tokens_digest(tokens), 60, 40, 20, 1)

    def collect_into(folder: Path) -> None:
        with TraceWriter.open(folder, run, tokens) as writer:
            collect(loaded, checkpoint.ffn_layers(loaded), tokens, writer)

    whole = tmp_path_factory.mktemp("small") / "whole"
    collect_into(whole)
    return SimpleNamespace(collect_into=collect_into, run=run, whole=whole)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_every_system_call_may_fail(
    small_run: SimpleNamespace, tmp_path: Path, snapshot: Callable, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    whole, failures = snapshot(small_run.whole), 0
    for fail_at in range(1, 1000):
        out = tmp_path / f"{fail_at}"
        disk = FailingDisk(fail_at, code)
        monkeypatch.setattr(storage, "fs", disk)
        try:
            small_run.collect_into(out)
        except StorageError as error:
            failures += 1
            assert os.strerror(code) in str(error) and str(out) in str(error)
        finally:
            monkeypatch.undo()
        for shard in read_manifest(out, small_run.run):
            shard.read(out)  # whatever is listed is whole
        small_run.collect_into(out)
        assert snapshot(out) == whole
        if disk.calls < fail_at:
            break
    assert failures > 30 and failures >= fail_at - 8


@pytest.mark.parametrize("keep", [0, 1, 100, 400])
def test_a_torn_manifest_line_does_not_count(
    small_run: SimpleNamespace, tmp_path: Path, snapshot: Callable, keep: int
) -> None:
    out = shutil.copytree(small_run.whole, tmp_path / "traces")
    manifest = out / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:keep])
    small_run.collect_into(out)
    assert snapshot(out) == snapshot(small_run.whole)


def test_a_damaged_shard_is_collected_again(
    small_run: SimpleNamespace, tmp_path: Path, snapshot: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(small_run.whole, tmp_path / "traces")
    shard = out / "layer-001" / "shard-000000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    small_run.collect_into(out)
    assert snapshot(out) == snapshot(small_run.whole)
    assert "shard-000000.safetensors, sha256: damaged shard" in capsys.readouterr().err


def test_two_writers_do_not_meet(
    model: Path, text: Path, traces: Path, collect_arguments: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    descriptor = os.open(traces, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert main(collect_arguments(model, text, traces)) == 2
    finally:
        os.close(descriptor)
    assert "another process is writing here" in capsys.readouterr().err


def test_interrupt_keeps_what_was_committed(
    small_run: SimpleNamespace, tmp_path: Path, snapshot: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = tmp_path / "traces", TraceWriter.write

    def write_then_interrupt(
        self: TraceWriter, layer: int, shard: int, *rest: object, **named: object
    ) -> None:
        write(self, layer, shard, *rest, **named)
        if (layer, shard) == (0, 1):
            raise KeyboardInterrupt

    monkeypatch.setattr(TraceWriter, "write", write_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        small_run.collect_into(out)
    assert len(read_manifest(out, small_run.run)) == 3
    monkeypatch.undo()
    small_run.collect_into(out)
    assert snapshot(out) == snapshot(small_run.whole)
