"""Sequences of one engine: what each gives alone it gives beside others, from one thread or several."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import zip_longest
from pathlib import Path

import numpy as np
import pytest
from tiny_families import D_FF

from hotcold.errors import InputError, UnsupportedError
from hotcold.runtime.cpu import _cpu
from hotcold.runtime.cpu.engine import CpuEngine
from hotcold.runtime.gpu.engine import GpuEngine
from hotcold.runtime.gpu.hybrid import HybridEngine
from hotcold.runtime.placement.plan import PlacedLayer, Placement

MODES = ["dense", "exact", "predicted"]
RNG = np.random.default_rng(7)
PROMPTS = [RNG.integers(3, 90, n) for n in (9, 20)]
N_CTX = (40, 64)
N_TOKENS = 14


def open_cpu(bundle, mode):
    return CpuEngine.load(bundle, mode, 2, 64)


def open_device(bundle, mode):
    return GpuEngine.load(bundle, mode, "cpu", n_ctx=64)


def open_devices(bundle, mode):
    """A layer on each of two devices."""
    layers = tuple(PlacedLayer(True, np.arange(D_FF, dtype=np.int32), D_FF, device=i) for i in range(2))
    return HybridEngine.load(bundle, Placement(layers, (1 << 30,) * 2), mode, "cpu,cpu", 2, n_ctx=64)


def open_split(bundle, mode):
    """Neurons of the first layer on both sides, the second on the CPU as a whole."""
    hot = np.arange(D_FF if mode == "dense" else 40, dtype=np.int32)
    layers = (PlacedLayer(True, hot, D_FF), PlacedLayer(False, hot[:0], D_FF))
    return HybridEngine.load(bundle, Placement(layers, (1 << 30,)), mode, "cpu", 2, n_ctx=64)


OPEN = {"cpu": open_cpu, "device": open_device, "devices": open_devices, "split": open_split}
DEVICES = [where for where in OPEN if where != "cpu"]


def generated(sequence, prompt):
    """Logits after the prompt and after each of some greedy tokens, one at a time."""
    logits = sequence.prefill(prompt)
    for _ in range(N_TOKENS):
        yield logits
        logits = sequence.decode(int(logits.argmax()))
    yield logits


def counts(sequence):
    stats = sequence.stats()
    return {f.name: np.asarray(getattr(stats, f.name)).tolist() for f in fields(stats)}


def check_in_turns(engine):
    """Token by token in turns, each as alone: on fresh sequences, and on the engine's own beside another."""
    alone, expected = [], []
    for prompt, n_ctx in zip(PROMPTS, N_CTX, strict=True):
        alone.append(engine.sequence(n_ctx))
        alone[-1].audit = n_ctx == N_CTX[1]
        expected.append(np.stack(list(generated(alone[-1], prompt))))
    assert not np.array_equal(*expected)
    for together in ([engine.sequence(n) for n in N_CTX], [engine.sequence(N_CTX[0]), engine]):
        together[1].audit = True
        steps = zip_longest(*map(generated, together, PROMPTS))
        found = [np.stack(logits) for logits in zip(*steps, strict=True)]
        for i in range(2):
            np.testing.assert_array_equal(found[i], expected[i])
            assert counts(together[i]) == counts(alone[i])
            assert together[i].position == len(PROMPTS[i]) + N_TOKENS
            assert together[i].bytes_per_token() == alone[i].bytes_per_token()


@pytest.mark.parametrize("isa", _cpu.available_isas())
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_in_turns_on_the_cpu(make_bundle, monkeypatch, isa, mode, share):
    monkeypatch.setenv("HOTCOLD_CPU_ISA", isa)
    check_in_turns(CpuEngine.load(make_bundle(quant="Q4_0").path, mode, 2, 64, input_sparsity=share))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["opt", "bamboo", "falcon-7b-relu"])
def test_in_turns_whatever_the_structure(make_bundle_of, name, mode):
    """Learned positions, a window that is shorter than the text, a parallel block without gates."""
    check_in_turns(open_cpu(make_bundle_of(name), mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("name", ["opt", "bamboo"])
def test_in_turns_on_devices(make_bundle_of, name, where, mode):
    check_in_turns(OPEN[where](make_bundle_of(name), mode))


@pytest.fixture(params=OPEN)
def engine(request, make_bundle_of):
    return OPEN[request.param](make_bundle_of("opt"), "predicted")


def test_the_context_is_a_sequences_own(engine):
    short, default = engine.sequence(4), engine.sequence()
    assert (short.n_ctx, default.n_ctx) == (4, 64)
    short.prefill(PROMPTS[0][:4])
    with pytest.raises(InputError, match="the context is full"):
        short.decode(5)
    default.prefill(PROMPTS[0])
    assert (short.position, default.position, engine.position) == (4, len(PROMPTS[0]), 0)
    short.reset()
    short.decode(5)
    with pytest.raises(InputError, match="context size out of range"):
        engine.sequence(0)
    with pytest.raises(InputError, match="the model has no positions for so long a context"):
        engine.sequence(65)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_cache_goes_with_its_sequence(make_bundle):
    engine = CpuEngine.load(make_bundle().path, "exact", 1, 64)
    n_ctx = 400_000
    cache = 2 * 2 * 2 * 2 * 16 * n_ctx  # keys and values of 2 layers, 2 heads and 16 dimensions, in 2 bytes
    before = 0
    for turn in range(2):  # what all sequences compute with is the engine's, and stays
        sequence = engine.sequence(n_ctx)
        sequence.decode(5)
        if turn:
            assert resident_bytes() - before > 0.9 * cache
        del sequence
        assert not turn or resident_bytes() - before < 0.2 * cache
        before = resident_bytes()


@pytest.mark.parametrize("where", OPEN)
def test_weights_go_with_the_last_that_needs_them(make_bundle_of, where):
    """A sequence keeps its engine, and nothing keeps either of them until cycles are collected."""
    engine = OPEN[where](make_bundle_of("opt"), "exact")
    sequence, watched = engine.sequence(), weakref.ref(engine)
    expected = engine.prefill(PROMPTS[0])
    gc.disable()
    try:
        del engine
        assert watched() is not None
        np.testing.assert_array_equal(sequence.prefill(PROMPTS[0]), expected)
        del sequence
        assert watched() is None
    finally:
        gc.enable()


def test_a_sequence_per_thread(engine):
    expected = [np.stack(list(generated(engine.sequence(), prompt))) for prompt in PROMPTS]

    def run(number):
        return np.stack(list(generated(engine.sequence(), PROMPTS[number % 2])))

    with ThreadPoolExecutor(4) as pool:
        for number, found in enumerate(pool.map(run, range(8))):
            np.testing.assert_array_equal(found, expected[number % 2])


def test_two_threads_on_one_sequence(make_bundle):
    """A long prompt is under way: calls on its sequence are refused, those on another one wait."""
    engine = CpuEngine.load(make_bundle().path, "dense", 1, 2048)
    ids, refused = RNG.integers(3, 90, 2048), None
    sequence, other = engine.sequence(), engine.sequence()
    expected = sequence.prefill(ids)
    alone = other.decode(5)
    for _ in range(20):
        sequence.reset()
        found = []
        thread = threading.Thread(target=lambda found=found: found.append(sequence.prefill(ids)))
        thread.start()
        while thread.is_alive() and refused is None:
            try:
                sequence.stats()
            except UnsupportedError as error:
                refused = str(error)
        other.reset()
        np.testing.assert_array_equal(other.decode(5), alone)
        thread.join()
        np.testing.assert_array_equal(found[0], expected)
        if refused:
            break
    assert refused == (
        "another thread is using this sequence; give each thread a sequence of its own, engine.sequence()"
    )


@pytest.mark.parametrize("where", DEVICES)
def test_two_threads_on_one_sequence_of_devices(make_bundle_of, where, monkeypatch):
    engine = OPEN[where](make_bundle_of("opt"), "exact")
    under_way, go_on = threading.Event(), threading.Event()
    stage, prompt = engine._first._stages[0], engine._first._stages[0].prompt

    def slow(*args):
        under_way.set()
        assert go_on.wait(60)
        return prompt(*args)

    monkeypatch.setattr(stage, "prompt", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(engine.prefill, PROMPTS[0])
        assert under_way.wait(60)
        for call in (lambda: engine.decode(5), engine.reset, engine.stats, engine.reset_stats):
            with pytest.raises(UnsupportedError, match="another thread is using this sequence"):
                call()
        go_on.set()
        np.testing.assert_array_equal(first.result(60), engine.sequence().prefill(PROMPTS[0]))


SCRIPT = """
import multiprocessing, os, sys
import numpy as np
from hotcold import load_bundle
from hotcold.errors import UnsupportedError

bundle, backend, ids = sys.argv[1], sys.argv[2], [5, 7, 11]

def loaded(_):
    return load_bundle(bundle, "exact", n_threads=2, n_ctx=64, backend=backend, device="cpu").prefill(ids)

if __name__ == "__main__":
    engine = load_bundle(bundle, "exact", n_threads=2, n_ctx=64, backend=backend, device="cpu")
    sequence, expected = engine.sequence(), engine.prefill(ids)
    child = os.fork()
    if not child:
        refused = 0
        for call in (lambda: engine.decode(3), engine.stats, sequence.reset, lambda: sequence.prefill(ids)):
            try:
                call()
            except UnsupportedError as error:
                assert "this process was forked from the one that loaded the model; load it" in str(error)
                refused += 1
        del engine, sequence  # waits for nobody either
        sys.exit(0 if refused == 4 else 1)  # with all that Python does at its end
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert np.array_equal(sequence.prefill(ids), expected)
    if backend == "cpu":
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            for found in pool.map(loaded, range(2)):
                assert np.array_equal(found, expected)
    print("done")
"""


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_forked_process_is_told_and_a_spawned_one_loads_its_own(make_bundle_of, tmp_path, backend):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    call = [sys.executable, script, make_bundle_of("opt"), backend]
    process = subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert out == "done\n" and process.returncode == 0, err
