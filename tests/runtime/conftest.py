"""Tiny seeded models as bundles, written here with the `gguf` package alone.

The writer is on purpose not that of `hotcold.convert`: two independent hands must agree on the format.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from stored_rows import interleave
from tiny_families import FAMILIES, IDS, SPARSE, random_predictors, write_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from hotcold.convert.bundle.export import ExportOptions, export_bundle
from hotcold.convert.bundle.manifest import MANIFEST, BundleFile, Manifest
from hotcold.model import checkpoint
from hotcold.model.checkpoint import fingerprint
from hotcold.model.huggingface import HFCheckpoint
from hotcold.model.inputs import CONFIG_KEY, SITES, config_entry
from hotcold.sparsify.methods.teal import calibrate

TEXT = "The quick brown fox jumps over the lazy dog. Größe, naïve café, 東京 and 🦊🐶! 0123456789\n"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass
class Recipe:
    """What a tiny bundle is made of. Every field may be chosen by a test."""

    activation: str = "relu"
    activation_threshold: float = 0.0
    rank: int = 32
    predictor_threshold: float = 0.0
    hot: tuple[tuple[int, ...], ...] = ((1, 5, 9), ())
    quant: str = "F32"
    d_ff: int = 96
    n_layers: int = 2
    tied: bool = True
    seed: int = 0
    metadata: dict[str, object] = field(default_factory=dict)


def tiny_tokenizer() -> Tokenizer:
    """Byte-level BPE with SmolLM2's three special tokens; any byte can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT] * 4, trainer)
    return tokenizer


def tiny_model(recipe: Recipe, vocab_size: int) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention, its weights rounded to `recipe.quant`.

    They are rounded as the sparse file stores them (rows of the transposed down matrix), so that what
    transformers computes with this model is what an engine must compute from that file, to float32 rounding.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=recipe.d_ff,
        num_hidden_layers=recipe.n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_act="relu" if recipe.activation != "silu" else "silu",
        tie_word_embeddings=recipe.tied,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
    )
    torch.manual_seed(recipe.seed)
    model = LlamaForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data = 1 + 0.3 * torch.randn_like(weight)
        elif "down_proj" in name:
            weight.data = rounded(weight.data.T, recipe.quant).T.contiguous()
        else:
            weight.data = rounded(weight.data, recipe.quant)
    return model


def rounded(weight: torch.Tensor, quant: str) -> torch.Tensor:
    """The values that remain of a matrix once it has been stored as `quant`."""
    kind = gguf.GGMLQuantizationType[quant]
    stored = gguf.quants.quantize(weight.contiguous().numpy(), kind)
    return torch.from_numpy(np.array(gguf.quants.dequantize(stored, kind), np.float32))


class _File:
    def __init__(
        self, path: Path, arch: str, model: LlamaForCausalLM, tokenizer: Tokenizer, recipe: Recipe
    ) -> None:
        self.path, self.quant = path, gguf.GGMLQuantizationType[recipe.quant]
        self.writer = gguf.GGUFWriter(path, arch)
        config = model.config
        self.writer.add_block_count(config.num_hidden_layers)
        self.writer.add_context_length(config.max_position_embeddings)
        self.writer.add_embedding_length(config.hidden_size)
        self.writer.add_feed_forward_length(config.intermediate_size)
        self.writer.add_head_count(config.num_attention_heads)
        self.writer.add_head_count_kv(config.num_key_value_heads)
        self.writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        self.writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        self.writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
        tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        self.writer.add_tokenizer_model("gpt2")
        self.writer.add_tokenizer_pre("smollm")
        self.writer.add_token_list(tokens)
        self.writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
        merges = json.loads(tokenizer.to_str())["model"]["merges"]
        self.writer.add_token_merges([" ".join(pair) for pair in merges])
        self.writer.add_bos_token_id(1)
        self.writer.add_eos_token_id(2)
        self.writer.add_add_bos_token(False)
        self.writer.add_chat_template(CHAT_TEMPLATE)
        add = {str: self.writer.add_string, int: self.writer.add_uint32, list: self.writer.add_array}
        for key, value in recipe.metadata.items():
            add[type(value)](key, value)

    def tensor(self, name: str, value: torch.Tensor | np.ndarray) -> None:
        value = np.asarray(value.detach() if isinstance(value, torch.Tensor) else value, np.float32)
        if value.ndim == 1:
            self.writer.add_tensor(f"{name}.weight", value)
        else:
            packed = gguf.quants.quantize(np.ascontiguousarray(value), self.quant)
            self.writer.add_tensor(f"{name}.weight", packed, raw_dtype=self.quant)

    def attention(self, block: str, layer: torch.nn.Module, interleaved: bool) -> None:
        attention, config = layer.self_attn, layer.self_attn.config
        q, k = attention.q_proj.weight.detach().numpy(), attention.k_proj.weight.detach().numpy()
        if interleaved:
            q, k = interleave(q, config.num_attention_heads), interleave(k, config.num_key_value_heads)
        self.tensor(f"{block}.attn_norm", layer.input_layernorm.weight)
        self.tensor(f"{block}.attn_q", q)
        self.tensor(f"{block}.attn_k", k)
        self.tensor(f"{block}.attn_v", attention.v_proj.weight)
        self.tensor(f"{block}.attn_output", attention.o_proj.weight)
        self.tensor(f"{block}.ffn_norm", layer.post_attention_layernorm.weight)

    def close(self, magic: bytes = b"GGUF") -> None:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        with self.path.open("r+b") as file:
            file.write(magic)


def write_sparse(
    path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, recipe: Recipe
) -> list[tuple[np.ndarray, np.ndarray]]:
    """PowerInfer's layout with random predictors, which are returned as (fc1, fc2) per layer."""
    file = _File(path, "llama", model, tokenizer, recipe)
    n_layers, rng = model.config.num_hidden_layers, np.random.default_rng(recipe.seed)
    file.writer.add_string("hotcold.activation", recipe.activation)
    file.writer.add_array("hotcold.activation_thresholds", [float(recipe.activation_threshold)] * n_layers)
    file.writer.add_array("hotcold.predictor.thresholds", [float(recipe.predictor_threshold)] * n_layers)
    file.writer.add_array("hotcold.predictor.ranks", [recipe.rank] * n_layers)
    hot_sets = [*recipe.hot, *[()] * (n_layers - len(recipe.hot))]
    file.writer.add_array("hotcold.hot.counts", [len(hot) for hot in hot_sets])
    file.writer.add_array("hotcold.hot.neurons", [i for hot in hot_sets for i in hot] or [0])
    file.tensor("token_embd", model.model.embed_tokens.weight)
    file.tensor("output", model.lm_head.weight)
    file.tensor("output_norm", model.model.norm.weight)
    predictors = []
    for i, layer in enumerate(model.model.layers):
        file.attention(f"blk.{i}", layer, interleaved=True)
        file.tensor(f"blk.{i}.ffn_gate", layer.mlp.gate_proj.weight)
        file.tensor(f"blk.{i}.ffn_up", layer.mlp.up_proj.weight)
        file.tensor(f"blk.{i}.ffn_down_t", layer.mlp.down_proj.weight.T)
        fc1 = rng.standard_normal((recipe.rank, model.config.hidden_size)).astype(np.float32)
        fc2 = rng.standard_normal((recipe.d_ff, recipe.rank)).astype(np.float32)
        file.tensor(f"blk.{i}.fc1", fc1)
        file.tensor(f"blk.{i}.fc2", fc2)
        predictors.append((fc1, fc2))
    file.close(b"PWRI")
    return predictors


def write_dense(path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, recipe: Recipe) -> None:
    """`llama` for SiLU; one-expert `smallthinker` for a gated ReLU, with q and k as transformers has them."""
    moe = recipe.activation != "silu"
    file = _File(path, "smallthinker" if moe else "llama", model, tokenizer, recipe)
    file.tensor("token_embd", model.model.embed_tokens.weight)
    if not recipe.tied:
        file.tensor("output", model.lm_head.weight)
    file.tensor("output_norm", model.model.norm.weight)
    if moe:
        file.writer.add_expert_count(1)
        file.writer.add_expert_used_count(1)
        file.writer.add_expert_feed_forward_length(recipe.d_ff)
        file.writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    suffix = "_exps" if moe else ""
    for i, layer in enumerate(model.model.layers):
        file.attention(f"blk.{i}", layer, interleaved=not moe)
        for part in ("gate", "up", "down"):
            weight = getattr(layer.mlp, f"{part}_proj").weight
            file.tensor(f"blk.{i}.ffn_{part}{suffix}", weight[None] if moe else weight)
        if moe:
            file.tensor(f"blk.{i}.ffn_gate_inp", np.zeros((1, model.config.hidden_size)))
    file.close()


def write_attention(path: Path, model: LlamaForCausalLM, quant: str) -> None:
    """The projections transposed, rows in transformers' order."""
    writer, kind = gguf.GGUFWriter(path, "hotcold-attention"), gguf.GGMLQuantizationType[quant]
    for i, layer in enumerate(model.model.layers):
        for slot, name in zip("qkvo", ("attn_q", "attn_k", "attn_v", "attn_output"), strict=True):
            weight = getattr(layer.self_attn, f"{slot}_proj").weight.detach().numpy()
            rows = gguf.quants.quantize(np.ascontiguousarray(weight.T), kind)
            writer.add_tensor(f"blk.{i}.{name}_t.weight", rows, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass
class TinyBundle:
    """A bundle on disk and what it was made from."""

    path: Path
    recipe: Recipe
    model: LlamaForCausalLM
    tokenizer: Tokenizer
    predictors: list[tuple[np.ndarray, np.ndarray]]


def write_manifest(path: Path, recipe: Recipe, roles: dict[str, str]) -> None:
    """The bundle's manifest.json, which says what each file is for."""
    quant = recipe.quant.lower()
    manifest = Manifest(
        name="tiny",
        quant=quant,
        head_quant=quant,
        predictor_quant=quant,
        hot_frequency=0.5,
        activation=recipe.activation,
        model_fingerprint="0" * 64,
        llama_cpp_exact=recipe.activation in ("relu", "silu"),
        files={name: BundleFile.of(path / name, role) for name, role in roles.items()},
    )
    (path / MANIFEST).write_text(json.dumps(manifest.to_json()))


def write_bundle(path: Path, recipe: Recipe) -> TinyBundle:
    """A bundle folder as docs/architecture.md describes it."""
    path.mkdir()
    tokenizer = tiny_tokenizer()
    model = tiny_model(recipe, tokenizer.get_vocab_size())
    roles = {"tiny.gguf": "dense", "tiny.attention.gguf": "attention", "tokenizer.json": "tokenizer"}
    write_attention(path / "tiny.attention.gguf", model, recipe.quant)
    write_dense(path / "tiny.gguf", model, tokenizer, recipe)
    predictors = []
    if recipe.activation != "silu":
        roles["tiny.powerinfer.gguf"] = "sparse"
        predictors = write_sparse(path / "tiny.powerinfer.gguf", model, tokenizer, recipe)
    tokenizer.save(str(path / "tokenizer.json"))
    write_manifest(path, recipe, roles)
    return TinyBundle(path, recipe, model, tokenizer, predictors)


@pytest.fixture(scope="session")
def make_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyBundle]:
    """Build a tiny bundle; keyword arguments are fields of `Recipe`. Equal recipes are built once."""
    built: dict[str, TinyBundle] = {}

    def make(**fields: object) -> TinyBundle:
        recipe = Recipe(**fields)
        key = repr(recipe)
        if key not in built:
            built[key] = write_bundle(tmp_path_factory.mktemp("bundle") / "tiny", recipe)
        return built[key]

    return make


@pytest.fixture(scope="session")
def bundle(make_bundle: Callable[..., TinyBundle]) -> TinyBundle:
    """The default tiny ReLU bundle in float32."""
    return make_bundle()


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


def write_ruled(root: Path, name: str, sites: tuple[str, ...], score: str, quant: str) -> tuple[Path, Path]:
    """An HF directory whose calibrated rules leave out 40 % of the inputs, and its bundle."""
    model = root / "model"
    write_model(model, FAMILIES[name])
    loaded = checkpoint.load_model(str(model))
    rules = calibrate(loaded, torch.from_numpy(IDS)[None], sites, score, 0.4)
    config = json.loads((model / "config.json").read_text()) | {CONFIG_KEY: config_entry(rules)}
    (model / "config.json").write_text(json.dumps(config))
    predictors = random_predictors(model, root / "predictors") if name in SPARSE else None
    export_bundle(
        HFCheckpoint(model), root / "bundle", name="m", fingerprint=fingerprint(str(model)),
        predictors=predictors, options=ExportOptions(quant, predictor_quant="f32"),
    )  # fmt: skip
    return model, root / "bundle"


@pytest.fixture(scope="session")
def make_ruled(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """make_ruled(name, sites, score, quant) → a model with input rules: HF directory and bundle."""
    made: dict[tuple[object, ...], tuple[Path, Path]] = {}

    def make(
        name: str = "llama",
        sites: tuple[str, ...] = tuple(SITES),
        score: str = "magnitude",
        quant: str = "f32",
    ) -> tuple[Path, Path]:
        key = name, sites, score, quant
        if key not in made:
            made[key] = write_ruled(tmp_path_factory.mktemp("ruled"), *key)
        return made[key]

    return make
