"""Every family of models: HF directory → export → the CPU runtime gives the logits of transformers.

The models are tiny and random, their weights large enough for every part to matter: a bias, norm, scale or
window that is left out shows in the logits (`test_the_measure_sees_what_is_left_out`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from hotcold import checkpoint, storage
from hotcold.checkpoint import fingerprint
from hotcold.cli import main
from hotcold.convert.architectures import ModelSpec
from hotcold.convert.export import ExportOptions, export_bundle
from hotcold.convert.gguf_checkpoint import GGUFCheckpoint
from hotcold.convert.gguf_read import GGUFFile
from hotcold.convert.hf_checkpoint import HFCheckpoint
from hotcold.convert.llama_cpp import is_exact
from hotcold.convert.verify import verify_bundle
from hotcold.errors import InputError, UnsupportedError
from hotcold.predictor.bundle import PredictorBundle
from hotcold.runtime.backends import BackendOptions, open_engine
from hotcold.runtime.engine import Engine
from hotcold.runtime.gpu.engine import GpuEngine
from hotcold.runtime.gpu.hybrid import HybridEngine
from hotcold.runtime.placement import PlacedLayer, Placement
from hotcold.runtime.reference import ReferenceEngine

N_LAYERS, D_MODEL, D_FF, N_VOCAB, RANK = 2, 64, 128, 320, 32
IDS = np.random.default_rng(5).integers(3, N_VOCAB, 32)

_BASE = {
    "vocab_size": N_VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": N_LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
_LLAMA = _BASE | {
    "model_type": "llama", "intermediate_size": D_FF, "num_key_value_heads": 2, "hidden_act": "relu",
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
_MISTRAL = _LLAMA | {"model_type": "mistral", "sliding_window": None}
_QWEN2, _QWEN3 = _LLAMA | {"model_type": "qwen2"}, _LLAMA | {"model_type": "qwen3", "head_dim": 32}
_OPT = _BASE | {"model_type": "opt", "ffn_dim": D_FF, "init_std": 0.2, "word_embed_proj_dim": D_MODEL}
_FALCON = _BASE | {
    "model_type": "falcon", "ffn_hidden_size": D_FF, "activation": "relu", "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip
_NEW_FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2}
_MINICPM = _LLAMA | {
    "model_type": "minicpm", "scale_emb": 3.0, "scale_depth": 1.4, "dim_model_base": 16,
    "rope_parameters": None, "rope_theta": 5000.0,
}  # fmt: skip


def _fatrelu(threshold: float) -> dict[str, object]:
    """FATReLU jumps at its threshold: a gate that the cache's float16 moves across it costs a neuron.

    In the models below no gate is within 0.002 of its threshold (`test_no_gate_is_near_a_threshold`).
    """
    return {"hidden_act": "fatrelu", "hidden_act_param": threshold}


def _scaled(kind: str, **more: object) -> dict[str, object]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, "factor": 4.0, **more}}


_LLAMA3_ROPE = _scaled(
    "llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
_YARN = _scaled("yarn", original_max_position_embeddings=16)

FAMILIES: dict[str, dict[str, object]] = {
    "llama": _LLAMA,
    "llama-silu-tied": _LLAMA | {"hidden_act": "silu", "tie_word_embeddings": True},
    "llama-biases": _LLAMA | {"attention_bias": True, "hidden_act": "silu"},
    "llama-3-rope": _LLAMA | _LLAMA3_ROPE,
    "llama-3-rope-silu": _LLAMA | _LLAMA3_ROPE | {"hidden_act": "silu"},
    "llama-linear-rope": _LLAMA | _scaled("linear"),
    "llama-yarn": _LLAMA | _YARN,
    "prosparse": _LLAMA | {"hidden_act": "fatrelu_1.76"},
    "prosparse-param": _LLAMA | _fatrelu(1.76),
    "mistral": _MISTRAL,
    "mistral-window": _MISTRAL | {"sliding_window": 7},
    "bamboo": _MISTRAL | {"model_type": "bamboo", "sliding_window": 20},
    "qwen2": _QWEN2,
    "qwen2-silu": _QWEN2 | {"hidden_act": "silu"},
    "qwen2-window": _QWEN2 | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": _QWEN3,
    "qwen3-silu-tied": _QWEN3 | {"hidden_act": "silu", "tie_word_embeddings": True},
    "qwen3-yarn": _QWEN3 | _YARN | {"hidden_act": "silu"},
    "opt": _OPT,
    "opt-gelu": _OPT | {"activation_function": "gelu"},
    "falcon-7b": _FALCON | {"activation": "gelu"},
    "falcon-7b-relu": _FALCON,
    "falcon-40b": _FALCON | _NEW_FALCON | {"activation": "gelu"},
    "falcon-40b-relu": _FALCON | _NEW_FALCON,
    "falcon-11b-relu": _FALCON | _NEW_FALCON | {"num_ln_in_parallel_attn": 1, "tie_word_embeddings": False},
    "minicpm": _MINICPM | {"hidden_act": "silu", "tie_word_embeddings": True},
    "minicpm-relu": _MINICPM,
    "minicpm-s": _MINICPM | _fatrelu(1.684),
    "granite": _LLAMA | {
        "model_type": "granite", "embedding_multiplier": 3.0, "residual_multiplier": 0.7,
        "logits_scaling": 2.0, "attention_multiplier": 0.4,
    },
}  # fmt: skip
SPARSE = [name for name, config in FAMILIES.items() if not {"silu", "gelu"} & {*map(str, config.values())}]


def write_model(folder: Path, config: dict[str, object]) -> None:
    """An HF directory with random weights: every norm, bias and matrix has its say."""
    rng = np.random.default_rng(1)
    folder.mkdir()
    tensors = {}
    for name, shape in shapes_of(config).items():
        if len(shape) > 1:
            tensors[name] = rng.standard_normal(shape) * 0.15
        elif name.endswith("weight"):
            tensors[name] = rng.uniform(0.5, 1.5, shape)
        else:
            tensors[name] = rng.standard_normal(shape) * 0.3
    storage.write_tensors(
        folder / "model.safetensors", {k: v.astype(np.float32) for k, v in tensors.items()}, {"format": "pt"}
    )
    storage.write_json(folder / "config.json", config)


def shapes_of(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers has them, not as hotcold does."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from hotcold.families import as_transformers

    values = as_transformers(config)
    act = next(
        key
        for key in ("hidden_act", "activation_function", "activation")
        if key in {"activation_function": "relu", **values}
    )
    if str(values.get(act, "relu")) not in ("silu", "gelu"):
        values[act] = "relu"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


@pytest.fixture(scope="session")
def make_family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """make_family("qwen2") → the HF directory of that tiny model, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("family") / name
            write_model(made[name], FAMILIES[name])
        return made[name]

    return make


def random_predictors(model: Path, folder: Path) -> PredictorBundle:
    """Predictors that know nothing, whose thresholds let about half of the neurons through."""
    rng, tensors = np.random.default_rng(0), {}
    for layer in range(N_LAYERS):
        tensors[f"layers.{layer}.fc1.weight"] = rng.standard_normal((RANK, D_MODEL))
        tensors[f"layers.{layer}.fc2.weight"] = rng.standard_normal((D_FF, RANK))
        tensors[f"layers.{layer}.firing_frequency"] = np.linspace(0, 0.6, D_FF)
    config = {
        "format": "hotcold-predictor", "version": 1, "model_fingerprint": fingerprint(str(model)),
        "n_layers": N_LAYERS, "d_model": D_MODEL, "d_ff": D_FF, "ranks": [RANK] * N_LAYERS,
        "thresholds": [0.0] * N_LAYERS, "target_recall": 0.95, "metrics": [],
    }  # fmt: skip
    folder.mkdir()
    storage.write_tensors(folder / "model.safetensors", {k: v.astype(np.float32) for k, v in tensors.items()})
    storage.write_json(folder / "config.json", config)
    return PredictorBundle.load(folder)


@pytest.fixture(scope="session")
def make_bundle_of(make_family, tmp_path_factory) -> Callable[[str], Path]:
    """make_bundle_of("qwen2") → its F32 bundle, with random predictors where the model is sparse."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            model, root = make_family(name), tmp_path_factory.mktemp("bundle")
            predictors = random_predictors(model, root / "predictors") if name in SPARSE else None
            made[name] = root / "bundle"
            export_bundle(
                HFCheckpoint(model), made[name], name="m", fingerprint=fingerprint(str(model)),
                predictors=predictors,
                options=ExportOptions("f32", predictor_quant="f32", attention_rows=True),
            )  # fmt: skip
        return made[name]

    return make


@pytest.fixture(scope="session")
def logits_of(make_family) -> Callable[[str], np.ndarray]:
    """logits_of("qwen2") → what transformers computes, float32 [32, n_vocab]."""
    made: dict[str, np.ndarray] = {}

    def logits(name: str) -> np.ndarray:
        if name not in made:
            with torch.no_grad():
                model = checkpoint.load_model(str(make_family(name)))
                made[name] = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
        return made[name]

    return logits


def difference(got: np.ndarray, expected: np.ndarray) -> float:
    """Root of the mean square of the error, over that of the logits."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_logits_are_those_of_transformers(name, make_bundle_of, logits_of):
    bundle = make_bundle_of(name)
    reference = ReferenceEngine.load(bundle, "dense", n_ctx=64)
    assert difference(reference.prefill(IDS, all_logits=True), logits_of(name)) < 1e-5
    engine = Engine.load(bundle, "dense", 2, n_ctx=64)
    assert difference(engine.prefill(IDS, all_logits=True), logits_of(name)) < 1e-3
    engine.reset()
    one_by_one = np.stack([engine.decode(token) for token in IDS])
    assert difference(one_by_one, logits_of(name)) < 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_dense_logits_on_a_device(name, make_bundle_of, logits_of):
    """Torch on the CPU being the device; a prompt at once, by eights as the operators take it, one by one."""
    engine = GpuEngine.load(make_bundle_of(name), "dense", "cpu", n_ctx=64)
    for step in (len(IDS), 8, 1):
        engine.reset()
        logits = [engine.prefill(IDS[i : i + step], all_logits=True) for i in range(0, len(IDS), step)]
        assert difference(np.concatenate(logits), logits_of(name)) < 1e-3


def greedy(engine: Engine | GpuEngine, n: int) -> list[int]:
    logits, tokens = engine.prefill(IDS[:5]), []
    for _ in range(n):
        tokens.append(int(logits.argmax()))
        logits = engine.decode(tokens[-1])
    return tokens


@pytest.mark.parametrize("mode", ["exact", "predicted"])
@pytest.mark.parametrize("name", SPARSE)
def test_sparse_modes_on_a_device(name, mode, make_bundle_of):
    """The logits and counts of the oracle, and the tokens of the CPU engine."""
    bundle = make_bundle_of(name)
    device, reference = (
        GpuEngine.load(bundle, mode, "cpu", n_ctx=64),
        ReferenceEngine.load(bundle, mode, n_ctx=64),
    )
    reference.cache_dtype, reference.audit, device.audit = torch.float16, True, True
    expected = reference.prefill(IDS, all_logits=True)
    assert difference(device.prefill(IDS, all_logits=True), expected) < 2e-4
    got, counts = device.stats(), reference.stats()
    assert np.abs(got.fired - counts.fired).max() <= 2 and np.abs(got.missed - counts.missed).max() <= 2
    assert np.array_equal(got.predicted, counts.predicted)
    device.reset()
    device.audit = False
    device.reset_stats()
    one_by_one = np.stack([device.decode(token) for token in IDS])
    assert difference(one_by_one, expected) < 2e-4
    assert np.abs(device.stats().fired - counts.fired).max() <= 2
    assert np.array_equal(device.stats().predicted, counts.predicted)
    device.reset()
    assert greedy(device, 20) == greedy(Engine.load(bundle, mode, 1, n_ctx=64), 20)


@pytest.mark.parametrize(
    ("name", "mode"), [("opt", "exact"), ("opt", "predicted"), ("falcon-40b-relu", "predicted")]
)
def test_without_gates_through_the_triton_kernels(name, mode, make_bundle_of, monkeypatch):
    """In Triton's interpreter: the first token, and one after it."""
    from hotcold.runtime.gpu import stage
    from hotcold.runtime.triton import ops

    expected = GpuEngine.load(make_bundle_of(name), mode, "cpu", n_ctx=16).prefill(IDS[:2])
    monkeypatch.setattr(stage, "operators", lambda device: ops)
    device = GpuEngine.load(make_bundle_of(name), mode, "cpu", n_ctx=16)
    device.prefill(IDS[:1])
    assert difference(device.decode(IDS[1]), expected) < 1e-4


@pytest.mark.parametrize("name", [name for name in FAMILIES if not name.startswith(("opt", "falcon"))])
def test_on_a_device_and_the_cpu(name, make_bundle_of, logits_of):
    """A layer on either side, torch on the CPU being the device; with biases, head norms and windows."""
    all_hot, none_hot = np.arange(D_FF, dtype=np.int32), np.empty(0, np.int32)
    layers = (PlacedLayer(True, all_hot, D_FF), PlacedLayer(False, none_hot, D_FF))
    placement = Placement(layers, (1 << 30,))
    engine = HybridEngine.load(make_bundle_of(name), placement, "dense", "cpu", 2, n_ctx=64)
    assert difference(engine.prefill(IDS, all_logits=True), logits_of(name)) < 1e-3
    engine.reset()
    one_by_one = np.stack([engine.decode(token) for token in IDS])
    assert difference(one_by_one, logits_of(name)) < 1e-3


@pytest.mark.parametrize("name", ["opt", "falcon-40b-relu"])
def test_no_hybrid_without_gates(name, make_bundle_of):
    options = BackendOptions("hybrid", device="cpu")
    with pytest.raises(
        UnsupportedError, match=rf"gated FFNs only \(got {name[:3]}.*use --backend gpu or --backend cpu"
    ):
        open_engine(make_bundle_of(name), "exact", 1, 64, options)


@pytest.mark.parametrize("name", FAMILIES)
def test_attention_by_input_is_the_same_function(name, make_bundle_of, logits_of):
    """With no input left out: biases, head norms, rotary order and windows are those of the other layout."""
    engine = Engine.load(make_bundle_of(name), "dense", 2, n_ctx=64, input_sparsity=1e-6)
    assert difference(engine.prefill(IDS, all_logits=True), logits_of(name)) < 1e-3
    engine.reset()
    one_by_one = np.stack([engine.decode(token) for token in IDS])
    assert difference(one_by_one, logits_of(name)) < 1e-3


@pytest.mark.parametrize("name", ["prosparse", "minicpm-s"])
def test_no_gate_is_near_a_threshold(name, make_family):
    model, gates = checkpoint.load_model(str(make_family(name))), []
    for layer in checkpoint.ffn_layers(model):
        layer.gate.register_forward_hook(lambda _, inputs, out: gates.append(out))
    with torch.no_grad():
        model(torch.from_numpy(IDS)[None])
    threshold = checkpoint.ffn_layers(model)[0].activation.threshold
    assert min((gate - threshold).abs().min() for gate in gates) > 0.002


@pytest.mark.parametrize("name", SPARSE)
def test_exact_is_dense_and_predicted_is_the_reference(name, make_bundle_of, logits_of):
    bundle = make_bundle_of(name)
    for mode, expected in (("exact", logits_of(name)), ("predicted", None)):
        reference = ReferenceEngine.load(bundle, mode, n_ctx=64)
        reference.audit = mode == "predicted"
        # the predictors jump at their thresholds, so here the oracle rounds its cache as the engine does
        reference.cache_dtype = torch.float16 if mode == "predicted" else torch.float32
        computed = reference.prefill(IDS, all_logits=True)
        engine = Engine.load(bundle, mode, 2, n_ctx=64)
        engine.audit = mode == "predicted"
        assert difference(engine.prefill(IDS, all_logits=True), computed) < 1e-3
        assert engine.stats().recall == pytest.approx(reference.stats().recall, abs=0.01, nan_ok=True)
        engine.reset()
        assert difference(np.stack([engine.decode(token) for token in IDS]), computed) < 1e-3
        if expected is not None:
            assert difference(computed, expected) < 1e-5
    assert difference(computed, logits_of(name)) > 0.01  # the random predictors did leave neurons out


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bundle_is_whole(name, make_bundle_of):
    assert verify_bundle(make_bundle_of(name)) == []


@pytest.mark.parametrize("name", FAMILIES)
def test_llama_cpp_agrees_where_it_has_the_function(name, make_bundle_of, logits_of):
    llama_cpp = pytest.importorskip("llama_cpp")
    bundle = make_bundle_of(name)
    spec = ModelSpec.from_config(json.loads((bundle / "config.json").read_text()))
    engine = llama_cpp.Llama(str(bundle / "m.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    engine.eval(IDS.tolist())
    error = difference(np.array(engine.scores[: len(IDS)]), logits_of(name))
    engine.close()
    differs = GGUFFile(bundle / "m.gguf").metadata.get("hotcold.llama_cpp_differences")
    manifest = json.loads((bundle / "manifest.json").read_text())
    assert manifest["llama_cpp_exact"] == is_exact(spec) == (differs is None)
    assert error < 5e-3 if is_exact(spec) else error > 5e-3


@pytest.mark.parametrize("name", ["llama-yarn", "mistral-window", "bamboo", "qwen2", "qwen3", "prosparse"])
def test_our_gguf_files_are_read_back_as_the_checkpoint(name, make_family, make_bundle_of):
    original = HFCheckpoint(make_family(name))
    spec = ModelSpec.from_config(original.config)
    for file in ("m.gguf", "m.powerinfer.gguf"):
        again = GGUFCheckpoint(make_bundle_of(name) / file)
        read = ModelSpec.from_config(again.config)
        assert (read.windows, read.activation, read.biases) == (spec.windows, spec.activation, spec.biases)
        np.testing.assert_allclose(read.rope.frequencies(16), spec.rope.frequencies(16), rtol=1e-6)
        assert again.names() == original.names()
        for tensor in original.names():
            np.testing.assert_array_equal(again.load(tensor), original.load(tensor))


def test_learned_positions_bound_the_context(make_bundle_of):
    with pytest.raises(InputError, match=r"so long a context \(got 65, expected at most 64\)"):
        Engine.load(make_bundle_of("opt"), "dense", 1, n_ctx=65)
    with pytest.raises(InputError, match=r"so long a context \(got 65, expected at most 64\)"):
        GpuEngine.load(make_bundle_of("opt"), "exact", "cpu", n_ctx=65)
    Engine.load(make_bundle_of("opt"), "exact", 1, n_ctx=64)


def test_opt_without_the_name_of_the_base_model(make_family, tmp_path):
    """As Meta's own checkpoints are; transformers reads them too."""
    tensors = load_file(make_family("opt") / "model.safetensors")
    write_model(tmp_path / "bare", FAMILIES["opt"])
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    storage.write_tensors(tmp_path / "bare" / "model.safetensors", bare, {"format": "pt"})
    source = HFCheckpoint(tmp_path / "bare")
    assert source.names() == set(tensors)
    np.testing.assert_array_equal(
        source.load("model.decoder.layers.1.fc1.weight"), tensors["model.decoder.layers.1.fc1.weight"]
    )
    loaded = checkpoint.load_model(str(tmp_path / "bare")).state_dict()
    np.testing.assert_array_equal(
        loaded["model.decoder.layers.1.fc1.weight"].numpy(), tensors["model.decoder.layers.1.fc1.weight"]
    )


@pytest.mark.parametrize(
    "name, tensor",
    [
        ("qwen2", "model.layers.1.self_attn.v_proj.bias"),
        ("qwen3", "model.layers.1.self_attn.k_norm.weight"),
        ("opt", "model.decoder.layers.0.fc2.bias"),
        ("opt", "model.decoder.embed_positions.weight"),
        ("falcon-40b-relu", "transformer.h.1.ln_attn.bias"),
    ],
)
def test_the_measure_sees_what_is_left_out(name, tensor, make_family, logits_of, tmp_path):
    model, changed = make_family(name), tmp_path / "changed"
    write_model(changed, FAMILIES[name])
    tensors = load_file(model / "model.safetensors")
    tensors[tensor] = (
        np.ones_like(tensors[tensor]) if "norm.weight" in tensor else np.zeros_like(tensors[tensor])
    )
    storage.write_tensors(changed / "model.safetensors", tensors, {"format": "pt"})
    export_bundle(
        HFCheckpoint(changed), tmp_path / "b", name="m", fingerprint="0" * 64, options=ExportOptions("f32")
    )
    engine = Engine.load(tmp_path / "b", "dense", 1, n_ctx=64)
    assert difference(engine.prefill(IDS, all_logits=True), logits_of(name)) > 0.01


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path, rng = tmp_path_factory.mktemp("text") / "text.jsonl", np.random.default_rng(0)
    words = [
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "the",
        "lazy",
        "dog",
        "東京",
        "naïve",
        "café",
        "0123",
        "🦊",
    ]
    path.write_text("\n".join(json.dumps({"text": " ".join(rng.choice(words, 20))}) for _ in range(300)))
    return path


@pytest.mark.parametrize(
    "name",
    [
        "llama-3-rope",
        "prosparse",
        "bamboo",
        "qwen2",
        "qwen3",
        "opt",
        "falcon-7b-relu",
        "falcon-40b-relu",
        "minicpm-s",
    ],
)
def test_the_commands_from_traces_to_perplexity(name, make_family, bundle, text_file, tmp_path, capsys):
    """collect-traces → train-predictors → export → perplexity: what the predictors cost stays small."""
    model = tmp_path / "model"
    write_model(model, FAMILIES[name])
    bundle.tokenizer.save(str(model / "tokenizer.json"))
    paths = {part: str(tmp_path / part) for part in ("model", "traces", "predictors", "bundle")}
    commands = [
        ["collect-traces", "--model", paths["model"], "--text", str(text_file), "--tokens", "1500",
         "--window", "32", "--out", paths["traces"], "-t", "1"],
        ["train-predictors", "--traces", paths["traces"], "--out", paths["predictors"], "--epochs", "2"],
        ["export", "--model", paths["model"], "--predictors", paths["predictors"], "--out", paths["bundle"],
         "--quant", "f16"],
        ["perplexity", "--bundle", paths["bundle"], "--mode", "exact,predicted", "--reference", "dense",
         "--text", str(text_file), "--tokens", "128", "--window", "32", "-t", "1", "--json"],
    ]  # fmt: skip
    for command in commands:
        assert main(command) == 0, capsys.readouterr().err
    exact, predicted = (json.loads(line) for line in capsys.readouterr().out.splitlines()[-2:])
    assert exact["kl"] < 1e-3 and exact["same_top"] > 0.97
    assert predicted["kl"] < 0.5
