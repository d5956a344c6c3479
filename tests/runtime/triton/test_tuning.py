"""Tile sizes: measured once, remembered, and of the candidates only."""

from __future__ import annotations

import json

import pytest
import torch

from hotcold.runtime.triton import tuning

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch, tmp_path):
    """The bookkeeping without the GPU: its name and the stopwatch are replaced."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_gpu", lambda device: "Some GPU/80G triton 3")
    tuning._remembered.cache_clear()
    yield tmp_path / "hotcold" / "triton" / "Some-GPU-80G-triton-3.json"
    tuning._remembered.cache_clear()


def stopwatch(monkeypatch, times):
    measured = []

    def milliseconds(known, key, tiles, run):
        measured.append(tiles)
        return times[tuning.CANDIDATES["dot"].index(tiles)]

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    return measured


def test_the_fastest_is_kept_and_remembered(monkeypatch, on_a_gpu):
    n = len(tuning.CANDIDATES["dot"])
    times = [3.0, 1.0, *[2.0] * (n - 2)]
    measured = stopwatch(monkeypatch, times)
    best = tuning.CANDIDATES["dot"][1]
    assert tuning.tiles_for("dot", GPU, "8x8") == tuning.CANDIDATES["dot"][0]
    assert tuning.tune("dot", GPU, "8x8", lambda: None) == best and len(measured) == n
    tuning._remembered.cache_clear()  # as a new process
    assert tuning.tiles_for("dot", GPU, "8x8") == best
    assert tuning.tune("dot", GPU, "8x8", lambda: None) == best and len(measured) == n
    assert json.loads(on_a_gpu.read_text()) == {"dot 8x8": best}


def test_all_times_are_kept_beside(monkeypatch, on_a_gpu):
    """Microseconds of one call, of 16 that were timed together; null for what did not compile."""
    n = len(tuning.CANDIDATES["dot"])
    stopwatch(monkeypatch, [0.032, float("inf"), *[0.16] * (n - 2)])
    tuning.tune("dot", GPU, "8x8", lambda: None)
    tuning.tune("dot", GPU, "9x9", lambda: None)
    times = json.loads(on_a_gpu.with_suffix(".times.json").read_text())
    assert list(times) == ["dot 8x8", "dot 9x9"]
    assert times["dot 9x9"] == [pytest.approx(2), None, *[pytest.approx(10)] * (n - 2)]


@pytest.mark.parametrize("text", ["", "[]", '{"dot 8x8": {"WEIGHTS": 999999}}', '{"what 1": {}}'])
def test_a_cache_file_of_another_kind_is_ignored(on_a_gpu, text):
    on_a_gpu.parent.mkdir(parents=True)
    on_a_gpu.write_text(text)
    assert tuning.tiles_for("dot", GPU, "8x8") == tuning.CANDIDATES["dot"][0]


def test_off_a_gpu_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(tuning, "_milliseconds", None)
    assert tuning.tune("s3", torch.device("cpu"), "1x1", lambda: None)["GROUP"] == 16
