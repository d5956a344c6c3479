"""Whether the tensors that were found are those that a model expects: the one place that decides it.

A missing tensor is never made up, and one that is left over is never dropped: it means that the file holds
another model. Only buffers that every program works out by itself are passed over. No torch: expected and
found are names with shapes, whatever they come from.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from hotcold.errors import FormatError, ShapeError, UnsupportedError

__all__ = [
    "NOT_QUANTIZED",
    "check_tensors",
    "is_buffer",
    "misshapen_tensor",
    "missing_tensor",
    "plain_names",
    "unexpected_tensors",
]

Shape = tuple[int, ...]
Where = str | Path | None

NOT_QUANTIZED = "use the unquantized checkpoint, or a GGUF file"

# Rotary tables, and masks of attention that early versions of transformers saved.
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.(inv_freq|(cos|sin)_cached)|(self_)?attn\.masked_bias)")
_MASKS = re.compile(r"(.*\.)?(attn|attention)\.bias")  # [1, 1, n, n]; a bias of the same name has one axis

_ADAPTER = re.compile(r"\.(lora_\w+|base_layer|modules_to_save)\b")
_QUANTIZED = re.compile(
    r"\.(weight_scale(_inv|_2)?|(input|activation|output)_scale|qweight|qzeros|g_idx|scales|weight_packed|SCB)$"
    r"|\.weight\.(absmax|quant_map|nested_\w+|quant_state\b.*)$"
)

# Put before the names of tensors by torch.compile, FSDP and checkpointing, by PEFT and DDP, by modules around
# a model (Lightning's), and by models of pictures and text.
_WRAPPERS = (
    re.compile(r"(?:(?<=\.)|^)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."),
    re.compile(r"^(base_model\.model|module)\.(?=.)"),
    re.compile(r"^(model)\.(?=(?:model|transformer|lm_head)\.)"),
    re.compile(r"^((?:model\.)?language_model)\.(?=.)"),
)
# Checkpoints of the base model alone, as Meta's of OPT: their names lack its own, which transformers adds.
_BASES: dict[str, str] = dict.fromkeys(("layers", "embed_tokens", "norm", "decoder"), "model")
_BASES |= dict.fromkeys(("h", "word_embeddings", "ln_f"), "transformer")


def check_tensors(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: Where = None) -> None:
    """Refuse tensors that are not exactly those that a model expects, except for known buffers.

    FormatError for a missing one, UnsupportedError for an unexpected one, ShapeError for a misshapen one.
    """
    extra = sorted(name for name in found.keys() - expected.keys() if not is_buffer(name, found[name]))
    for name in expected:
        if name not in found:
            raise missing_tensor(name, where, extra)
    if extra:
        raise unexpected_tensors(extra, where)
    for name, shape in expected.items():
        if tuple(found[name]) != tuple(shape):
            raise misshapen_tensor(name, where, found[name], shape)


def missing_tensor(name: str, where: Where, unexpected: Collection[str] = ()) -> FormatError:
    """The error for a missing tensor; `unexpected` are the names that were found instead."""
    got = _some(unexpected) if unexpected else None
    return FormatError("missing tensor", where=where, field=name, got=got)


def unexpected_tensors(names: Collection[str], where: Where) -> UnsupportedError:
    """The error for tensors that the model does not use: dropping them would compute a different model."""
    return UnsupportedError("the model has tensors of an unknown kind", where=where, got=_some(names))


def misshapen_tensor(name: str, where: Where, got: object, expected: object) -> ShapeError:
    """The error for a tensor with the wrong shape."""
    return ShapeError(f"tensor {name} does not fit the model", where=where, got=got, expected=expected)


def _some(names: Collection[str]) -> str:
    first = min(names)
    return first if len(names) == 1 else f"{first} and {len(names) - 1} more"


def is_buffer(name: str, shape: Shape) -> bool:
    """Whether a tensor is not a weight but a table that follows from the config."""
    return bool(_BUFFERS.fullmatch(name) or (_MASKS.fullmatch(name) and len(shape) == 4))


def plain_names(names: Iterable[str], where: Where = None) -> tuple[dict[str, str], list[str]]:
    """Transformers' name of every tensor → the name that it has in a file, and the prefixes taken off.

    Raises UnsupportedError for adapters and for the parts of quantized weights, FormatError if two tensors
    get the same name.
    """
    plain: dict[str, str] = {}
    prefixes: dict[str, None] = {}
    for stored in names:
        _refuse_other_kinds(stored, where)
        name, taken = _unwrapped(stored)
        prefixes |= dict.fromkeys(taken)
        if name in plain:
            got = f"{plain[name]} and {stored}"
            raise FormatError("two tensors with the same name", where=where, field=name, got=got)
        plain[name] = stored
    return plain, list(prefixes)


def _unwrapped(name: str) -> tuple[str, list[str]]:
    taken: list[str] = []
    before = None
    while name != before:
        before = name
        for wrapper in _WRAPPERS:
            taken += [f"{prefix}." for prefix in wrapper.findall(name)]
            name = wrapper.sub("", name)
    base = _BASES.get(name.partition(".")[0])
    return (f"{base}.{name}" if base else name), taken


def _refuse_other_kinds(name: str, where: Where) -> None:
    if _ADAPTER.search(name):
        fix = "merge the adapter first (PEFT's merge_and_unload) and save the whole model"
        raise UnsupportedError("adapter weights are not supported", where=where, got=name, fix=fix)
    if _QUANTIZED.search(name):
        raise UnsupportedError(
            "quantized weights are not supported", where=where, got=name, fix=NOT_QUANTIZED
        )
