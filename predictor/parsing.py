"""Read files that others wrote: every problem becomes a FormatError with file and field."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np

from hotcold.errors import FormatError
from hotcold.files.json import parse_json

__all__ = ["check_header", "check_tensor", "from_fields", "parse_json", "read_tensors"]

T = TypeVar("T")


def from_fields(cls: type[T], values: Mapping[str, Any], path: Path, prefix: str = "") -> T:
    """Make a dataclass of ints and strings; every field must be present, with its type, and no others."""
    kinds = get_type_hints(cls)
    for name in (*kinds, *values):
        kind, got = kinds.get(name), values.get(name)
        if type(got) is not kind:
            expected = kind.__name__ if kind else "no such field"
            raise FormatError(
                "wrong or missing", where=path, field=prefix + name, got=repr(got), expected=expected
            )
    return cls(**values)


def check_header(values: dict[str, Any], path: Path, format: str, *versions: int) -> int:
    """Take `format` and `version` out of `values`, and return the latter; FormatError for any others."""
    for name, known in (("format", (format,)), ("version", versions)):
        got = values.pop(name, None)
        if got not in known or type(got) is bool:
            expected = " or ".join(map(str, known))
            raise FormatError("not of this format", where=path, field=name, got=repr(got), expected=expected)
    return got


def read_tensors(data: bytes, path: Path) -> dict[str, np.ndarray]:
    """Parse a safetensors file. FormatError if it is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(data)
    except SafetensorError as error:
        raise FormatError("is not a safetensors file", where=path, got=str(error)) from error
    except KeyError as error:  # bfloat16 and other types that numpy has not
        raise FormatError("a tensor of another dtype", where=path, got=error.args[0]) from error


def check_tensor(
    tensors: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...], dtype: np.dtype, path: Path
) -> np.ndarray:
    """The tensor `name`. FormatError if it is missing or has another shape or dtype."""
    if name not in tensors:
        raise FormatError("missing tensor", where=path, field=name)
    tensor = tensors[name]
    if tensor.shape != shape or tensor.dtype != dtype:
        got, expected = f"{tensor.dtype} {list(tensor.shape)}", f"{dtype} {list(shape)}"
        raise FormatError("wrong shape or dtype", where=path, field=name, got=got, expected=expected)
    return tensor
