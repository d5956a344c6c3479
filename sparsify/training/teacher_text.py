"""The dense model's own text in the working folder, in parts, so that a kill loses one part at most."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedModel

from hotcold import storage
from hotcold.errors import FormatError, ShapeError
from hotcold.progress import Progress
from hotcold.sparsify.config import Generated
from hotcold.sparsify.training.generate import Sampler

__all__ = ["read_rows", "teacher_text"]


def teacher_text(
    teacher: PreTrainedModel, tokenizer: Tokenizer, length: int, wanted: Generated, folder: Path, seed: int
) -> Tensor:
    """Windows int64 [n, length] of at least `wanted.tokens` tokens; parts that lie in `folder` are read.

    Each part has a seed of its own, so that the text does not depend on where a run was cut off.
    """
    sampler: Sampler | None = None
    parts, rows = [], -(-wanted.tokens // length)
    with Progress("teacher's text", rows * length, "tok") as progress:
        for number, begin in enumerate(range(0, rows, wanted.batch)):
            path, n = folder / f"part-{number:05d}.safetensors", min(wanted.batch, rows - begin)
            if not path.is_file():
                sampler = sampler or Sampler(teacher, tokenizer, length, wanted)
                ids = sampler.write(n, seed * 1_000_003 + number)
                storage.write_tensors(path, {"ids": ids.to(torch.int32).numpy()})
            parts.append(read_rows(path, length))
            progress.advance(n * length)
    return torch.cat(parts)


def read_rows(path: Path, length: int) -> Tensor:
    """The windows in a safetensors file, `ids` [n, length], as int64; FormatError, ShapeError if none."""
    try:
        ids = load_file(path)["ids"]
    except (OSError, KeyError, SafetensorError) as error:
        raise FormatError("contains no token ids", where=path, got=str(error)) from error
    if ids.dim() != 2 or ids.shape[1] != length or ids.is_floating_point() or not len(ids):
        raise ShapeError(
            "not windows of token ids", where=path, got=list(ids.shape), expected=f"[n, {length}]"
        )
    return ids.long()
