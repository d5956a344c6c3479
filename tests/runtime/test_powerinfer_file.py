"""Files as PowerInfer's own converter writes them, assembled here with struct alone, run in the engine.

Their function is written out a second time below, in float64, from the description of the format: the
predictor sees the residual stream before the FFN norm, keeps neurons whose logit reaches the threshold, and
the activation is ReLU.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from hotcold.cli import main
from hotcold.errors import FormatError, ShapeError, UnsupportedError
from hotcold.predictor.bundle import PredictorBundle
from hotcold.runtime.cpu.engine import CpuEngine as Engine
from hotcold.runtime.gpu.engine import GpuEngine
from hotcold.runtime.reference import ReferenceEngine

N_LAYERS, D, D_FF, HEADS, KV, HEAD, VOCAB, BASE, EPS = 2, 64, 192, 4, 2, 16, 300, 10000.0, 1e-5
U32, I32, F32, STRING, ARRAY = 4, 5, 6, 8, 9
TYPE_IDS = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 6,
    "Q8_0": 8,
    "Q6_K": 14,
}  # ggml.h of November 2023
PIECES = [
    "<unk>",
    "<s>",
    "</s>",
    *(f"<0x{byte:02X}>" for byte in range(256)),
    "▁",
    "a",
    "b",
    "ab",
    "▁a",
    "▁ab",
]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def key(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def encoded(array: np.ndarray, kind: str) -> bytes:
    if kind in ("F32", "F16"):
        return array.astype({"F32": "<f4", "F16": "<f2"}[kind]).tobytes()
    if kind == "Q6_K":
        return q6_k(array)
    return quants.quantize(array.astype(np.float32), GGMLQuantizationType[kind]).tobytes()


def q6_k(array: np.ndarray) -> bytes:
    """Blocks of 256: 192 bytes of quants, 16 scales, a factor. Plain: every scale 1, quants -32 to 31."""
    blocks = array.reshape(-1, 256)
    factor = (np.abs(blocks).max(axis=1, keepdims=True) / 31).astype("<f2")
    q = np.rint(blocks / factor.astype(np.float64)).clip(-32, 31).astype(np.int64) + 32
    halves = q.reshape(-1, 2, 4, 32)  # of 128: four rows of 32, whose high bits share a byte
    low = np.concatenate([halves[:, :, :2] & 15 | (halves[:, :, 2:] & 15) << 4], axis=2).reshape(-1, 128)
    high = sum((halves[:, :, n] >> 4) << 2 * n for n in range(4)).reshape(-1, 64)
    ones = np.ones((len(blocks), 16), np.uint8)
    return np.concatenate(
        [low.astype(np.uint8), high.astype(np.uint8), ones, factor.view(np.uint8)], 1
    ).tobytes()


def decoded(data: bytes, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    if kind in ("F32", "F16"):
        return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[kind]).reshape(shape).astype(np.float64)
    rows = np.frombuffer(data, np.uint8).reshape(shape[0], -1)
    return quants.dequantize(rows, GGMLQuantizationType[kind]).astype(np.float64)


def keys(architecture: str, threshold: float | None) -> list[bytes]:
    numbers = {
        "context_length": 64, "embedding_length": D, "feed_forward_length": D_FF, "block_count": N_LAYERS,
        "attention.head_count": HEADS, "attention.head_count_kv": KV, "rope.dimension_count": HEAD,
    }  # fmt: skip
    tokens = PIECES + [f"piece{n}" for n in range(VOCAB - len(PIECES))]
    types = [2, 3, 3, *[6] * 256, *[1] * (VOCAB - 259)]
    kvs = [
        key("general.architecture", STRING, text(architecture)),
        key("general.name", STRING, text("LLaMA v2")),
        *(key(f"{architecture}.{name}", U32, struct.pack("<I", value)) for name, value in numbers.items()),
        key(f"{architecture}.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", EPS)),
        key("general.file_type", U32, struct.pack("<I", 1)),
        key("tokenizer.ggml.model", STRING, text("llama")),
        key("tokenizer.ggml.tokens", ARRAY, struct.pack("<IQ", STRING, VOCAB) + b"".join(map(text, tokens))),
        key("tokenizer.ggml.scores", ARRAY, struct.pack(f"<IQ{VOCAB}f", F32, VOCAB, *range(0, -VOCAB, -1))),
        key("tokenizer.ggml.token_type", ARRAY, struct.pack(f"<IQ{VOCAB}i", I32, VOCAB, *types)),
        key("tokenizer.ggml.bos_token_id", U32, struct.pack("<I", 1)),
        key("tokenizer.ggml.eos_token_id", U32, struct.pack("<I", 2)),
    ]
    if threshold is not None:
        kvs.append(key("powerinfer.sparse_threshold", F32, struct.pack("<f", threshold)))
    return kvs


def shapes(rank: int) -> dict[str, tuple[int, ...]]:
    outer = {"token_embd": (VOCAB, D), "output_norm": (D,), "output": (VOCAB, D)}
    layer = {
        "attn_norm": (D,), "attn_q": (D, D), "attn_k": (KV * HEAD, D), "attn_v": (KV * HEAD, D),
        "attn_output": (D, D), "ffn_norm": (D,), "ffn_gate": (D_FF, D), "ffn_up": (D_FF, D),
        "ffn_down_t": (D_FF, D), "fc1": (rank, D), "fc2": (D_FF, rank),
    }  # fmt: skip
    return outer | {f"blk.{n}.{name}": shape for n in range(N_LAYERS) for name, shape in layer.items()}


def assemble(
    path: Path,
    kvs: list[bytes],
    wanted: dict[str, tuple[int, ...]],
    body: str = "F16",
    predictor: str = "F16",
) -> dict[str, np.ndarray]:
    """Write a file of random tensors; returns what they hold, float64 by name without `.weight`."""
    rng, infos, data, arrays = np.random.default_rng(0), b"", b"", {}
    for name, shape in wanted.items():
        values = rng.standard_normal(shape) * (1 if len(shape) == 1 else 1.5 * shape[1] ** -0.5)
        if name.endswith("fc2"):  # clear cases only, or the rounding of activations decides
            values = 4 * np.abs(values) * rng.choice([-1, 1], (D_FF, 1))
        kind = "F32" if len(shape) == 1 else predictor if name.endswith(("fc1", "fc2")) else body
        kind = "F16" if kind == "Q6_K" and shape[-1] % 256 else kind
        content = encoded(values, kind)
        arrays[name] = decoded(content, kind, shape)
        ne = shape[::-1]
        infos += text(name if name.endswith(".bias") else f"{name}.weight")
        infos += struct.pack(f"<I{len(ne)}Q", len(ne), *ne) + struct.pack("<IQ", TYPE_IDS[kind], len(data))
        data += content + bytes(-len(content) % 32)
    head = b"PWRI" + struct.pack("<IQQ", 3, len(arrays), len(kvs)) + b"".join(kvs) + infos
    path.write_bytes(head + bytes(-len(head) % 32) + data)
    return arrays


def write(
    path: Path, *, body: str = "F16", predictor: str = "F16", rank: int = 24, architecture: str = "llama",
    threshold: float | None = 0.25, leave_out: str = "", extra: str = "",
) -> dict[str, np.ndarray]:  # fmt: skip
    """Write a gated model as convert.py does."""
    wanted = {name: shape for name, shape in shapes(rank).items() if name != leave_out}
    wanted |= {extra: (D,)} if extra else {}
    return assemble(path, keys(architecture, threshold), wanted, body, predictor)


def forward(w: dict[str, np.ndarray], ids: list[int], threshold: float, *, second_relu: bool) -> np.ndarray:
    """Logits [tokens, vocab]. At position 0 hotcold computes all neurons, which PowerInfer does not."""
    x, n = w["token_embd"][ids], len(ids)
    angle = np.arange(n)[:, None] * BASE ** (-np.arange(HEAD // 2) / (HEAD // 2))
    turn = np.exp(1j * angle)[:, None, :]  # of neighboring pairs: [token, head, pair]

    def norm(v: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return v / np.sqrt((v * v).mean(axis=1, keepdims=True) + EPS) * weight

    def rotated(v: np.ndarray) -> np.ndarray:
        pairs = v.reshape(n, -1, HEAD // 2, 2)
        out = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        return np.stack([out.real, out.imag], axis=-1).reshape(n, -1, HEAD)

    for layer in range(N_LAYERS):
        b = {name.split(".")[2]: array for name, array in w.items() if name.startswith(f"blk.{layer}.")}
        h = norm(x, b["attn_norm"])
        q, k = rotated(h @ b["attn_q"].T), rotated(h @ b["attn_k"].T)
        v = (h @ b["attn_v"].T).reshape(n, KV, HEAD)
        k, v = (np.repeat(a, HEADS // KV, axis=1) for a in (k, v))
        scores = np.einsum("thd,shd->hts", q, k) / HEAD**0.5
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        shares = np.exp(scores - scores.max(axis=2, keepdims=True))
        shares /= shares.sum(axis=2, keepdims=True)
        x = x + np.einsum("hts,shd->thd", shares, v).reshape(n, D) @ b["attn_output"].T
        kept = np.maximum(x @ b["fc1"].T, 0) @ b["fc2"].T >= threshold
        kept[0] = True
        h = norm(x, b["ffn_norm"])
        gate, up = np.maximum(h @ b["ffn_gate"].T, 0), h @ b["ffn_up"].T
        x = x + (gate * (np.maximum(up, 0) if second_relu else up) * kept) @ b["ffn_down_t"]
    return norm(x, w["output_norm"]) @ w["output"].T


IDS = [1, 7, 250, 33, 280, 5, 90, 12]


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(
    "body, predictor, rank, limit",
    [
        ("F16", "F16", 24, 0.01),
        ("F16", "F32", 32, 0.01),
        ("F16", "Q8_0", 32, 0.01),
        ("F16", "F16", 1, 0.01),
        ("F16", "Q4_0", 32, 0.01),
        ("F16", "Q5_0", 64, 0.01),
        ("F16", "Q6_K", 256, 0.01),
        ("Q4_0", "Q4_0", 32, 0.1),
        ("Q4_0", "F16", 37, 0.1),
    ],
)  # fmt: skip
def test_what_powerinfers_converter_writes_runs(tmp_path, body, predictor, rank, limit):
    arrays = write(tmp_path / "m.powerinfer.gguf", body=body, predictor=predictor, rank=rank)
    for threshold, mode in ((0.25, "predicted"), (-np.inf, "exact")):
        expected = forward(arrays, IDS, threshold, second_relu=False)
        engine = Engine(tmp_path / "m.powerinfer.gguf", mode, n_threads=1, n_ctx=16)
        assert distance(engine.prefill(IDS, all_logits=True), expected) < limit
    with_all = forward(arrays, IDS, -np.inf, second_relu=False)
    assert distance(forward(arrays, IDS, 0.25, second_relu=False), with_all) > 0.2  # the predictor matters


def test_the_oracle_agrees(tmp_path):
    arrays = write(tmp_path / "m.powerinfer.gguf")
    got = ReferenceEngine(tmp_path / "m.powerinfer.gguf", "predicted", 16).prefill(IDS, all_logits=True)
    assert distance(got, forward(arrays, IDS, 0.25, second_relu=False)) < 1e-5


def test_a_file_without_a_threshold_has_the_threshold_zero(tmp_path):
    arrays = write(tmp_path / "m.powerinfer.gguf", threshold=None)
    engine = Engine(tmp_path / "m.powerinfer.gguf", "predicted", n_threads=1, n_ctx=16)
    expected = forward(arrays, IDS, 0.0, second_relu=False)
    assert distance(engine.prefill(IDS, all_logits=True), expected) < 0.01


def test_bamboo_has_a_second_relu(tmp_path):
    arrays = write(tmp_path / "m.powerinfer.gguf", architecture="bamboo")
    engine = Engine(tmp_path / "m.powerinfer.gguf", "predicted", n_threads=1, n_ctx=16)
    expected = forward(arrays, IDS, 0.25, second_relu=True)
    assert distance(engine.prefill(IDS, all_logits=True), expected) < 0.01


def test_run_takes_the_file_and_its_vocabulary(tmp_path, capsys):
    """Greedy, against the float64 forward pass; the prompt's pieces are those of SentencePiece."""
    arrays = write(tmp_path / "m.powerinfer.gguf", body="F16", predictor="F32")
    ids = [1, 264]  # <s>, ▁ab: the best-scoring merges
    for _ in range(4):
        ids.append(int(forward(arrays, ids, 0.25, second_relu=False)[-1].argmax()))
    path = str(tmp_path / "m.powerinfer.gguf")
    assert main(["run", path, "-p", "ab", "-n", "4", "--temp", "0", "--mode", "predicted", "-t", "1"]) == 0
    from hotcold.runtime.generation.vocabulary import Vocabulary

    vocabulary = Vocabulary.load(path)
    assert vocabulary.encode("ab") == [1, 264] and vocabulary.stop_ids == {2}
    generated = vocabulary.tokenizer.decode(ids[1:])
    assert capsys.readouterr().out.strip() == generated.strip()


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"leave_out": "blk.1.ffn_gate"}, FormatError, "blk.1.ffn_gate.weight: missing tensor"),
        ({"leave_out": "blk.1.fc2"}, FormatError, "blk.1.fc2.weight: missing tensor"),
        ({"extra": "blk.0.ffn_up_bias_of_others"}, UnsupportedError, "tensors of an unknown kind"),
        ({"architecture": "refact"}, UnsupportedError, "unknown model architecture"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, changes, error, message):
    write(tmp_path / "m.powerinfer.gguf", **changes)
    with pytest.raises((error, ShapeError), match=message):
        Engine(tmp_path / "m.powerinfer.gguf", "predicted", n_threads=1, n_ctx=16)


def plain_keys(architecture: str, *more: bytes, **numbers: int) -> list[bytes]:
    """What convert-hf-to-powerinfer-gguf.py says: no rope, no vocabulary size, of OPT no epsilon either."""
    numbers |= {"embedding_length": D, "feed_forward_length": D_FF, "block_count": N_LAYERS}
    kvs = [key("general.architecture", STRING, text(architecture))]
    kvs += [
        key(f"{architecture}.{n.replace('__', '.')}", U32, struct.pack("<I", v)) for n, v in numbers.items()
    ]
    return [*kvs, *more, key("powerinfer.sparse_threshold", F32, struct.pack("<f", 0.25))]


def normed(x: np.ndarray, w: dict[str, np.ndarray], name: str) -> np.ndarray:
    centered = x - x.mean(axis=1, keepdims=True)
    deviation = np.sqrt((centered**2).mean(axis=1, keepdims=True) + EPS)
    return centered / deviation * w[name] + w[f"{name}.bias"]


def attended(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention of q [n, heads, d] over k and v [n, kv heads, d]; [n, heads * d]."""
    n = len(q)
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    scores = np.where(np.tri(n, dtype=bool), np.einsum("thd,shd->hts", q, k) / HEAD**0.5, -np.inf)
    shares = np.exp(scores - scores.max(axis=2, keepdims=True))
    shares /= shares.sum(axis=2, keepdims=True)
    return np.einsum("hts,shd->thd", shares, v).reshape(n, -1)


def kept(x: np.ndarray, b: dict[str, np.ndarray]) -> np.ndarray:
    chosen = np.maximum(x @ b["fc1"].T, 0) @ b["fc2"].T >= 0.25
    chosen[0] = True
    return chosen


def block(w: dict[str, np.ndarray], layer: int) -> dict[str, np.ndarray]:
    prefix = f"blk.{layer}."
    return {name.removeprefix(prefix): array for name, array in w.items() if name.startswith(prefix)}


def on_cpu_and_device(path: Path) -> tuple[Engine, GpuEngine]:
    return Engine(path, "predicted", 1, n_ctx=16), GpuEngine.load(path, "predicted", "cpu", n_ctx=16)


def test_opt_runs(tmp_path):
    """Learned positions from row 2 on, biases everywhere, the embedding as head, an unsaid epsilon."""
    linear = {
        "attn_q": (D, D),
        "attn_k": (D, D),
        "attn_v": (D, D),
        "attn_output": (D, D),
        "ffn_up": (D_FF, D),
    }
    layer = linear | {f"{name}.bias": shape[:1] for name, shape in linear.items()}
    layer |= {"ffn_down_t": (D_FF, D), "ffn_down_t.bias": (D,), "fc1": (24, D), "fc2": (D_FF, 24)}
    layer |= {f"{name}{end}": (D,) for name in ("attn_norm", "ffn_norm") for end in ("", ".bias")}
    wanted = {"token_embd": (VOCAB, D), "pos_embd": (66, D), "output_norm": (D,), "output_norm.bias": (D,)}
    wanted |= {f"blk.{n}.{name}": shape for n in range(N_LAYERS) for name, shape in layer.items()}
    kvs = plain_keys("opt", context_length=66, attention__head_count=HEADS)
    w = assemble(tmp_path / "m.powerinfer.gguf", kvs, wanted)
    x = w["token_embd"][IDS] + w["pos_embd"][2 : 2 + len(IDS)]
    for n in range(N_LAYERS):
        b = block(w, n)
        h = normed(x, b, "attn_norm")
        q, k, v = ((h @ b[f"attn_{s}"].T + b[f"attn_{s}.bias"]).reshape(-1, HEADS, HEAD) for s in "qkv")
        x = x + attended(q, k, v) @ b["attn_output"].T + b["attn_output.bias"]
        h = normed(x, b, "ffn_norm")
        active = np.maximum(h @ b["ffn_up"].T + b["ffn_up.bias"], 0) * kept(x, b)
        x = x + active @ b["ffn_down_t"] + b["ffn_down_t.bias"]
    expected = normed(x, w, "output_norm") @ w["token_embd"].T
    for engine in on_cpu_and_device(tmp_path / "m.powerinfer.gguf"):
        assert distance(engine.prefill(IDS, all_logits=True), expected) < 0.01
    out = tmp_path / "predictors"
    assert (
        main(["convert", str(tmp_path / "m.powerinfer.gguf"), "--to", "predictors", "--out", str(out)]) == 0
    )
    bundle = PredictorBundle.load(out)
    assert bundle.thresholds == [0.25] * N_LAYERS
    np.testing.assert_array_equal(bundle.layers[1].fc2, w["blk.1.fc2"])


@pytest.mark.parametrize("two_norms", [False, True])
def test_falcon_runs(tmp_path, two_norms):
    """Attention and FFN side by side; the predictor sees the layer's input; rotary pairs are halves apart."""
    layer = {"attn_qkv": (D + 2 * KV * HEAD, D), "attn_output": (D, D), "ffn_up": (D_FF, D)}
    layer |= {"ffn_down_t": (D_FF, D), "fc1": (24, D), "fc2": (D_FF, 24)}
    norms = ("attn_norm", "attn_norm_2") if two_norms else ("attn_norm",)
    layer |= {f"{name}{end}": (D,) for name in norms for end in ("", ".bias")}
    wanted = {"token_embd": (VOCAB, D), "output": (VOCAB, D), "output_norm": (D,), "output_norm.bias": (D,)}
    wanted |= {f"blk.{n}.{name}": shape for n in range(N_LAYERS) for name, shape in layer.items()}
    eps = key("falcon.attention.layer_norm_epsilon", F32, struct.pack("<f", EPS))
    numbers = {"context_length": 2048, "attention__head_count": HEADS, "attention__head_count_kv": KV}
    w = assemble(tmp_path / "m.powerinfer.gguf", plain_keys("falcon", eps, **numbers), wanted)
    angle = np.arange(len(IDS))[:, None] * BASE ** (-np.arange(HEAD // 2) / (HEAD // 2))

    def rotated(v: np.ndarray) -> np.ndarray:
        first, second = np.split(v.reshape(len(IDS), -1, HEAD), 2, axis=2)
        turned = (first + 1j * second) * np.exp(1j * angle)[:, None]
        return np.concatenate([turned.real, turned.imag], axis=2)

    x = w["token_embd"][IDS]
    for n in range(N_LAYERS):
        b = block(w, n)
        q, k, v = np.split(normed(x, b, norms[-1]) @ b["attn_qkv"].T, [D, D + KV * HEAD], axis=1)
        attention = attended(rotated(q), rotated(k), v.reshape(-1, KV, HEAD)) @ b["attn_output"].T
        active = np.maximum(normed(x, b, "attn_norm") @ b["ffn_up"].T, 0) * kept(x, b)
        x = x + attention + active @ b["ffn_down_t"]
    expected = normed(x, w, "output_norm") @ w["output"].T
    for engine in on_cpu_and_device(tmp_path / "m.powerinfer.gguf"):
        assert distance(engine.prefill(IDS, all_logits=True), expected) < 0.01
