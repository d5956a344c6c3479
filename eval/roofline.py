"""The ceiling that a decoder can reach on this machine: bytes it must read per token over bytes per second.

Decoding one token reads every weight that the token needs once, and little else matters; so a speed is judged
by its share of the measured read bandwidth. Bytes are of the weights as stored in the file
(what any implementation must read) plus the KV cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hotcold.files.gguf import GGUFFile
from hotcold.files.gguf_split import open_gguf

__all__ = ["PARTS", "Roofline", "dense_bytes_per_token", "read_bandwidth"]

PARTS = ("attention", "predictor", "ffn", "head", "kv", "other")
_PROBE_BYTES = 1 << 28  # several times any last-level cache that we have seen
_KV_BYTES = 2  # both engines keep keys and values as F16


@dataclass(frozen=True, slots=True)
class Roofline:
    """`parts` are bytes per token, `bandwidth` is in GB/s (10^9 bytes)."""

    parts: Mapping[str, float]
    bandwidth: float

    @property
    def bytes_per_token(self) -> float:
        return float(sum(self.parts.values()))

    @property
    def ceiling(self) -> float:
        """Tokens/s at the full bandwidth."""
        return self.bandwidth * 1e9 / self.bytes_per_token

    def gb_s(self, tok_s: float) -> float:
        """Bytes really read per second, in GB/s."""
        return tok_s * self.bytes_per_token / 1e9

    def share(self, tok_s: float) -> float:
        """Share of the ceiling that `tok_s` reaches; above 1 if weights stay in the caches."""
        return tok_s / self.ceiling


def read_bandwidth(n_threads: int, n_bytes: int | None = None, *, prefetching: bool = False) -> float:
    """Read bandwidth of the memory in GB/s with `n_threads`, by a loop over `n_bytes`
    (256 MiB).

    With plain loads, as other tools measure it, or with `prefetching`, as in the engine, which is faster on
    some machines. The limit of a machine is the larger of both.
    """
    from hotcold.runtime.cpu import _cpu

    return float(_cpu.read_bandwidth(n_threads, n_bytes or _PROBE_BYTES, prefetching=prefetching))


def dense_bytes_per_token(path: str | Path, position: int) -> dict[str, float]:
    """What a dense engine reads of a GGUF file to decode the token at `position`, by part.

    The embedding table is not read (one row of it is), unless it is the output head too.
    """
    file = open_gguf(path)
    parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
    tied = "output.weight" not in file.tensors
    for name, tensor in file.tensors.items():
        if (part := _part(name, tied)) is not None:
            parts[part] += tensor.data.nbytes
    parts["kv"] = float(_kv_bytes(file) * position)
    return parts


def _part(name: str, tied: bool) -> str | None:
    if name == "token_embd.weight":
        return "head" if tied else None
    if name == "output.weight":
        return "head"
    if "norm" in name:
        return "other"
    if ".attn_" in name:
        return "attention"
    return "ffn" if ".ffn_" in name else "other"


def _kv_bytes(file: GGUFFile) -> int:
    """Bytes that one cached position adds."""
    arch = file.require("general.architecture", str)
    n_heads = file.count(f"{arch}.attention.head_count")
    n_kv_heads = file.count(f"{arch}.attention.head_count_kv", n_heads)
    head_dim = file.count(
        f"{arch}.attention.key_length", max(file.count(f"{arch}.embedding_length") // n_heads, 1)
    )
    return 2 * file.count(f"{arch}.block_count") * n_kv_heads * head_dim * _KV_BYTES
