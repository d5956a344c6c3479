"""Good files of every format, assembled from docs/formats.md with struct, json and hashlib, without hotcold.

What reads them therefore agrees with the document and not only with our own writers.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

from malformed_gguf import BOOL, F32, I32, STRING, U32, U64, array, gguf, info, kv, text, u32

FINGERPRINT = "0123456789abcdef" * 4


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def floats(n: int) -> bytes:
    return struct.pack(f"<{n}f", *((i % 13 - 6) / 8 for i in range(n)))


def floats_above_zero(n: int) -> bytes:
    return struct.pack(f"<{n}f", *range(1, n + 1))


def safetensors(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header, offset = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    head = as_json(header)
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + b"".join(data for _, _, data in tensors.values())


def string(key: str, value: str) -> bytes:
    return kv(key, STRING, text(value))


def f32(key: str, value: float) -> bytes:
    return kv(key, F32, struct.pack("<f", value))


# --- predictor bundle, version 1: two layers of d_model 4 and d_ff 6, ranks 2 and 1


def predictor_config() -> dict:
    metrics = {"recall": 0.95, "precision": 0.5, "predicted_sparsity": 0.7, "true_sparsity": 0.9}
    return {
        "format": "hotcold-predictor", "version": 1, "model_fingerprint": FINGERPRINT, "n_layers": 2,
        "d_model": 4, "d_ff": 6, "ranks": [2, 1], "thresholds": [0.25, float("-inf")],
        "target_recall": 0.95, "metrics": [metrics, metrics],
    }  # fmt: skip


def predictor_tensors() -> dict:
    tensors = {}
    for layer, rank in enumerate((2, 1)):
        shapes = {"fc1.weight": [rank, 4], "fc2.weight": [6, rank], "firing_frequency": [6]}
        for name, shape in shapes.items():
            tensors[f"layers.{layer}.{name}"] = (
                "F32",
                shape,
                floats(rank * 4 if name[2] == "1" else 6 * rank),
            )
        tensors[f"layers.{layer}.firing_frequency"] = ("F32", [6], struct.pack("<6f", 0, 0.5, 1, 0, 0.25, 1))
    return tensors


def svd_config() -> dict:
    """Version 2, which names the kind: here one with a bias."""
    return predictor_config() | {"version": 2, "kind": "svd", "training": {"damping": 0.01}}


def svd_tensors() -> dict:
    bias = ("F32", [6], floats(6))
    return predictor_tensors() | {f"layers.{layer}.fc2.bias": bias for layer in range(2)}


def svd_predictors(folder: Path) -> None:
    (folder / "config.json").write_bytes(as_json(svd_config()))
    (folder / "model.safetensors").write_bytes(safetensors(svd_tensors()))


def predictors(folder: Path) -> None:
    (folder / "config.json").write_bytes(as_json(predictor_config()))
    (folder / "model.safetensors").write_bytes(safetensors(predictor_tensors()))


# --- traces, version 2: two layers of d_model 2 and d_ff 9, three tokens in shards of two

IDS, DOCUMENT, PART = struct.pack("<3i", 7, 8, 9), struct.pack("<3i", 0, 1, 2), bytes([0, 1, 2])


def trace_run() -> dict:
    return {
        "format": "hotcold-traces", "version": 2, "model_fingerprint": FINGERPRINT, "n_layers": 2,
        "d_model": 2, "d_ff": 9, "activation": "relu", "n_tokens": 3, "shard_tokens": 2, "window": 512,
        "threads": 1, "text_sha256": sha256(IDS + DOCUMENT + PART), "model": "m", "text": "t",
    }  # fmt: skip


def trace_shard(tokens: int) -> bytes:
    x, active = struct.pack(f"<{2 * tokens}e", *range(2 * tokens)), bytes([0b101, 0b1] * tokens)
    return safetensors({"active": ("U8", [tokens, 2], active), "x": ("F16", [tokens, 2], x)})


def trace_manifest(folder: Path) -> None:
    """One line per shard, by what lies there."""
    lines = []
    for shard, tokens in enumerate((2, 1)):
        for layer in range(2):
            data = (folder / f"layer-{layer:03d}/shard-{shard:06d}.safetensors").read_bytes()
            entry = {"layer": layer, "shard": shard, "bytes": len(data), "sha256": sha256(data)}
            lines.append(as_json(entry | {"fired": 3 * tokens, "clipped": 0}) + b"\n")
    (folder / "manifest.jsonl").write_bytes(b"".join(lines))


def traces(folder: Path) -> None:
    tokens = {"ids": ("I32", [3], IDS), "document": ("I32", [3], DOCUMENT), "part": ("U8", [3], PART)}
    (folder / "run.json").write_bytes(as_json(trace_run()))
    (folder / "tokens.safetensors").write_bytes(safetensors(tokens))
    for layer in range(2):
        (folder / f"layer-{layer:03d}").mkdir()
        for shard, count in enumerate((2, 1)):
            path = folder / f"layer-{layer:03d}/shard-{shard:06d}.safetensors"
            path.write_bytes(trace_shard(count))
    trace_manifest(folder)


# --- a model: one layer of d_model 8, two heads, d_ff 12, five tokens, SiLU


def model_config() -> dict:
    return {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 5,
        "max_position_embeddings": 16, "rms_norm_eps": 0.5, "rope_theta": 100.0, "hidden_act": "silu",
        "tie_word_embeddings": False, "bos_token_id": 1,
    }  # fmt: skip


def other_configs() -> list[dict]:
    """Keys that other families know."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8, "rope_theta": 100.0}
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
    window = {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0}
    changes: list[dict] = [
        {"rope_parameters": rope}, {"rope_scaling": yarn, "hidden_act": "fatrelu", "hidden_act_param": 0.01},
        {"model_type": "mistral", "sliding_window": 4}, {"model_type": "qwen2", **window},
        {"model_type": "qwen3", "layer_types": ["sliding_attention"], **window},
        {"model_type": "opt", "word_embed_proj_dim": 8, "do_layer_norm_before": True, "ffn_dim": 12},
        {"model_type": "falcon", "new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
        {"model_type": "minicpm", "scale_emb": 12, "scale_depth": 1.4, "dim_model_base": 256},
    ]  # fmt: skip
    return [model_config() | change for change in changes]


def model_shapes() -> dict[str, tuple[str, tuple[int, ...]]]:
    """GGUF name -> name in a checkpoint, shape with rows first."""
    layer = {
        "attn_norm": ("input_layernorm", (8,)), "ffn_norm": ("post_attention_layernorm", (8,)),
        "attn_q": ("self_attn.q_proj", (8, 8)), "attn_k": ("self_attn.k_proj", (4, 8)),
        "attn_v": ("self_attn.v_proj", (4, 8)), "attn_output": ("self_attn.o_proj", (8, 8)),
        "ffn_gate": ("mlp.gate_proj", (12, 8)), "ffn_up": ("mlp.up_proj", (12, 8)),
        "ffn_down": ("mlp.down_proj", (8, 12)),
    }  # fmt: skip
    outer = {"token_embd": ("model.embed_tokens", (5, 8)), "output_norm": ("model.norm", (8,))}
    outer["output"] = ("lm_head", (5, 8))
    return outer | {f"blk.0.{k}": (f"model.layers.0.{name}", shape) for k, (name, shape) in layer.items()}


def size(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def model_gguf(extra: tuple[bytes, ...] = (), magic: bytes = b"GGUF") -> bytes:
    """The model as a dense F32 file; every tensor's rows as they are."""
    counts = {
        "block_count": 1, "context_length": 16, "embedding_length": 8, "feed_forward_length": 12,
        "attention.head_count": 2, "attention.head_count_kv": 1, "rope.dimension_count": 4, "vocab_size": 5,
    }  # fmt: skip
    kvs = [string("general.architecture", "llama"), *(u32(f"llama.{k}", n) for k, n in counts.items())]
    kvs += [f32("llama.attention.layer_norm_rms_epsilon", 0.5), f32("llama.rope.freq_base", 100.0)]
    infos, data, offset = [], b"", 0
    for name, (_, shape) in model_shapes().items():
        infos.append(info(f"{name}.weight", tuple(reversed(shape)), offset=offset))
        content = floats(size(shape))
        data += content + bytes(-len(content) % 32)
        offset = len(data)
    return gguf(magic=magic, kvs=[*kvs, *extra], infos=infos, data=data)


def engine_gguf(sparse: bool) -> bytes:
    """A ReLU Llama of one layer, of sizes that the native engine takes, with every key that it knows."""
    d, ff, rank = 32, 64, 32
    counts = {
        "block_count": 1, "context_length": 16, "embedding_length": d, "feed_forward_length": ff,
        "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 16,
    }  # fmt: skip
    shapes = {
        "token_embd": (5, d), "output_norm": (d,), "output": (5, d), "blk.0.attn_norm": (d,),
        "blk.0.ffn_norm": (d,), "blk.0.attn_q": (d, d), "blk.0.attn_k": (16, d), "blk.0.attn_v": (16, d),
        "blk.0.attn_output": (d, d), "blk.0.ffn_gate": (ff, d), "blk.0.ffn_up": (ff, d),
    }  # fmt: skip
    predictor = {"blk.0.ffn_down_t": (ff, d), "blk.0.fc1": (rank, d), "blk.0.fc2": (ff, rank)}
    shapes |= predictor if sparse else {"blk.0.ffn_down": (d, ff)}
    one, three = struct.pack("<f", 0.5), struct.pack("<3i", 1, 2, 63)
    kvs = [
        string("general.architecture", "llama"), *(u32(f"llama.{k}", n) for k, n in counts.items()),
        f32("llama.attention.layer_norm_rms_epsilon", 0.5), f32("llama.rope.freq_base", 100.0),
        string("hotcold.activation", "fatrelu"), array("hotcold.activation_thresholds", F32, 1, one),
        f32("powerinfer.sparse_threshold", 0.5), array("hotcold.predictor.thresholds", F32, 1, one),
        array("hotcold.predictor.ranks", U32, 1, struct.pack("<I", rank)),
        array("hotcold.hot.counts", U32, 1, struct.pack("<I", 3)),
        array("hotcold.hot.neurons", I32, 3, three),
        array("hotcold.attention.windows", U32, 1, struct.pack("<I", 4)), *vocabulary_kvs(),
        string("tokenizer.chat_template", "{{ messages[0].content }}"),
    ]  # fmt: skip
    kvs += [array("hotcold.rope.factors", F32, 8, floats_above_zero(8))] if sparse else yarn_kvs()
    infos, data = [], b""
    for name, shape in shapes.items():
        is_matrix = len(shape) > 1
        kind = 2 if is_matrix else 0  # Q4_0: blocks of a float16 scale and 16 bytes
        infos.append(info(f"{name}.weight", tuple(reversed(shape)), kind, len(data)))
        content = (struct.pack("<e", 0.25) + bytes(range(16))) * (size(shape) // 32)
        content = content if is_matrix else floats(size(shape))
        data += content + bytes(-len(content) % 32)
    return gguf(magic=b"PWRI" if sparse else b"GGUF", kvs=kvs, infos=infos, data=data)


def yarn_kvs() -> list[bytes]:
    """All keys of a YaRN scaling of two contexts of eight tokens."""
    numbers = {"factor": 2.0, "yarn_beta_slow": 1.0, "yarn_beta_fast": 32.0, "attn_factor": 1.0}
    return [
        string("llama.rope.scaling.type", "yarn"), u32("llama.rope.scaling.original_context_length", 8),
        *(f32(f"llama.rope.scaling.{key}", number) for key, number in numbers.items()),
    ]  # fmt: skip


def attention_gguf(fingerprint: str | None = None, *, outputs: int = 32, name: str = "attn_output") -> bytes:
    """The projections of `engine_gguf` by input, in Q4_0."""
    shapes = {"attn_q": (32, 32), "attn_k": (32, 16), "attn_v": (32, 16), name: (32, outputs)}
    kvs = [string("general.architecture", "hotcold-attention")]
    kvs += [string("hotcold.model_fingerprint", fingerprint)] if fingerprint else []
    infos, data = [], b""
    for module, shape in shapes.items():
        kind = 2 if shape[1] % 32 == 0 else 1  # Q4_0; F16 where rows are not whole blocks
        infos.append(info(f"blk.0.{module}_t.weight", tuple(reversed(shape)), kind, len(data)))
        block = struct.pack("<e", 0.25) + bytes(range(16))
        content = block * (size(shape) // 32) if kind == 2 else struct.pack("<e", 0.25) * size(shape)
        data += content + bytes(-len(content) % 32)
    return gguf(kvs=kvs, infos=infos, data=data)


def attention(folder: Path) -> None:
    (folder / "m.gguf").write_bytes(engine_gguf(True))
    (folder / "a.gguf").write_bytes(attention_gguf())


def vocabulary_kvs() -> tuple[bytes, ...]:
    """A byte-level BPE of five tokens."""
    tokens, merges = b"".join(map(text, ["<s>", "a", "b", "ab", "Ġ"])), text("a b")
    return (
        string("tokenizer.ggml.model", "gpt2"), string("tokenizer.ggml.pre", "llama-bpe"),
        array("tokenizer.ggml.tokens", STRING, 5, tokens),
        array("tokenizer.ggml.token_type", I32, 5, struct.pack("<5i", 3, 1, 1, 1, 1)),
        array("tokenizer.ggml.merges", STRING, 1, merges), u32("tokenizer.ggml.bos_token_id", 0),
        kv("tokenizer.ggml.add_bos_token", BOOL, b"\1"),
    )  # fmt: skip


def checkpoint(folder: Path) -> None:
    """An HF directory in two shards with an index."""
    tensors = {
        f"{name}.weight": ("F32", list(shape), floats(size(shape))) for name, shape in model_shapes().values()
    }
    names = list(tensors)
    parts = {"model-1.safetensors": names[:3], "model-2.safetensors": names[3:]}
    for file, inside in parts.items():
        (folder / file).write_bytes(safetensors({name: tensors[name] for name in inside}))
    weights = {name: file for file, inside in parts.items() for name in inside}
    (folder / "model.safetensors.index.json").write_bytes(as_json({"weight_map": weights}))
    (folder / "config.json").write_bytes(as_json(model_config()))


# --- bundle, version 1: a dense file alone, without tokenizer


def manifest_of(folder: Path) -> dict:
    roles = {"m.gguf": "dense", "config.json": "config"}
    values = {
        "format": "hotcold-bundle", "version": 1, "name": "m", "quant": "f32", "head_quant": "f32",
        "predictor_quant": "q8_0", "hot_frequency": 0.5, "activation": "silu",
        "model_fingerprint": FINGERPRINT, "llama_cpp_exact": True, "source_quantized": [],
        "files": {name: entry(folder / name, role) for name, role in roles.items()},
    }  # fmt: skip
    return signed(values)


def entry(path: Path, role: str) -> dict:
    data = path.read_bytes()
    return {"role": role, "bytes": len(data), "sha256": sha256(data)}


def signed(values: dict) -> dict:
    """The manifest with the sha256 that the document asks for."""
    values = {key: value for key, value in values.items() if key != "sha256"}
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return values | {"sha256": sha256(text.encode())}


def bundle(folder: Path) -> None:
    extra = (
        string("general.name", "m"), u32("general.file_type", 0), u32("general.quantization_version", 2),
        u32("hotcold.version", 1), string("hotcold.model_fingerprint", FINGERPRINT),
        string("hotcold.activation", "silu"),
        array("hotcold.activation_thresholds", F32, 1, struct.pack("<f", 0.0)),
        string("tokenizer.ggml.model", "none"),
    )  # fmt: skip
    (folder / "m.gguf").write_bytes(model_gguf(extra))
    (folder / "config.json").write_bytes(as_json(model_config()))
    (folder / "manifest.json").write_bytes(as_json(manifest_of(folder)))


# --- split files and GPU index


def split_part(number: int, count: int, name: str, total: int) -> bytes:
    kvs = [u32("split.no", number), u32("split.count", count), u32("split.tensors.count", total)]
    return gguf(kvs=kvs, infos=[info(name, (8,))], data=floats(8))


def split(folder: Path) -> None:
    for number in range(2):
        path = folder / f"m-{number + 1:05d}-of-00002.gguf"
        path.write_bytes(split_part(number, 2, f"t{number}", 2))


def gpu_index_bytes() -> bytes:
    """One layer of four neurons, of which 1 and 3 are on the GPU; I32 is type 18 under this magic."""
    kvs = [string("general.architecture", "generic.gpu_index"), u32("generic.gpu_index.block_count", 1)]
    kvs.append(kv("split.vram_capacity", U64, struct.pack("<Q", 1 << 30)))
    infos = [info("blk.0.gpu_idx", (4,), 18), info("blk.0.gpu_bucket", (2,), 18, 32)]
    data = struct.pack("<4i", 0, 1, 0, 1) + bytes(16) + struct.pack("<2i", 1, 3)
    return gguf(magic=b"PWRI", kvs=kvs, infos=infos, data=data)


# --- tokenizer.json, byte-level and byte-fallback


def tokenizer_json(kind: str = "byte-level") -> dict:
    added = {"id": 0, "content": "<s>", "single_word": False, "lstrip": False, "rstrip": False}
    model = {"type": "BPE", "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4}, "merges": ["a b"]}
    pre: dict = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if kind == "byte-fallback":
        model |= {
            "byte_fallback": True,
            "unk_token": "<s>",
            "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "▁": 4},
        }
        pre = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": pre,
        "post_processor": None, "decoder": None, "model": model,
        "added_tokens": [added | {"normalized": False, "special": True}],
    }  # fmt: skip


def tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(as_json(tokenizer_json()))
    (folder / "tokenizer_config.json").write_bytes(as_json({"bos_token": "<s>", "chat_template": "{{ x }}"}))
