"""Models with input rules on a device: the oracle's function and counts, in torch and in Triton."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from stored_rows import relative_error
from tiny_families import D_FF, IDS

from hotcold.errors import UnsupportedError
from hotcold.model.inputs import SITES
from hotcold.runtime.bundle_files import ModelPath
from hotcold.runtime.gpu import stage as gpu_stage
from hotcold.runtime.gpu.engine import GpuEngine
from hotcold.runtime.gpu.hybrid import HybridEngine
from hotcold.runtime.placement.plan import PlacedLayer, Placement
from hotcold.runtime.reference import ReferenceEngine
from hotcold.runtime.triton import ops, reference

LIMIT = 5e-3  # at a threshold, rounding decides
NAMES = ["llama", "llama-silu-tied", "opt", "falcon-7b", "falcon-40b-relu", "granite"]


def expected_of(bundle, mode):
    oracle = ReferenceEngine.load(bundle, mode, n_ctx=64)
    oracle.cache_dtype = torch.float16
    return oracle.prefill(IDS, all_logits=True), oracle.stats()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("score", ["magnitude", "wina"])
def test_the_oracles_function_and_counts(make_ruled, name, score):
    _, bundle = make_ruled(name, tuple(SITES), score)
    for mode in ModelPath(bundle).modes:
        expected, counts = expected_of(bundle, mode)
        device = GpuEngine.load(bundle, mode, "cpu", n_ctx=64)
        for step in (len(IDS), 8, 1):
            device.reset()
            device.reset_stats()
            parts = [device.prefill(IDS[i : i + step], all_logits=True) for i in range(0, len(IDS), step)]
            assert relative_error(np.concatenate(parts), expected) < LIMIT
            for site, share in counts.input_sparsity.items():
                assert device.stats().input_sparsity[site] == pytest.approx(share, abs=0.002)


@pytest.mark.parametrize("mode", ["dense", "exact", "predicted"])
def test_the_kernel(make_ruled, monkeypatch, mode):
    """In Triton's interpreter, beside the other steps in torch: the first token, and some after it."""
    _, bundle = make_ruled()
    expected, _ = expected_of(bundle, mode)
    with_kernel = SimpleNamespace(**vars(reference) | {"leave_out": ops.leave_out})
    monkeypatch.setattr(gpu_stage, "operators", lambda _: with_kernel)
    device = GpuEngine.load(bundle, mode, "cpu", n_ctx=64)
    found = np.stack([device.decode(token) for token in IDS[:4]])
    assert relative_error(found, expected[:4]) < LIMIT


def half_and_half(device_layers=2):
    hot = np.arange(0, D_FF, 2, dtype=np.int32)
    layers = [PlacedLayer(i < device_layers, hot[: len(hot) * (i < device_layers)], D_FF) for i in range(2)]
    return Placement(tuple(layers), (1 << 30,))


@pytest.mark.parametrize("mode", ["exact", "predicted"])
@pytest.mark.parametrize("device_layers", [1, 2])
def test_both_sides_of_a_hybrid(make_ruled, mode, device_layers):
    """Hot and cold neurons of each layer, or the second layer on the CPU as a whole."""
    _, bundle = make_ruled(sites=("qkv", "o", "gate_up"))
    expected, _ = expected_of(bundle, mode)
    both = HybridEngine.load(bundle, half_and_half(device_layers), mode, "cpu", 2, 64)
    for step in (len(IDS), 1):
        both.reset()
        parts = [both.prefill(IDS[i : i + step], all_logits=True) for i in range(0, len(IDS), step)]
        assert relative_error(np.concatenate(parts), expected) < LIMIT


def test_cold_neurons_know_of_no_first_token(make_ruled):
    _, bundle = make_ruled(sites=("down",))
    with pytest.raises(UnsupportedError, match="leaves out no inputs of down"):
        HybridEngine.load(bundle, half_and_half(), "exact", "cpu", 1, 64)
