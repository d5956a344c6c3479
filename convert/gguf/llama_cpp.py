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
from hotcold.model.families import ARCHITECTURES
from hotcold.model.metadata import hyper_parameters
from hotcold.model.spec import ModelSpec
from hotcold.model.tensors import ALL, place, rows_of
from hotcold.model.weights import FileWeights

__all__ = ["architecture_of", "dense_metadata", "dense_plans", "differences", "is_exact", "write_llama_twin"]

_SOFTMAX = 1  # llama.cpp: LLAMA_EXPERT_GATING_FUNC_TYPE_SOFTMAX
_EXPERT_BIASES = {"q", "k", "v"}  # llama-cpp-python 0.3.36 loads these


def architecture_of(spec: ModelSpec) -> str:
    """The llama.cpp architecture that computes this model, or comes nearest (see `differences`)."""
    gated_relu = spec.firing.rule.rectifies and spec.structure.gated
    known = spec.biases <= _EXPERT_BIASES and not spec.structure.head_norm
    return "smallthinker" if gated_relu and known else spec.family.dense


def differences(spec: ModelSpec) -> list[str]:
    """In what llama.cpp's function differs from the model's; nothing if it is the same."""
    architecture, found = ARCHITECTURES[architecture_of(spec)], []
    threshold = spec.firing.highest
    activation = "relu" if spec.activation == "fatrelu" and not threshold else spec.activation
    if activation != architecture.activation:
        own = f"{activation} with thresholds up to {threshold:g}" if threshold else activation
        found.append(f"{architecture.activation} instead of {own}")
    if spec.firing.per_neuron:
        found.append("thresholds per neuron, with which it refuses the file")
    if any(spec.windows):
        found.append(f"no sliding window of {max(spec.windows)} tokens")
    if spec.rope and spec.rope.kind == "llama3" and not architecture.rope_factors:
        found.append("YaRN's ramp instead of Llama 3's rope scaling")
    if spec.inputs:
        found.append(f"no inputs left out at {', '.join(rule.site for rule in spec.inputs)}")
    return found


def is_exact(spec: ModelSpec) -> bool:
    """Whether llama.cpp computes the model's own function from the dense file."""
    return not differences(spec)


def dense_metadata(spec: ModelSpec) -> dict[str, Any]:
    """`general.architecture` and the hyper-parameters of the dense form."""
    architecture = architecture_of(spec)
    metadata = {"general.architecture": architecture, **hyper_parameters(spec, architecture)}
    if ARCHITECTURES[architecture].experts:
        numbers = {"expert_count": 1, "expert_used_count": 1, "expert_gating_func": _SOFTMAX}
        numbers["expert_feed_forward_length"] = spec.d_ff
        metadata |= {f"{architecture}.{key}": np.uint32(value) for key, value in numbers.items()}
    if found := differences(spec):
        metadata["hotcold.llama_cpp_differences"] = "; ".join(found)
    return metadata


def dense_plans(planner: Planner) -> list[TensorPlan]:
    """All tensors of the dense form; a tied head is left out, as llama.cpp then takes the embedding."""
    architecture = ARCHITECTURES[architecture_of(planner.spec)]
    plans, naming = planner.embeddings(architecture, copy_tied=False), architecture.naming
    for layer in range(planner.spec.n_layers):
        plans += planner.attention(layer, naming)
        plans += planner.expert(layer, naming) if architecture.experts else planner.ffn(layer, naming)
    return plans


def write_llama_twin(source: str | Path, target: str | Path) -> None:
    """Write a one-expert `smallthinker` file's tensors, byte for byte, under the plain `llama` architecture.

    llama.cpp then applies SiLU, so the text is nonsense; the file is there to measure the speed of a graph
    without routing. UnsupportedError if `source` is not a one-expert file.
    """
    file = open_gguf(source)
    architecture = file.require("general.architecture", str)
    if architecture != "smallthinker" or file.require("smallthinker.expert_count", int) != 1:
        raise UnsupportedError("not a one-expert smallthinker file", where=source, got=architecture)
    weights = FileWeights.read(file)
    slots = weights.stored_names()
    plans = [
        _twin(tensor, *slots[name], weights.spec) for name, tensor in file.tensors.items() if name in slots
    ]
    write_gguf(target, _twin_metadata(file), plans)


def _twin(tensor: Tensor, slot: str, layer: int, part: str, spec: ModelSpec) -> TensorPlan:
    llama = ARCHITECTURES["llama"].naming
    (name, shape), rows = place(spec, llama, slot, layer, part), rows_of(spec, llama, slot)
    if rows is ALL:
        return copied(tensor, name, shape)
    # rows are quantized one by one, so that their order can change as they are
    data = tensor.data.reshape(shape[0], -1)
    return TensorPlan(name, shape, tensor.type, lambda: data[np.argsort(rows)])


def _twin_metadata(file: GGUFFile) -> dict[str, Any]:
    exact = {int: np.uint32, float: np.float32}
    metadata: dict[str, Any] = {}
    for key, value in file.metadata.items():
        if ".expert_" not in key and not key.startswith(("hotcold.", "split.")):
            renamed = key.replace("smallthinker.", "llama.", 1)
            metadata[renamed] = exact.get(type(value), lambda same: same)(value)
    return metadata | {"general.architecture": "llama"}
