"""Whatever a kind of predictor is made of, all engines compute the same neurons, and those of its formula."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from stored_rows import relative_error
from tiny_families import D_FF, D_MODEL, IDS, N_LAYERS, RANK

from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.bundle.verify import verify_bundle
from hotcold.errors import FormatError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model import checkpoint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.predictor.bundle import LayerPredictor, PredictorBundle
from hotcold.predictor.kinds.table import KINDS, Kind
from hotcold.runtime import reference as reference_module
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.gpu.engine import GpuEngine
from hotcold.runtime.gpu.hybrid import HybridEngine
from hotcold.runtime.placement.plan import PlacedLayer, Placement
from hotcold.runtime.placement.problem import part_bytes
from hotcold.runtime.reference import ReferenceEngine

FLAGS = list(product([False, True], repeat=3))
SOME = PlacedLayer(True, np.arange(5, 70, dtype=np.int32), D_FF)
ON_CPU = PlacedLayer(False, np.empty(0, np.int32), D_FF)
SPLIT = Placement((SOME, ON_CPU), (1 << 30,))


def predictors_of(kind: Kind, model) -> PredictorBundle:
    """Predictors that know nothing, whose thresholds let about half of the neurons through."""
    rng, layers = np.random.default_rng(0), []
    frequency = np.linspace(0, 0.6, D_FF, dtype=np.float32)
    for _ in range(N_LAYERS):
        fc1, fc2 = (rng.standard_normal(s).astype(np.float32) for s in ((RANK, D_MODEL), (D_FF, RANK)))
        bias = 20 * rng.standard_normal(D_FF).astype(np.float32) if kind.bias else None
        layers.append(LayerPredictor(fc1, fc2, 0.0, frequency, None, bias, kind))
    return PredictorBundle(checkpoint.fingerprint(str(model)), layers)


@pytest.fixture
def make(make_family, tmp_path, monkeypatch):
    """make("opt", kind) -> a bundle with random predictors of this kind, and these."""

    def export(name: str, kind: Kind):
        monkeypatch.setitem(KINDS, kind.name, kind)
        model = make_family(name)
        predictors = predictors_of(kind, model)
        export_bundle(
            HFCheckpoint(model), tmp_path / "bundle", name="m", fingerprint=predictors.model_fingerprint,
            predictors=predictors, options=ExportOptions("f32", predictor_quant="f32"),
        )  # fmt: skip
        return tmp_path / "bundle", predictors

    return export


def agree(bundle) -> None:
    """CPU engine, device (torch in place of the kernels) and both together, against the reference.

    A score that the cache's rounding moves across the threshold costs a neuron, another formula half of them.
    """
    reference = ReferenceEngine.load(bundle, "predicted", n_ctx=64)
    reference.audit, reference.cache_dtype = True, torch.float16
    expected, counts = reference.prefill(IDS, all_logits=True), reference.stats()
    assert 0.2 < counts.predicted_sparsity < 0.8
    engines = {
        "cpu": Engine.load(bundle, "predicted", 2, n_ctx=64),
        "device": GpuEngine.load(bundle, "predicted", "cpu", n_ctx=64),
        "hybrid": HybridEngine.load(bundle, SPLIT, "predicted", "cpu", 2, n_ctx=64),
    }
    for name, engine in engines.items():
        engine.audit = True
        assert relative_error(engine.prefill(IDS, all_logits=True), expected) < 0.1, name
        np.testing.assert_allclose(engine.stats().predicted, counts.predicted, atol=8, err_msg=name)
        engine.reset()
        engine.audit = False
        steps = np.stack([engine.decode(token) for token in IDS])
        assert relative_error(steps, expected) < 0.1, name


@pytest.mark.parametrize(("relu", "bias", "normed"), FLAGS)
def test_every_form(make, relu, bias, normed):
    bundle, _ = make("llama", Kind("any", "", relu=relu, bias=bias, normed=normed))
    agree(bundle)


@pytest.mark.parametrize("name", ["opt", "falcon-40b-relu", "prosparse"])
def test_svd_in_other_families(make, name):
    """LayerNorm, two norms side by side, no gates, FATReLU."""
    bundle, _ = make(name, KINDS["svd"])
    assert verify_bundle(bundle) == []
    agree(bundle)


@pytest.mark.parametrize("name", ["llama", "opt", "falcon-40b-relu"])
def test_the_neurons_are_those_of_the_formula(make, make_family, name):
    """The first layer sees the same stream in every mode, so that transformers tells its input."""
    bundle, predictors = make(name, KINDS["svd"])
    model, seen = checkpoint.load_model(str(make_family(name))), []
    checkpoint.ffn_layers(model)[0].gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(torch.from_numpy(IDS)[None])
    h, layer = seen[0].reshape(-1, D_MODEL).double().numpy(), predictors.layers[0]
    chosen = h @ layer.fc1.T.astype(np.float64) @ layer.fc2.T + layer.bias >= 0
    chosen[:, layer.firing_frequency >= 0.5] = True
    chosen[0] = True
    engine = Engine.load(bundle, "predicted", 1, n_ctx=64)
    engine.prefill(IDS)
    assert abs(int(engine.stats().predicted[0]) - int(chosen.sum())) <= 1


@pytest.mark.parametrize("mode", ["exact", "predicted"])
def test_the_bias_is_counted_where_it_is_read(make, mode):
    bundle, predictors = make("llama", KINDS["svd"])
    layer, file = predictors.layers[0], GGUFFile(bundle / "m.powerinfer.gguf")
    size = N_LAYERS * (layer.fc1.nbytes + layer.fc2.nbytes + layer.bias.nbytes)
    assert part_bytes(file)["predictor"] == size
    for engine in (
        Engine.load(bundle, mode, 1, n_ctx=64),
        GpuEngine.load(bundle, mode, "cpu", n_ctx=64),
        HybridEngine.load(bundle, SPLIT, mode, "cpu", 1, n_ctx=64),
    ):
        engine.prefill(IDS[:9])
        assert engine.bytes_per_token()["predictor"] == (size if mode == "predicted" else 0)


@pytest.mark.parametrize("engine", [Engine, GpuEngine, ReferenceEngine])
def test_a_bias_that_is_missing_and_a_kind_that_is_unknown(make, monkeypatch, engine):
    bundle, _ = make("llama", KINDS["svd"])
    path, arguments = bundle / "m.powerinfer.gguf", ("cpu",) if engine is GpuEngine else ()

    def load(edit) -> None:
        def changed(path, *rest):
            file = GGUFFile(path)
            edit(file)
            return file

        for module in ("runtime.cpu.engine", "runtime.gpu.engine", "runtime.reference"):
            monkeypatch.setattr(f"hotcold.{module}.open_gguf", changed)
        if engine is ReferenceEngine:
            reference_module.ReferenceEngine(path, "predicted", 64)
        else:
            engine.load(path, "predicted", *arguments)

    with pytest.raises(FormatError, match=r"blk\.1\.fc2\.bias: missing tensor"):
        load(lambda file: file.tensors.pop("blk.1.fc2.bias"))
    with pytest.raises(UnsupportedError, match=r"unknown kind of predictor \(got svdp"):
        load(lambda file: file.metadata.update({"hotcold.predictor.kind": "svdp"}))
