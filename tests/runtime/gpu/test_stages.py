"""Several devices, torch on the CPU being each: the tokens of one device, layers in order on all of them."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from decoding import greedy

from hotcold.errors import FormatError, InputError, MismatchError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.gpu import device as gpu_device
from hotcold.runtime.gpu import engine as gpu_engine
from hotcold.runtime.gpu.device import open_devices, parse_budgets
from hotcold.runtime.gpu.engine import GpuEngine, file_and_mode
from hotcold.runtime.gpu.hybrid import HybridEngine
from hotcold.runtime.placement import costs
from hotcold.runtime.placement.plan import Costs, PlacedLayer, Placement
from hotcold.runtime.placement.problem import make_problem
from hotcold.runtime.sizes import parse_bytes

IDS = np.random.default_rng(5).integers(3, 300, 40)
D_FF, N_LAYERS, N_CTX = 96, 5, 64
MODES = ["dense", "exact", "predicted"]


@pytest.fixture
def deep(make_bundle):
    return make_bundle(n_layers=N_LAYERS).path


def room_for(path, mode: str, *layers: int) -> str:
    """`--vram-budget` that lets so many layers onto each device, and not one more."""
    path, mode = file_and_mode(path, mode)
    problem = make_problem(GGUFFile(path), None, mode=mode, n_ctx=N_CTX, budgets=[0], costs=Costs(1, 1, 0, 0))
    each = problem.layers[0].frame_bytes + problem.layers[0].ffn_bytes
    last = len(layers) - 1
    fixed = [problem.fixed.on(first=i == 0, last=i == last) for i in range(len(layers))]
    return ",".join(f"{extra + n * each}B" for extra, n in zip(fixed, layers, strict=True))


def layers_of(engine) -> list[range]:
    weights = [stage.weights for stage in engine._first._stages]
    return [range(w.first, w.first + len(w.layers)) for w in weights]


@pytest.mark.parametrize("mode", MODES)
def test_the_tokens_of_one_device(deep, mode):
    one = GpuEngine.load(deep, mode, "cpu", N_CTX)
    three = GpuEngine.load(deep, mode, "cpu,cpu,cpu", N_CTX, room_for(deep, mode, 2, 1, 2))
    assert layers_of(one) == [range(5)] and layers_of(three) == [range(2), range(2, 3), range(3, 5)]
    assert greedy(three, 30, IDS) == greedy(one, 30, IDS)
    got, expected = three.stats(), one.stats()
    assert got.tokens == expected.tokens
    assert np.array_equal(got.predicted, expected.predicted) and np.array_equal(got.fired, expected.fired)
    assert three.bytes_per_token() == one.bytes_per_token()
    for engine in (one, three):
        engine.reset()
        engine.audit = mode == "predicted"
    prompts = [engine.prefill(IDS, all_logits=True) for engine in (one, three)]
    assert np.array_equal(*prompts) and np.array_equal(one.stats().missed, three.stats().missed)


def test_embedding_first_head_last(deep):
    engine = GpuEngine.load(deep, "exact", "cpu,cpu", N_CTX, room_for(deep, "exact", 3, 2))
    first, last = (stage.weights for stage in engine._first._stages)
    assert first.embedding is not None and first.head is None
    assert last.embedding is None and last.head is not None
    assert first.nbytes + last.nbytes > GpuEngine.load(deep, "exact", "cpu")._first._stages[0].weights.nbytes


def test_a_device_that_is_not_needed_is_not_used(deep):
    assert layers_of(GpuEngine.load(deep, "exact", "cpu,cpu", N_CTX)) == [range(5)]


def test_a_model_that_does_not_fit(deep, monkeypatch):
    with pytest.raises(
        UnsupportedError, match=r"does not fit --vram-budget \(got room for 4 layers, expected 5\)"
    ):
        GpuEngine.load(deep, "exact", "cpu,cpu", N_CTX, room_for(deep, "exact", 2, 2))
    free = iter(map(parse_bytes, room_for(deep, "exact", 2, 2).split(",")))
    monkeypatch.setattr(gpu_device, "free_bytes", lambda device: next(free))
    assert layers_of(GpuEngine.load(deep, "exact", "cpu,cpu", N_CTX)) == [range(2), range(2, 5)]


@pytest.mark.parametrize("mode", MODES)
def test_the_second_device_is_given_nothing_of_the_first(deep, mode):
    """torch's meta device stands in for it: it has shapes only, and refuses what mixes devices."""
    file, mode = file_and_mode(deep, mode)
    devices = [torch.device("cpu"), torch.device("meta")]
    engine = GpuEngine(file, mode, devices, N_CTX, room_for(deep, mode, 3, 2))
    with torch.inference_mode():
        assert engine._first._prompt(IDS[:20], 3).device.type == "meta"
        if mode == "dense":  # in other modes torch in place of the kernels looks at values
            assert engine._first._decode(IDS[:1]).shape == (1, engine.n_vocab)


def test_a_missing_tensor_is_named(deep, monkeypatch):
    def without_embedding(path):
        file = GGUFFile(path)
        del file.tensors["token_embd.weight"]
        return file

    monkeypatch.setattr(gpu_engine, "open_gguf", without_embedding)
    with pytest.raises(FormatError, match=r"token_embd.weight: missing tensor"):
        GpuEngine.load(deep, "exact", "cpu")


def hot(device: int, *neurons: int | range) -> PlacedLayer:
    return PlacedLayer(True, np.array(sorted(neurons), np.int32), D_FF, device=device)


ALL, SOME = tuple(range(D_FF)), tuple(range(0, D_FF, 3))
ON_CPU = PlacedLayer(False, np.empty(0, np.int32), D_FF)
PLANS = {
    "split": (hot(0, *SOME), hot(0, *SOME), hot(1, *SOME), hot(1, *SOME), hot(1, *SOME)),
    "a hand-over last and first": (hot(0, *ALL), hot(0, *SOME), hot(1), hot(1, *ALL), hot(2, *ALL)),
    "whole layers, then some": (hot(0, *ALL), hot(0, *ALL), hot(1, *ALL), hot(1, *SOME), hot(2, *SOME)),
    "then the CPU": (hot(0, *ALL), hot(0, *SOME), hot(1, *SOME), ON_CPU, ON_CPU),
    "the first device unused": (hot(1, *ALL), hot(1, *SOME), hot(2, *SOME), hot(2, *ALL), ON_CPU),
}


def plan(*layers: PlacedLayer) -> Placement:
    return Placement(layers, (1 << 30,) * 3, (0,) * 3)


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("name", PLANS)
def test_hybrid_on_several_devices(deep, mode, name):
    hybrid = HybridEngine.load(deep, plan(*PLANS[name]), mode, "cpu,cpu,cpu", 2, n_ctx=N_CTX)
    engine = Engine.load(deep, mode, 2, n_ctx=N_CTX)
    assert len(hybrid._first._stages) == len({layer.device for layer in PLANS[name] if layer.on_device})
    for each in (hybrid, engine):
        each.audit = mode == "predicted"
        each.prefill(IDS[:20])
        each.audit = False
    assert np.abs(hybrid.stats().missed - engine.stats().missed).max() <= 4
    for each in (hybrid, engine):
        each.reset()
        each.reset_stats()
    assert greedy(hybrid, 30, IDS) == greedy(engine, 30, IDS)
    got, expected = hybrid.stats(), engine.stats()
    assert np.array_equal(got.predicted, expected.predicted)
    assert np.abs(got.fired - expected.fired).max() <= 4
    measured = hybrid.measured()
    n_split = sum(layer.on_device and len(layer.cold) > 0 for layer in PLANS[name])
    assert measured.handovers + measured.skipped_handovers == 30 * n_split and measured.decoded == 30
    assert measured.hot_fired + measured.cold_fired == sum(
        fired for fired, layer in zip(got.fired, PLANS[name], strict=True) if layer.on_device
    )
    assert 0 < measured.hot_s + measured.cold_s + measured.wait_s + measured.cpu_layers_s < measured.decode_s


def test_dense_hybrid_on_several_devices(deep):
    layers = (hot(0, *ALL), hot(1, *ALL), hot(1, *ALL), hot(2, *ALL), ON_CPU)
    hybrid = HybridEngine.load(deep, plan(*layers), "dense", "cpu,cpu,cpu", 1, n_ctx=N_CTX)
    assert greedy(hybrid, 20, IDS) == greedy(Engine.load(deep, "dense", 1, n_ctx=N_CTX), 20, IDS)


def test_a_plan_for_more_devices(deep):
    with pytest.raises(
        MismatchError, match=r"this plan is for more devices \(got 2 here, expected 3\); list as many"
    ):
        HybridEngine.load(deep, plan(*PLANS["whole layers, then some"]), "exact", "cpu,cpu", 1)


def test_costs_are_measured_on_their_device(monkeypatch):
    """Events and records go to the current GPU, whatever the tensors' is; the stopwatch looks which it is."""
    current, seen = [None], []

    @contextmanager
    def on(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(costs, "on", on)
    monkeypatch.setattr(costs, "_seconds", lambda device, step: seen.append(current[-1]) or 1e-5)
    costs.measure_costs(torch.device("cpu"), 1, 64, 96)
    assert seen == [torch.device("cpu")] * 2


# ---- names and sizes


@pytest.fixture
def two_gpus(monkeypatch):
    """What torch says of them; the second is too old for the kernels."""
    known = {"is_available": lambda: True, "device_count": lambda: 2}
    known["get_device_capability"] = lambda device: (9 - 2 * (device.index or 0), 0)
    known["get_device_name"] = lambda device: "a GPU"
    for name, instead in known.items():
        monkeypatch.setattr(torch.cuda, name, instead)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


def test_devices_by_name(two_gpus, monkeypatch):
    gpus = [torch.device("cuda", i) for i in range(2)]
    assert (
        open_devices("cpu") == [torch.device("cpu")] and open_devices("cpu, cpu") == [torch.device("cpu")] * 2
    )
    assert open_devices("cuda") == open_devices("cuda:0") == gpus[:1]
    with pytest.raises(UnsupportedError, match="this GPU is too old"):
        open_devices("cuda:0,cuda:1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert open_devices("cuda") == open_devices("cuda:0,cuda:1") == gpus
    assert open_devices("cuda:1") == gpus[1:] and open_devices("cuda:1,cuda:0") == gpus[::-1]


@pytest.mark.parametrize(("version", "message"), [
    ("3.4.0", r"this Triton is too old for the kernels \(got 3\.4\.0, expected 3\.5\); `pip install"),
    (None, "Triton is not installed; `pip install 'triton>=3.5'`, or use --backend cpu"),
])  # fmt: skip
def test_triton_is_looked_for(two_gpus, monkeypatch, version, message):
    if version:
        monkeypatch.setattr("triton.__version__", version)
    else:
        monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UnsupportedError, match=message):
        open_devices("cuda:0")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("cuda:0,cuda:2", r"no such GPU \(got cuda:2, expected cuda:0 to cuda:1"),
        ("cuda:0,cuda:0", r"a GPU is listed twice \(got cuda:0,cuda:0"),
        ("cuda,cuda:0", "not a list of devices"),
        ("cuda:0,cpu", "not a list of devices"),
        ("cpu,", "unknown device"),
    ],
)
def test_devices_that_are_refused(two_gpus, names, message):
    with pytest.raises(InputError, match=message):
        open_devices(names)


def test_budgets_per_device(monkeypatch):
    devices, free = open_devices("cpu,cpu"), iter([3 << 30, 2 << 30])
    assert parse_budgets("1M", devices) == [1 << 20] * 2
    assert parse_budgets("2M, 1M", devices) == [2 << 20, 1 << 20]
    for text in ("1M,1M,1M", "1M,"):
        with pytest.raises(InputError, match=r"--vram-budget|not a size"):
            parse_budgets(text, devices)
    monkeypatch.setattr(gpu_device, "free_bytes", lambda device: next(free))
    assert parse_budgets("auto", devices) == [3 << 30, 2 << 30]
