"""Every firing rule, from a checkpoint through an export to all modes and backends, against torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from decoding import check_logits
from firing import SPARSE_RULES
from stored_rows import relative_error
from tiny_families import D_FF, FAMILIES, IDS, N_LAYERS, random_predictors, write_model

from hotcold import storage
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.bundle.verify import verify_bundle
from hotcold.files.gguf import GGUFFile
from hotcold.model import checkpoint
from hotcold.model.ffn_modules import firing_rule, set_firing
from hotcold.model.firing import RULES, FiringRule, Score
from hotcold.model.gguf_checkpoint import GGUFCheckpoint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.gpu.engine import GpuEngine
from hotcold.runtime.gpu.hybrid import HybridEngine
from hotcold.runtime.placement.plan import PlacedLayer, Placement
from hotcold.runtime.reference import ReferenceEngine

PER_LAYER = [(name, False) for name in SPARSE_RULES]
ALL = PER_LAYER + [(name, True) for name in SPARSE_RULES if RULES[name].letter]
cases = pytest.mark.parametrize("case", ALL, ids=lambda case: f"{case[0]}{'-each' if case[1] else ''}")


def gap(scores: np.ndarray) -> float:
    """A threshold with about half of the scores on either side, and none of them near."""
    ordered = np.sort(np.abs(scores).ravel())
    inner = ordered[len(ordered) // 3 : 2 * len(ordered) // 3]
    at = int(np.diff(inner).argmax())
    return float(np.float32((inner[at] + inner[at + 1]) / 2))


def choose_thresholds(folder: Path, name: str, each: bool) -> FiringRule:
    """Rules jump at their thresholds, so that no score of these tokens is near one: layer after layer."""
    rule = FiringRule(name, (0.0,) * N_LAYERS)
    for i in range(N_LAYERS if RULES[name].letter else 0):
        model, seen = checkpoint.load_model(str(folder)), []
        set_firing(model, rule)
        layer = checkpoint.ffn_layers(model)[i]
        layer.gate.register_forward_hook(lambda _, __, gate, seen=seen: seen.append(gate[0]))
        with torch.no_grad():
            model(torch.from_numpy(IDS)[None])
            score = layer.activation(seen[0]) if RULES[name].score is Score.MAGNITUDE else seen[0]
        columns = score.double().numpy().T
        chosen = tuple(gap(column) for column in columns) if each else gap(columns)
        rule = FiringRule(name, (*rule.thresholds[:i], chosen, *rule.thresholds[i + 1 :]))
    return rule


@pytest.fixture(scope="module")
def make(tmp_path_factory) -> Callable[[tuple[str, bool]], tuple[Path, Path]]:
    """make((rule, one threshold each)) → HF directory and F32 bundle with random predictors."""
    made: dict[tuple[str, bool], tuple[Path, Path]] = {}

    def build(case: tuple[str, bool]) -> tuple[Path, Path]:
        if case not in made:
            root = tmp_path_factory.mktemp("rule")
            model, bundle = root / "model", root / "bundle"
            write_model(model, FAMILIES["llama"])
            rule = choose_thresholds(model, *case)
            config = FAMILIES["llama"] | rule.as_config()
            storage.write_json(model / "config.json", config)
            export_bundle(
                HFCheckpoint(model), bundle, name="m", fingerprint=checkpoint.fingerprint(str(model)),
                predictors=random_predictors(model, root / "predictors"),
                options=ExportOptions("f32", predictor_quant="f32"),
            )  # fmt: skip
            made[case] = model, bundle
        return made[case]

    return build


def logits_of(model: Path) -> np.ndarray:
    with torch.no_grad():
        return checkpoint.load_model(str(model))(torch.from_numpy(IDS)[None]).logits[0].numpy()


@cases
def test_every_mode_on_every_backend(case, make):
    model, bundle = make(case)
    expected = logits_of(model)
    oracle = ReferenceEngine.load(bundle, "dense", n_ctx=64)
    assert relative_error(oracle.prefill(IDS, all_logits=True), expected) < 1e-5
    assert 0.1 < oracle.stats().fired.sum() / (len(IDS) * N_LAYERS * D_FF) < 0.9
    for mode in ("dense", "exact"):
        check_logits(Engine.load(bundle, mode, 2, n_ctx=64), IDS, expected, 1e-3)
        check_logits(GpuEngine.load(bundle, mode, "cpu", n_ctx=64), IDS, expected, 1e-3)
    oracle = ReferenceEngine.load(bundle, "predicted", n_ctx=64)
    oracle.cache_dtype, oracle.audit = torch.float16, True
    computed = oracle.prefill(IDS, all_logits=True)
    assert relative_error(computed, expected) > 0.01  # these predictors leave neurons out
    for engine in (
        Engine.load(bundle, "predicted", 2, n_ctx=64),
        GpuEngine.load(bundle, "predicted", "cpu", n_ctx=64),
    ):
        engine.audit = True
        assert relative_error(engine.prefill(IDS, all_logits=True), computed) < 1e-3
        assert engine.stats().recall == pytest.approx(oracle.stats().recall, abs=0.01)
        engine.reset()
        engine.audit = False
        assert relative_error(np.stack([engine.decode(token) for token in IDS]), computed) < 1e-3


@pytest.mark.parametrize("mode", ["exact", "predicted"])
@pytest.mark.parametrize("name", ["fatrelu", "thresholded_silu"])
def test_thresholds_follow_their_neurons_in_a_hybrid(name, mode, make):
    _, bundle = make((name, True))
    some = np.arange(5, 90, dtype=np.int32)
    placement = Placement((PlacedLayer(True, some, D_FF), PlacedLayer(True, some[::2], D_FF)), (1 << 30,))
    oracle = ReferenceEngine.load(bundle, mode, n_ctx=64)
    oracle.cache_dtype = torch.float16
    hybrid = HybridEngine.load(bundle, placement, mode, "cpu", 2, n_ctx=64)
    check_logits(hybrid, IDS, oracle.prefill(IDS, all_logits=True), 1e-3)


@cases
def test_config_and_gguf_say_the_same(case, make):
    """What was written is what is read: from the files of the bundle, and by torch."""
    model, bundle = make(case)
    config = json.loads((model / "config.json").read_text())
    rule = FiringRule.from_config(config, config["hidden_act"], N_LAYERS, D_FF)
    assert rule.per_neuron == case[1]
    assert verify_bundle(bundle) == []
    for file in ("m.gguf", "m.powerinfer.gguf"):
        assert FiringRule.from_gguf(GGUFFile(bundle / file), "silu", N_LAYERS, D_FF) == rule
    again = GGUFCheckpoint(bundle / "m.gguf").config
    assert FiringRule.from_config(again, again["hidden_act"], N_LAYERS, D_FF) == rule
    assert firing_rule(checkpoint.load_model(str(model)).config) == rule
