"""Whole engines against the CPU engine: on a GPU if HOTCOLD_TEST_GPU is set, else torch on the CPU is one.

On a GPU steps are recorded and replayed, copies and marks are real, and kernels begin early.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from stored_rows import relative_error
from tiny_families import D_FF, IDS

from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.gpu.engine import GpuEngine
from hotcold.runtime.gpu.hybrid import HybridEngine
from hotcold.runtime.placement.plan import PlacedLayer, Placement

DEVICE = "cuda" if "HOTCOLD_TEST_GPU" in os.environ else "cpu"
SOME = np.arange(5, 90, dtype=np.int32)
PLACES = {
    "gpu": None,
    "split": (PlacedLayer(True, SOME, D_FF), PlacedLayer(True, SOME[::2], D_FF)),
    "all cold": (PlacedLayer(True, SOME[:0], D_FF),) * 2,
    "last layer on the CPU": (PlacedLayer(True, SOME, D_FF), PlacedLayer(False, SOME[:0], D_FF)),
}


@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("name", ["prosparse", "qwen3", "opt", "falcon-7b-relu", "falcon-40b-relu"])
def test_a_prompt_and_tokens_twice(name, places, mode, make_bundle_of):
    """The second time all is recorded, at the same positions."""
    layers, bundle = PLACES[places], make_bundle_of(name)
    if mode == "dense" and layers:
        whole = PlacedLayer(True, np.arange(D_FF, dtype=np.int32), D_FF)
        layers = tuple(whole if layer.on_device else layer for layer in layers)
    if layers is None:
        device = GpuEngine.load(bundle, mode, DEVICE, n_ctx=64)
    else:
        device = HybridEngine.load(bundle, Placement(layers, (1 << 30,)), mode, DEVICE, 2, n_ctx=64)
    for _ in range(2):
        logits = []
        for engine in (device, Engine.load(bundle, mode, 1, n_ctx=64)):
            engine.reset()
            prompt = engine.prefill(IDS[:20], all_logits=True)
            logits.append(np.concatenate([prompt, [engine.decode(token) for token in IDS[20:]]]))
        assert relative_error(*logits) < 5e-3
