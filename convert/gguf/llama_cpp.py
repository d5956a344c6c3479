"""Dense GGUF files for stock llama.cpp.

Each of its architectures has one activation: `llama`, `qwen2` and `qwen3` SiLU, `falcon` and `gpt2` (which
is what an OPT model is, but for its ReLU) GELU. A gated ReLU it has in one architecture only,
`smallthinker`, a mixture of experts: with one expert, one expert used, a zero router, softmax gating (so
that the expert's weight is 1) and no sliding window it computes a dense ReLU Llama. Its rotary pairs are
Hugging Face's (NEOX).

Where llama.cpp has no such function the file is written for the nearest one, and `differences` names what
differs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hotcold.convert.bundle.tensor_plans import Planner
from hotcold.convert.gguf.write import TensorPlan, copied, write_gguf
from hotcold.errors import UnsupportedError
from hotcold.files.gguf import GGUFFile, Tensor
from hotcold.files.gguf_split import open_gguf
from hotcold.model.forms import FORMS, hyper_parameters
from hotcold.model.spec import ModelSpec, interleave_rope

__all__ = ["architecture_of", "dense_metadata", "dense_plans", "differences", "is_exact", "write_llama_twin"]

_SOFTMAX = 1  # llama.cpp: LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX
_EXPERT_BIASES = {"attn_q", "attn_k", "attn_v"}  # llama-cpp-python 0.3.36 loads these
_EXPERT_NAMES = {"ffn_gate_exps": "ffn_gate", "ffn_up_exps": "ffn_up", "ffn_down_exps": "ffn_down"}


def architecture_of(spec: ModelSpec) -> str:
    """The llama.cpp architecture that computes this model, or comes nearest (see `differences`)."""
    gated_relu = spec.is_sparse and spec.family.gated
    known = spec.biases <= _EXPERT_BIASES and not spec.family.head_norm
    return "smallthinker" if gated_relu and known else spec.family.dense


def differences(spec: ModelSpec) -> list[str]:
    """In what llama.cpp's function differs from the model's; nothing if it is the same."""
    form, found = FORMS[architecture_of(spec)], []
    threshold = max(spec.activation_thresholds)
    activation = "relu" if spec.activation == "fatrelu" and not threshold else spec.activation
    if activation != form.activation:
        own = f"{activation} with thresholds up to {threshold:g}" if threshold else activation
        found.append(f"{form.activation} instead of {own}")
    if any(spec.windows):
        found.append(f"no sliding window of {max(spec.windows)} tokens")
    if spec.rope and spec.rope.kind == "llama3" and not form.rope_factors:
        found.append("YaRN's ramp instead of Llama 3's rope scaling")
    return found


def is_exact(spec: ModelSpec) -> bool:
    """Whether llama.cpp computes the model's own function from the dense file."""
    return not differences(spec)


def dense_metadata(spec: ModelSpec) -> dict[str, Any]:
    """`general.architecture` and the hyper-parameters of the dense form."""
    architecture = architecture_of(spec)
    metadata = {"general.architecture": architecture, **hyper_parameters(spec, architecture)}
    if FORMS[architecture].experts:
        numbers = {"expert_count": 1, "expert_used_count": 1, "expert_gating_func": _SOFTMAX}
        numbers["expert_feed_forward_length"] = spec.d_ff
        metadata |= {f"{architecture}.{key}": np.uint32(value) for key, value in numbers.items()}
    if found := differences(spec):
        metadata["hotcold.llama_cpp_differences"] = "; ".join(found)
    return metadata


def dense_plans(planner: Planner) -> list[TensorPlan]:
    """All tensors of the dense form; a tied head is left out, as llama.cpp then takes the embedding."""
    form = FORMS[architecture_of(planner.spec)]
    plans = planner.embeddings(form, copy_tied=False)
    for layer in range(planner.spec.n_layers):
        plans += planner.attention(layer, form)
        plans += _expert(planner, layer) if form.experts else _ffn(planner, layer)
    return plans


def _ffn(planner: Planner, layer: int) -> list[TensorPlan]:
    modules = ("ffn_gate", "ffn_up", "ffn_down") if planner.spec.family.gated else ("ffn_up", "ffn_down")
    return [plan for module in modules for plan in planner.linear(layer, module)]


def _expert(planner: Planner, layer: int) -> list[TensorPlan]:
    d_model, d_ff = planner.spec.d_model, planner.spec.d_ff
    shapes = {"ffn_gate": (1, d_ff, d_model), "ffn_up": (1, d_ff, d_model), "ffn_down": (1, d_model, d_ff)}
    router = np.zeros((1, d_model), np.float32)
    plans = [planner.floats(f"blk.{layer}.ffn_gate_inp", router.shape, "F32", lambda: router)]
    for module, shape in shapes.items():
        plans += planner.linear(layer, module, _as_expert, (f"{module}_exps", shape))
    return plans


def _as_expert(weight: np.ndarray) -> np.ndarray:
    return weight[np.newaxis]


def write_llama_twin(source: str | Path, target: str | Path) -> None:
    """Write a one-expert `smallthinker` file's tensors, byte for byte, under the plain `llama` architecture.

    llama.cpp then applies SiLU, so the text is nonsense; the file is there to measure the speed of a graph
    without routing. UnsupportedError if `source` is not a one-expert file.
    """
    file = open_gguf(source)
    architecture = file.require("general.architecture", str)
    if architecture != "smallthinker" or file.require("smallthinker.expert_count", int) != 1:
        raise UnsupportedError("not a one-expert smallthinker file", where=source, got=architecture)
    heads = {
        "attn_q": file.require("smallthinker.attention.head_count", int),
        "attn_k": file.require("smallthinker.attention.head_count_kv", int),
    }
    plans = [_twin(tensor, heads) for name, tensor in file.tensors.items() if ".ffn_gate_inp." not in name]
    write_gguf(target, _twin_metadata(file), plans)


def _twin(tensor: Tensor, heads: dict[str, int]) -> TensorPlan:
    kind = tensor.name.split(".")[-2]
    if kind in _EXPERT_NAMES:
        return copied(tensor, tensor.name.replace(kind, _EXPERT_NAMES[kind]), tensor.shape[1:])
    if kind in heads:  # rows are quantized one by one, so that their order can change as they are
        rows = tensor.data.reshape(tensor.shape[0], -1)
        return TensorPlan(tensor.name, tensor.shape, tensor.type, lambda: interleave_rope(rows, heads[kind]))
    return copied(tensor)


def _twin_metadata(file: GGUFFile) -> dict[str, Any]:
    exact = {int: np.uint32, float: np.float32}
    metadata: dict[str, Any] = {}
    for key, value in file.metadata.items():
        if ".expert_" not in key and not key.startswith(("hotcold.", "split.")):
            renamed = key.replace("smallthinker.", "llama.", 1)
            metadata[renamed] = exact.get(type(value), lambda same: same)(value)
    return metadata | {"general.architecture": "llama"}
