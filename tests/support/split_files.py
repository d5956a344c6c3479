"""Split a GGUF file as llama.cpp's `gguf-split` does, so that tests have a model in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hotcold.convert.gguf.write import copied, write_gguf
from hotcold.files.gguf import GGUFFile


def split_gguf(path: Path, folder: Path, count: int = 3) -> Path:
    """Write `path` in `count` parts; returns the first of them."""
    file = GGUFFile(path)
    exact = {int: np.uint32, float: np.float32}
    metadata = {key: exact.get(type(value), lambda same: same)(value) for key, value in file.metadata.items()}
    tensors = list(file.tensors.values())
    names = [folder / f"{path.stem}-{number + 1:05d}-of-{count:05d}.gguf" for number in range(count)]
    for number, name in enumerate(names):
        own = {"split.no": np.uint16(number), "split.count": np.uint16(count)}
        own["split.tensors.count"] = np.int32(len(tensors))
        plans = [copied(tensor) for tensor in tensors[number::count]]
        write_gguf(name, (metadata if number == 0 else {}) | own, plans, magic=file.magic)
    return names[0]
