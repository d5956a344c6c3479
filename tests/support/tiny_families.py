"""A tiny random model of every family, for the tests of all runtimes.

Their weights are large enough for every part to matter: a bias, norm, scale or window that is left out shows
in the logits (`test_the_measure_sees_what_is_left_out`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hotcold import storage
from hotcold.model.checkpoint import fingerprint
from hotcold.predictor.bundle import PredictorBundle

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

    from hotcold.model.ffn_modules import as_transformers

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
