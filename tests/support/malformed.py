"""Folders with one thing wrong: which error there is, and the place that it must name.

Those of GGUF itself are in malformed_gguf.py. Each edits a file of the good folder of a reader (readers.py).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import handmade
from malformed_gguf import F32, I32, STRING, U32, array, gguf, info, kv, text, u32
from readers import SHARD

from hotcold.errors import FormatError, HotcoldError, InputError, MismatchError, ShapeError, UnsupportedError

Edit = Callable[[Path], None]


class Case(NamedTuple):
    """`place` is part of the message: the file's name, and the field if there is one."""

    reader: str
    edit: Edit
    error: type[HotcoldError]
    place: str


def put(name: str, content: bytes | Callable[[bytes], bytes]) -> Edit:
    """Replace a file's content."""

    def edit(folder: Path) -> None:
        path = folder / name
        path.write_bytes(content if isinstance(content, bytes) else content(path.read_bytes()))

    return edit


def gone(name: str) -> Edit:
    return lambda folder: (folder / name).unlink()


def keys(name: str, /, drop: str | None = None, **changes: Any) -> Edit:
    """Change or drop keys of a JSON object."""

    def change(data: bytes) -> bytes:
        values = json.loads(data) | changes
        values.pop(drop, None)
        return handmade.as_json(values)

    return put(name, change)


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Edit:
    return put("manifest.jsonl", lambda data: b"".join(change(data.splitlines(keepends=True))))


def line(**changes: Any) -> Edit:
    """Change keys of the first line of a trace's manifest."""
    return lines(lambda all_: [handmade.as_json(json.loads(all_[0]) | changes) + b"\n", *all_[1:]])


def entry(**changes: Any) -> Edit:
    """Change the manifest's entry of m.gguf."""

    def change(data: bytes) -> bytes:
        values = json.loads(data)
        values["files"]["m.gguf"] |= changes
        return handmade.as_json(values)

    return put("manifest.json", change)


def tensors(make: Callable[[], dict], **changes: tuple[str, list[int], bytes] | None) -> bytes:
    """A safetensors file with some tensors replaced; __ in a name stands for a dot."""
    renamed = {name.replace("__", "."): value for name, value in changes.items()}
    return handmade.safetensors({k: v for k, v in (make() | renamed).items() if v is not None})


def header(value: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    raw = value if isinstance(value, bytes) else handmade.as_json(value)
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def one(**changes: object) -> bytes:
    return header({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}, bytes(8))


DEEP = b'{"a":' * 100_000
LONG = b'{"n_layers": ' + b"9" * 5000 + b"}"
TWICE = b'{"n_layers": 1, "n_layers": 2}'
ST, CK, MA, PR, TR, SH = "safetensors", "checkpoint", "manifest", "predictors", "traces", "trace shard"
SP, GI, VO, TK, MO, BU = "split", "gpuidx", "gguf vocabulary", "tokenizer", "gguf model", "bundle"
EN, AT, SV = "engine", "attention", "svd"
T, CFG, INDEX, PART = "t.safetensors", "config.json", "model.safetensors.index.json", "model-1.safetensors"
MAN, RUN, TOK, LINES, MODEL = (
    "manifest.json",
    "run.json",
    "tokens.safetensors",
    "manifest.jsonl",
    "model.safetensors",
)
FIRST, SECOND = "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"
Fm, In, Sh, Un, Mi = FormatError, InputError, ShapeError, UnsupportedError, MismatchError


def vocabulary(*kvs: bytes) -> Edit:
    """The model's file with another vocabulary."""
    return put("m.gguf", handmade.model_gguf(kvs))


def gpu_index(mask: tuple[int, ...], bucket: tuple[int, ...], kind: int = 18) -> Edit:
    kvs = [handmade.string("general.architecture", "generic.gpu_index")]
    kvs.append(u32("split.vram_capacity", 1))
    infos = [info("blk.0.gpu_idx", (len(mask),), kind), info("blk.0.gpu_bucket", (len(bucket),), kind, 32)]
    data = struct.pack(f"<{len(mask)}i", *mask).ljust(32, b"\0") + struct.pack(f"<{len(bucket)}i", *bucket)
    return put("m.gguf", gguf(magic=b"PWRI", kvs=kvs, infos=infos, data=data))


def fourth_part(folder: Path) -> None:
    """A token of a part that there is not, in a file that its hash fits."""
    put(TOK, lambda data: data[:-1] + b"\3")(folder)
    digest = handmade.sha256(handmade.IDS + handmade.DOCUMENT + bytes([0, 1, 3]))
    keys(RUN, text_sha256=digest)(folder)


GPT2, PRE = handmade.string("tokenizer.ggml.model", "gpt2"), handmade.string("tokenizer.ggml.pre", "gpt-2")
AB = array("tokenizer.ggml.tokens", STRING, 2, text("a") + text("b"))


def engine(old: bytes, new: bytes) -> Edit:
    """Exchange a piece of the sparse file's metadata for one of the same length."""
    return put("m.gguf", lambda data: data.replace(old, new, 1))


def number(key: str, old: int, new: int) -> Edit:
    return engine(u32(key, old), u32(key, new))


CASES: dict[str, Case] = {
    "engine: layers 2^31": Case(
        EN, number("llama.block_count", 1, 2**31 - 1), Fm, "block_count: wrong number of layers"
    ),
    "engine: layers 0": Case(EN, number("llama.block_count", 1, 0), Fm, "llama.block_count: bad value"),
    "engine: two layers": Case(
        EN, number("llama.block_count", 1, 2), Fm, "block_count: wrong number of layers"
    ),
    "engine: heads of 2^31": Case(
        EN, number("llama.attention.key_length", 16, 2**31 - 16), Fm, "llama.attention.key_length: bad value"
    ),
    "engine: d_ff 2^31": Case(
        EN, number("llama.feed_forward_length", 64, 2**31 - 1), Sh, "tensor blk.0.ffn_"
    ),
    "engine: d_ff 96": Case(EN, number("llama.feed_forward_length", 64, 96), Sh, "tensor blk.0.ffn_"),
    "engine: no heads": Case(
        EN, number("llama.attention.head_count", 2, 0), Fm, "attention.head_count: bad value"
    ),
    "engine: 2^29 heads": Case(
        EN, number("llama.attention.head_count", 2, 721420290), Fm, "attention.head_count: bad value"
    ),
    "engine: three heads on two": Case(
        EN, number("llama.attention.head_count_kv", 1, 3), Sh, "tensor blk.0.attn_k"
    ),
    "engine: unknown activation": Case(
        EN, engine(b"fatrelu", b"fatrely"), Un, "unknown activation (got fatrely"
    ),
    "engine: hot neuron 64": Case(
        EN, engine(struct.pack("<3i", 1, 2, 63), struct.pack("<3i", 1, 2, 64)), Fm, "hotcold.hot.neurons: hot"
    ),
    "engine: hot neuron -1": Case(
        EN,
        engine(struct.pack("<3i", 1, 2, 63), struct.pack("<3i", -1, 2, 63)),
        Fm,
        "hotcold.hot.neurons: hot",
    ),
    "engine: four hot of three": Case(
        EN,
        engine(
            array("hotcold.hot.counts", U32, 1, b"\3\0\0\0"), array("hotcold.hot.counts", U32, 1, b"\4\0\0\0")
        ),
        Fm,
        "hotcold.hot.neurons: hot",
    ),
    "engine: counts are floats": Case(
        EN,
        engine(array("hotcold.hot.counts", U32, 1, b""), array("hotcold.hot.counts", F32, 1, b"")),
        Fm,
        "hotcold.hot.neurons: hot",
    ),
    "engine: a tensor of another name": Case(
        EN, engine(b"blk.0.fc2.weight", b"blk.0.fc3.weight"), Un, "blk.0.fc3.weight"
    ),
    "attention: not a GGUF file": Case(AT, put("a.gguf", b"x"), Fm, "magic"),
    "attention: another model": Case(
        AT, put("a.gguf", handmade.attention_gguf("f" * 64)), Mi, "these rows belong to another model"
    ),
    "attention: a matrix of another name": Case(
        AT, put("a.gguf", handmade.attention_gguf(name="attn_out")), Fm, "blk.0.attn_output_t.weight: missing"
    ),
    "attention: too many outputs": Case(
        AT, put("a.gguf", handmade.attention_gguf(outputs=64)), Sh, "tensor blk.0.attn_output_t.weight"
    ),
    "safetensors: empty": Case(ST, put(T, b""), Fm, T),
    "safetensors: length alone": Case(ST, put(T, bytes(8)), Fm, T),
    "safetensors: header of 2^63": Case(ST, put(T, header({}, length=1 << 63)), Fm, T),
    "safetensors: header beyond the file": Case(ST, put(T, header({}, length=99)), Fm, T),
    "safetensors: header not JSON": Case(ST, put(T, header(b"{t}")), Fm, T),
    "safetensors: header not UTF-8": Case(ST, put(T, header(b'{"\xff":1}')), Fm, T),
    "safetensors: header too deep": Case(ST, put(T, header(DEEP)), Fm, T),
    "safetensors: data cut": Case(ST, put(T, lambda data: data[:-1]), Fm, T),
    "safetensors: data longer": Case(ST, put(T, lambda data: data + b"x"), Fm, T),
    "safetensors: unknown dtype": Case(ST, put(T, one(dtype="F33")), Fm, T),
    "safetensors: shape and bytes differ": Case(ST, put(T, one(shape=[3])), Fm, T),
    "safetensors: shape that wraps": Case(ST, put(T, one(shape=[1 << 62, 4])), Fm, T),
    "safetensors: negative shape": Case(ST, put(T, one(shape=[-2])), Fm, T),
    "safetensors: offsets swapped": Case(ST, put(T, one(data_offsets=[8, 0])), Fm, T),
    "safetensors: a hole": Case(ST, put(T, one(data_offsets=[4, 12])), Fm, T),
    "safetensors: missing": Case(ST, gone(T), In, T),
    "checkpoint: config cut": Case(CK, put(CFG, b'{"a"'), Fm, "config.json, content: is not JSON"),
    "checkpoint: config a list": Case(CK, put(CFG, b"[]"), Fm, "content: is not a JSON object"),
    "checkpoint: config not UTF-8": Case(CK, put(CFG, b'{"\xff": 1}'), Fm, "content: is not JSON"),
    "checkpoint: config too deep": Case(CK, put(CFG, DEEP), Fm, "content: is not JSON"),
    "checkpoint: 5,000 digits": Case(CK, put(CFG, LONG), Fm, "content: is not JSON"),
    "checkpoint: a key twice": Case(CK, put(CFG, TWICE), Fm, "content: duplicate key (got 'n_layers'"),
    "checkpoint: unknown model": Case(CK, keys(CFG, model_type="gpt9"), Un, "unknown model_type (got gpt9"),
    "checkpoint: model type a list": Case(CK, keys(CFG, model_type=[]), Un, "unknown model_type"),
    "checkpoint: no hidden_size": Case(CK, keys(CFG, drop="hidden_size"), Fm, "hidden_size: missing"),
    "checkpoint: hidden_size text": Case(CK, keys(CFG, hidden_size="8"), Fm, "hidden_size: bad value"),
    "checkpoint: layers 0": Case(CK, keys(CFG, num_hidden_layers=0), Fm, "num_hidden_layers: bad value"),
    "checkpoint: layers 2^31": Case(CK, keys(CFG, num_hidden_layers=2**31 - 1), Fm, "num_hidden_layers: bad"),
    "checkpoint: eps NaN": Case(CK, keys(CFG, rms_norm_eps=float("nan")), Fm, "rms_norm_eps: bad value"),
    "checkpoint: eps 10^400": Case(CK, keys(CFG, rms_norm_eps=10**400), Fm, "rms_norm_eps: bad value"),
    "checkpoint: another width": Case(CK, keys(CFG, intermediate_size=13), Sh, "mlp"),
    "checkpoint: vocabulary 2^31": Case(CK, keys(CFG, vocab_size=2**31 - 1), Sh, "embed_tokens"),
    "checkpoint: no weights": Case(CK, gone(INDEX), In, "no weights"),
    "checkpoint: map a list": Case(CK, keys(INDEX, weight_map=[]), Fm, "weight_map: not a map"),
    "checkpoint: map of numbers": Case(CK, keys(INDEX, weight_map={"a": 1}), Fm, "weight_map: not a map"),
    "checkpoint: shard outside": Case(CK, keys(INDEX, weight_map={"a": "../b"}), Fm, "weight_map: a shard"),
    "checkpoint: shard missing": Case(CK, gone(PART), In, PART),
    "checkpoint: shard empty": Case(CK, put(PART, b""), Fm, PART),
    "checkpoint: weights missing": Case(CK, put(PART, header({})), Fm, "missing tensor"),
    "manifest: empty": Case(MA, put(MAN, b""), Fm, "manifest.json, content: is not JSON"),
    "manifest: missing": Case(MA, gone(MAN), In, MAN),
    "manifest: another format": Case(MA, keys(MAN, format="x"), Fm, "manifest.json, format: not a bundle's"),
    "manifest: version 2": Case(MA, keys(MAN, version=2), Fm, "manifest.json, version: not a bundle's"),
    "manifest: version true": Case(MA, keys(MAN, version=True), Fm, "manifest.json, version: wrong type"),
    "manifest: no name": Case(MA, keys(MAN, drop="name"), Fm, "manifest.json, name: wrong type"),
    "manifest: unknown key": Case(MA, keys(MAN, color="red"), Fm, "manifest.json, color: unknown key"),
    "manifest: altered": Case(MA, keys(MAN, name="n"), Fm, "manifest.json, sha256: altered"),
    "manifest: files a list": Case(MA, keys(MAN, files=[]), Fm, "manifest.json, files: wrong type"),
    "manifest: a path outside": Case(MA, keys(MAN, files={"../x": {}}), Fm, "sha256: altered"),
    "manifest: unknown role": Case(MA, entry(role="virus"), Fm, "manifest.json, m.gguf.role: unknown role"),
    "manifest: negative size": Case(MA, entry(bytes=-1), Fm, "manifest.json, m.gguf: not a size"),
    "manifest: size a float": Case(MA, entry(bytes=1.0), Fm, "manifest.json, m.gguf.bytes: wrong type"),
    "manifest: odd hash": Case(MA, entry(sha256="G" * 64), Fm, "manifest.json, m.gguf: not a size and"),
    "bundle: config of 2^31 tokens": Case(
        BU, keys(CFG, vocab_size=2**31 - 1), Fm, "vocab_size: the vocabulary is larger"
    ),
    "bundle: config of another model": Case(
        BU, keys(CFG, rope_theta=7.0), Mi, "rope.freq_base does not agree"
    ),
    "bundle: no architecture": Case(BU, put("m.gguf", gguf()), Fm, "general.architecture: missing metadata"),
    "predictors: config cut": Case(PR, put(CFG, b"{"), Fm, "config.json, content: is not JSON"),
    "predictors: a key twice": Case(PR, put(CFG, TWICE), Fm, "content: duplicate key"),
    "predictors: version 3": Case(PR, keys(CFG, version=3), Fm, "config.json, version: not of this format"),
    "predictors: version 2 without kind": Case(PR, keys(CFG, version=2), Fm, "config.json, kind: wrong or"),
    "predictors: kind in version 1": Case(PR, keys(CFG, kind="svd"), Fm, "kind: version 1 has no such field"),
    "svd: unknown kind": Case(SV, keys(CFG, kind="svdp"), Un, "unknown kind of predictor (got svdp"),
    "svd: kind a list": Case(SV, keys(CFG, kind=["svd"]), Fm, "config.json, kind: wrong or missing"),
    "svd: another kind": Case(SV, keys(CFG, version=1), Fm, "kind: version 1 has no such field"),
    "svd: bias missing": Case(
        SV,
        put(MODEL, tensors(handmade.svd_tensors, layers__1__fc2__bias=None)),
        Fm,
        "1.fc2.bias: missing",
    ),
    "svd: bias of 5": Case(
        SV,
        put(MODEL, tensors(handmade.svd_tensors, layers__0__fc2__bias=("F32", [5], bytes(20)))),
        Fm,
        "layers.0.fc2.bias: wrong shape or dtype",
    ),
    "predictors: layers -1": Case(PR, keys(CFG, n_layers=-1), Fm, "config.json, n_layers: must be positive"),
    "predictors: layers 2^40": Case(PR, keys(CFG, n_layers=1 << 40), Fm, "config.json, ranks: wrong length"),
    "predictors: threshold NaN": Case(PR, keys(CFG, thresholds=[float("nan"), 0.0]), Fm, "thresholds[0]"),
    "predictors: threshold text": Case(PR, keys(CFG, thresholds=["0", 0.0]), Fm, "thresholds[0]: wrong type"),
    "predictors: rank 2^40": Case(PR, keys(CFG, ranks=[1 << 40, 1]), Fm, "layers.0.fc1.weight: wrong shape"),
    "predictors: no weights": Case(PR, gone(MODEL), In, "no model.safetensors"),
    "predictors: float16": Case(
        PR,
        put(MODEL, tensors(handmade.predictor_tensors, layers__0__fc1__weight=("F16", [2, 4], bytes(16)))),
        Fm,
        "layers.0.fc1.weight: wrong shape or dtype",
    ),
    "predictors: fc2 missing": Case(
        PR,
        put(MODEL, tensors(handmade.predictor_tensors, layers__1__fc2__weight=None)),
        Fm,
        "layers.1.fc2.weight: missing tensor",
    ),
    "traces: run cut": Case(TR, put(RUN, b'{"format"'), Fm, "run.json, content: is not JSON"),
    "traces: run missing": Case(TR, gone(RUN), In, "no traces here"),
    "traces: tokens 10^12": Case(TR, keys(RUN, n_tokens=10**12), Fm, "ids: wrong shape or dtype"),
    "traces: shards of 0": Case(
        TR, keys(RUN, shard_tokens=0), Fm, "run.json, shard_tokens: must be positive"
    ),
    "traces: layers 2^40": Case(TR, keys(RUN, n_layers=1 << 40), Fm, "manifest.jsonl, line 3: out of order"),
    "traces: d_model 2^40": Case(
        TR, keys(RUN, d_model=1 << 40), Fm, "layer-000/shard-000000.safetensors, x: wrong"
    ),
    "traces: unknown key": Case(TR, keys(RUN, color=1), Fm, "run.json, color: wrong or missing"),
    "traces: tokens cut": Case(TR, put(TOK, lambda data: data[:-1]), Fm, TOK),
    "traces: other tokens": Case(
        TR, put(TOK, lambda data: data[:-1] + b"\0"), Mi, "tokens.safetensors: belongs"
    ),
    "traces: of two parts": Case(TR, keys(RUN, version=1), Fm, "run.json, version: traces from an older"),
    "traces: of four parts": Case(TR, fourth_part, Fm, "tokens.safetensors, part: unknown part"),
    "traces: no line": Case(TR, put(LINES, b""), In, "4 shards are missing"),
    "traces: line not JSON": Case(TR, put(LINES, b"x\n"), Fm, "manifest.jsonl, line 1: is not JSON"),
    "traces: line too deep": Case(TR, put(LINES, DEEP + b"\n"), Fm, "manifest.jsonl, line 1: is not JSON"),
    "traces: line of layer -1": Case(TR, line(layer=-1), Fm, "manifest.jsonl, line 1: out of order"),
    "traces: line of layer ../": Case(TR, line(layer="../x"), Fm, "manifest.jsonl, line 1, layer: wrong"),
    "traces: line twice": Case(TR, lines(lambda all_: [all_[0], *all_]), Fm, "line 2: out of order"),
    "traces: other size": Case(TR, line(bytes=1 << 60), Fm, "shard-000000.safetensors, bytes: truncated"),
    "traces: other hash": Case(TR, line(sha256="0" * 64), Fm, "shard-000000.safetensors, sha256: damaged"),
    "trace shard: missing": Case(TR, gone(SHARD), Fm, f"{SHARD}: listed in the manifest"),
    "trace shard: not safetensors": Case(SH, put(SHARD, b"x"), Fm, f"{SHARD}: is not a safetensors file"),
    "trace shard: of one token": Case(
        SH, put(SHARD, handmade.trace_shard(1)), Fm, f"{SHARD}, x: wrong shape"
    ),
    "trace shard: bfloat16": Case(
        SH,
        put(SHARD, lambda data: data.replace(b'"F16"', b'"BF16"').replace(b"}}  ", b"}} ")),
        Fm,
        "another dtype",
    ),
    "trace shard: no x": Case(SH, put(SHARD, header({})), Fm, f"{SHARD}, x: missing tensor"),
    "split: second missing": Case(SP, gone(SECOND), In, SECOND),
    "split: not the first": Case(
        SP, put(FIRST, handmade.split_part(1, 2, "a", 2)), In, "named like the first part"
    ),
    "split: of three": Case(SP, put(FIRST, handmade.split_part(0, 3, "t0", 2)), In, "not a valid name"),
    "split: part twice": Case(
        SP, put(SECOND, handmade.split_part(0, 2, "a", 2)), Fm, "split.no: this part belongs"
    ),
    "split: part of three": Case(
        SP, put(SECOND, handmade.split_part(1, 3, "a", 2)), Fm, "split.count: this part belongs"
    ),
    "split: tensor twice": Case(
        SP, put(SECOND, handmade.split_part(1, 2, "t0", 2)), Fm, "t0: this tensor is"
    ),
    "split: another total": Case(
        SP, put(FIRST, handmade.split_part(0, 2, "t0", 9)), Fm, "split.tensors.count"
    ),
    "split: second without keys": Case(SP, put(SECOND, gguf()), Fm, "split.no: missing metadata key"),
    "split: count a text": Case(
        SP, put(FIRST, gguf(kvs=[handmade.string("split.count", "2")])), Fm, "split.count"
    ),
    "gpuidx: no tensors": Case(
        GI,
        put("m.gguf", gguf(kvs=[handmade.string("general.architecture", "generic.gpu_index")])),
        Fm,
        "tensors: wrong order of tensors",
    ),
    "gpuidx: bucket and mask differ": Case(
        GI, gpu_index((0, 1, 0, 1), (0, 1)), Fm, "blk.0.gpu_bucket: not the"
    ),
    "gpuidx: mask of 2": Case(GI, gpu_index((0, 2, 0, 0), (1,)), Fm, "blk.0.gpu_bucket: not the ascending"),
    "gpuidx: of floats": Case(GI, gpu_index((0, 1), (1,), 0), Fm, "blk.0.gpu_idx: not an I32 vector"),
    "vocabulary: none": Case(VO, vocabulary(), Fm, "tokenizer.ggml.model: no vocabulary"),
    "vocabulary: unknown pre": Case(
        VO, vocabulary(GPT2, handmade.string("tokenizer.ggml.pre", "x")), Un, "(got x"
    ),
    "vocabulary: pre an array": Case(
        VO, vocabulary(GPT2, array("tokenizer.ggml.pre", I32, 0, b"")), Fm, "ggml.pre: wrong type"
    ),
    "vocabulary: tokens numbers": Case(
        VO,
        vocabulary(GPT2, PRE, array("tokenizer.ggml.tokens", F32, 1, bytes(4))),
        Fm,
        "ggml.tokens: wrong type",
    ),
    "vocabulary: merge of one": Case(
        VO,
        vocabulary(GPT2, PRE, AB, array("tokenizer.ggml.merges", STRING, 1, text("a"))),
        Fm,
        "merges: a merge",
    ),
    "vocabulary: merge unknown": Case(
        VO,
        vocabulary(GPT2, PRE, AB, array("tokenizer.ggml.merges", STRING, 1, text("x y"))),
        Fm,
        "ggml.merges",
    ),
    "vocabulary: types missing": Case(
        VO,
        vocabulary(GPT2, PRE, AB, array("tokenizer.ggml.token_type", I32, 1, bytes(4))),
        Fm,
        "token_type: wrong number",
    ),
    "vocabulary: no such bos": Case(
        VO,
        vocabulary(
            GPT2, PRE, AB, u32("tokenizer.ggml.bos_token_id", 2), kv("tokenizer.ggml.add_bos_token", 7, b"\1")
        ),
        Fm,
        "tokenizer.ggml.bos_token_id: no such token",
    ),
    "tokenizer: empty": Case(TK, put("tokenizer.json", b""), Fm, "tokenizer.json: not a tokenizer"),
    "tokenizer: model a text": Case(
        TK, put("tokenizer.json", b'{"model": "x"}'), Fm, "tokenizer.json: not a"
    ),
    "tokenizer: too deep": Case(TK, put("tokenizer.json", DEEP), Fm, "tokenizer.json: not a tokenizer"),
    "tokenizer: settings cut": Case(TK, put("tokenizer_config.json", b"{"), Fm, "content: is not JSON"),
    "tokenizer: an id of 2^32-1": Case(
        TK,
        put("tokenizer.json", lambda data: data.replace(b'"a": 1', b'"a": 4294967295')),
        Fm,
        "tokenizer.json, vocab: more tokens than embeddings",
    ),
    "tokenizer: an unknown token that is unknown": Case(
        TK,
        keys("tokenizer.json", model={"type": "BPE", "vocab": {"<s>": 0}, "merges": [], "unk_token": "x"}),
        Fm,
        "cannot encode: Unk token",
    ),
    "tokenizer: not BPE": Case(
        TK,
        keys("tokenizer.json", model={"type": "WordLevel", "vocab": {"<s>": 0}, "unk_token": "<s>"}),
        Un,
        "unknown tokenizer model",
    ),
}
