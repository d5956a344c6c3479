"""PowerInfer's layout: files assembled by hand from its description are read, and ours follow its rules."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from hotcold.cli import main
from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.powerinfer.model import runs_in_powerinfer
from hotcold.files.gguf import GGUFFile
from hotcold.files.quantize import dequantize, quantize
from hotcold.model.checkpoint import fingerprint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.model.spec import ModelSpec
from hotcold.predictor.bundle import PredictorBundle

U32, F32, STRING, ARRAY, U64, I32 = 4, 6, 8, 9, 10, 5
F32_TENSOR, F16_TENSOR, PWRI_I32 = 0, 1, 18


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def file_by_hand(kvs: list[bytes], tensors: dict[str, tuple[int, tuple[int, ...], bytes]]) -> bytes:
    """name -> (ggml type id, ne with the fastest dimension first, bytes)"""
    infos, data = b"", b""
    for name, (kind, ne, content) in tensors.items():
        infos += text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, len(data))
        data += content + bytes(-len(content) % 32)
    head = b"PWRI" + struct.pack("<IQQ", 3, len(tensors), len(kvs)) + b"".join(kvs) + infos
    return head + bytes(-len(head) % 32) + data


def sparse_llama_by_hand() -> tuple[bytes, dict[str, np.ndarray]]:
    """One layer as PowerInfer's convert.py writes it: d_model 8, 2 heads, d_ff 12, rank 4, 5 tokens."""
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (5, 8), "output_norm": (8,), "output": (5, 8),
        "blk.0.attn_norm": (8,), "blk.0.attn_q": (8, 8), "blk.0.attn_k": (4, 8), "blk.0.attn_v": (4, 8),
        "blk.0.attn_output": (8, 8), "blk.0.ffn_norm": (8,), "blk.0.ffn_gate": (12, 8),
        "blk.0.ffn_up": (12, 8), "blk.0.ffn_down_t": (12, 8), "blk.0.fc1": (4, 8), "blk.0.fc2": (12, 4),
    }  # fmt: skip
    arrays = {
        f"{name}.weight": rng.standard_normal(shape).astype("<f2" if len(shape) == 2 else "<f4")
        for name, shape in shapes.items()
    }
    numbers = {
        "context_length": 64, "embedding_length": 8, "feed_forward_length": 12, "attention.head_count": 2,
        "attention.head_count_kv": 1, "block_count": 1, "rope.dimension_count": 4,
    }  # fmt: skip
    tokens = ["<unk>", "a", "b", "c", "d"]
    kvs = [
        key("general.architecture", STRING, text("llama")),
        *(key(f"llama.{name}", U32, struct.pack("<I", value)) for name, value in numbers.items()),
        key("llama.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-5)),
        key("powerinfer.sparse_threshold", F32, struct.pack("<f", 0.25)),
        key("tokenizer.ggml.model", STRING, text("llama")),
        key("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, 5) + b"".join(map(text, tokens))),
        key("tokenizer.ggml.scores", ARRAY, struct.pack("<IQ5f", F32, 5, *range(5))),
        key("tokenizer.ggml.token_type", ARRAY, struct.pack("<IQ5i", I32, 5, 2, 1, 1, 1, 1)),
    ]
    tensors = {
        name: (F16_TENSOR if array.ndim == 2 else F32_TENSOR, array.shape[::-1], array.tobytes())
        for name, array in arrays.items()
    }
    return file_by_hand(kvs, tensors), arrays


def test_a_model_assembled_by_hand_is_read(tmp_path):
    data, arrays = sparse_llama_by_hand()
    (tmp_path / "m.powerinfer.gguf").write_bytes(data)
    file = GGUFFile(tmp_path / "m.powerinfer.gguf")
    assert (file.magic, file.version) == ("PWRI", 3)
    assert file.metadata["powerinfer.sparse_threshold"] == 0.25
    assert file.metadata["tokenizer.ggml.tokens"] == ["<unk>", "a", "b", "c", "d"]
    assert file.metadata["tokenizer.ggml.token_type"].tolist() == [2, 1, 1, 1, 1]
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        assert file.tensors[name].shape == array.shape
        np.testing.assert_array_equal(dequantize(file.tensors[name]), array.astype(np.float32))


def test_a_model_assembled_by_hand_is_written_as_it_was(tmp_path):
    """Read, decoded, turned to Hugging Face's order and back: F16 comes out bit for bit."""
    data, arrays = sparse_llama_by_hand()
    (tmp_path / "m.powerinfer.gguf").write_bytes(data)
    out = tmp_path / "again.powerinfer.gguf"
    assert (
        main(["convert", str(tmp_path / "m.powerinfer.gguf"), "--to", "powerinfer", "--out", str(out)]) == 0
    )
    file = GGUFFile(out)
    assert file.magic == "PWRI" and set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        assert file.tensors[name].data.tobytes() == array.tobytes(), name
    assert file.metadata["powerinfer.sparse_threshold"] == 0.25
    assert file.metadata["tokenizer.ggml.tokens"] == ["<unk>", "a", "b", "c", "d"]


def test_a_gpu_index_has_the_type_ids_of_its_time(tmp_path):
    on_gpu, bucket = np.array([0, 1, 1, 0], "<i4"), np.array([1, 2], "<i4")
    kvs = [
        key("general.architecture", STRING, text("generic.gpu_index")),
        key("split.vram_capacity", U64, struct.pack("<Q", 1 << 33)),
    ]
    tensors = {
        "blk.0.gpu_idx": (PWRI_I32, (4,), on_gpu.tobytes()),
        "blk.0.gpu_bucket": (PWRI_I32, (2,), bucket.tobytes()),
    }
    (tmp_path / "m.generated.gpuidx").write_bytes(file_by_hand(kvs, tensors))
    file = GGUFFile(tmp_path / "m.generated.gpuidx")
    assert file.metadata["split.vram_capacity"] == 1 << 33
    assert [tensor.type for tensor in file.tensors.values()] == ["I32", "I32"]
    assert file.tensors["blk.0.gpu_bucket"].data.view("<i4").tolist() == [1, 2]


@pytest.fixture(scope="module")
def exported(make_model, make_predictors, tmp_path_factory):
    def export(quant: str, *, tied: bool = True, hot: float = 0.5):
        model = make_model("relu", tie_word_embeddings=tied)
        predictors = PredictorBundle.load(make_predictors(model))
        out = tmp_path_factory.mktemp("bundle")
        export_bundle(
            HFCheckpoint(model), out, name="m", fingerprint=fingerprint(str(model)), folder=model,
            predictors=predictors, options=ExportOptions(quant, hot_frequency=hot, predictor_quant="f32"),
        )  # fmt: skip
        return HFCheckpoint(model), predictors, GGUFFile(out / "m.powerinfer.gguf")

    return export


@pytest.mark.parametrize("quant, kind", [("f16", "F16"), ("q4_0", "Q4_0")])
@pytest.mark.parametrize("tied", [True, False])
def test_every_weight_is_there_once_and_bit_for_bit(exported, quant, kind, tied):
    source, predictors, file = exported(quant, tied=tied)
    spec = ModelSpec.from_config(source.config)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    expected = {"token_embd": source.load("model.embed_tokens.weight"), "output": source.load(head)}
    norms = {"output_norm": source.load("model.norm.weight")}
    for layer in range(spec.n_layers):
        weight = {name.split(".")[-2]: source.load(name) for name in source.names() if f".{layer}." in name}
        blk = f"blk.{layer}"
        norms[f"{blk}.attn_norm"] = weight["input_layernorm"]
        norms[f"{blk}.ffn_norm"] = weight["post_attention_layernorm"]
        for ours, theirs, n_heads in (("q", "q_proj", 4), ("k", "k_proj", 2)):
            halves = weight[theirs].reshape(n_heads, 2, -1, spec.d_model)
            expected[f"{blk}.attn_{ours}"] = np.stack([halves[:, 0], halves[:, 1]], axis=2).reshape(
                -1, spec.d_model
            )
        expected[f"{blk}.attn_v"], expected[f"{blk}.attn_output"] = weight["v_proj"], weight["o_proj"]
        expected[f"{blk}.ffn_gate"], expected[f"{blk}.ffn_up"] = weight["gate_proj"], weight["up_proj"]
        expected[f"{blk}.ffn_down_t"] = np.ascontiguousarray(weight["down_proj"].T)
    types = dict.fromkeys(expected, kind) | dict.fromkeys(norms, "F32")
    for layer in range(spec.n_layers):
        expected[f"blk.{layer}.fc1"], expected[f"blk.{layer}.fc2"] = (
            predictors.layers[layer].fc1,
            predictors.layers[layer].fc2,
        )
        types |= {f"blk.{layer}.fc1": "F32", f"blk.{layer}.fc2": "F32"}
    assert set(file.tensors) == {f"{name}.weight" for name in types}
    for name, array in (expected | norms).items():
        tensor = file.tensors[f"{name}.weight"]
        assert (tensor.type, tensor.shape) == (types[name], array.shape)
        assert tensor.data.tobytes() == quantize(array, types[name]).tobytes()


def test_the_keys_that_powerinfer_requires_have_its_types(exported):
    _, _, file = exported("q4_0")
    for name in (
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "block_count",
    ):
        assert type(file.require(f"llama.{name}", int)) is int
    assert file.require("llama.attention.layer_norm_rms_epsilon", float) == pytest.approx(1e-5)
    assert file.require("general.architecture", str) == "llama"
    n_vocab = len(file.require("tokenizer.ggml.tokens", list))
    assert (
        len(file.metadata["tokenizer.ggml.scores"])
        == len(file.metadata["tokenizer.ggml.token_type"])
        == n_vocab
    )
    assert file.require("powerinfer.sparse_threshold", float) == -0.25  # the least of 0.5, -0.25 and 0


def test_hotcolds_own_keys(exported):
    source, _, file = exported("q4_0", hot=0.75)
    metadata = file.metadata
    assert metadata["hotcold.version"] == 1
    assert metadata["hotcold.activation"] == "relu"
    assert metadata["hotcold.activation_thresholds"].tolist() == [0, 0, 0]
    assert metadata["hotcold.predictor.thresholds"].tolist() == [0.5, -0.25, 0.0]
    assert metadata["hotcold.predictor.ranks"].tolist() == [32, 32, 32]
    assert metadata["hotcold.model_fingerprint"] == fingerprint(str(source.path))
    hot = np.flatnonzero(np.linspace(0, 1, 160, dtype=np.float32) >= 0.75)
    assert metadata["hotcold.hot.counts"].tolist() == [len(hot)] * 3
    assert metadata["hotcold.hot.neurons"].tolist() == hot.tolist() * 3


def test_no_neuron_is_hot_above_a_frequency_of_one(exported):
    _, _, file = exported("q4_0", hot=1.5)
    assert file.metadata["hotcold.hot.counts"].tolist() == [0, 0, 0]
    assert file.metadata["hotcold.hot.neurons"].size == 0


@pytest.mark.parametrize(
    "changes, kind, runs",
    [
        ({}, "F16", True), ({}, "Q4_0", True), ({}, "Q8_0", False), ({}, "BF16", False),
        ({"hidden_act": "fatrelu_0.01"}, "F16", False), ({"hidden_act": "fatrelu"}, "F16", True),
        ({"hidden_act": "drelu"}, "F16", True), ({"head_dim": 32}, "F16", False),
    ],
)  # fmt: skip
def test_what_powerinfer_itself_can_run(make_model, changes, kind, runs):
    config = HFCheckpoint(make_model()).config | changes
    assert runs_in_powerinfer(ModelSpec.from_config(config), kind) is runs
