"""The trace format: for each token and FFN layer, what went in and which neurons fired.

A trace folder is layer-major, so that a predictor job reads only its own layer, and grows shard by shard:

    run.json                                what was run: model, text, shapes
    tokens.safetensors                      ids, document int32 [n_tokens]; part uint8 [n_tokens]
    layer-017/shard-000042.safetensors      x float16 [tokens, d_model]; active uint8 [tokens, ceil(d_ff / 8)]
    manifest.jsonl                          one line per committed shard, in the order of writing

`part` is 0 for train, 1 for calibrate, 2 for test (`hotcold.text`): predictors are trained on the first,
chosen on the second, and evaluated on the third. `x` is the residual stream before the FFN norm; bit j of
`active` (little-endian) tells whether `act(gate_j)·up_j` was not zero. A shard without a line in the manifest
does not exist, so a killed run leaves a valid prefix.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hotcold.errors import FormatError, InputError, MismatchError
from hotcold.predictor.parsing import check_header, check_tensor, from_fields, parse_json, read_tensors
from hotcold.text import PARTS

__all__ = [
    "TraceRun",
    "TraceShard",
    "Traces",
    "read_manifest",
    "sparsity",
    "tokens_digest",
    "windows",
]

_FORMAT, _VERSION = "hotcold-traces", 2
_TOKENS = {"ids": np.dtype(np.int32), "document": np.dtype(np.int32), "part": np.dtype(np.uint8)}


@dataclass(frozen=True, slots=True)
class TraceRun:
    """What a trace was made of (`run.json`). `model` and `text` are names for people."""

    model: str
    model_fingerprint: str
    n_layers: int
    d_model: int
    d_ff: int
    activation: str
    text: str
    text_sha256: str  # of `tokens.safetensors`, see `tokens_digest`
    n_tokens: int
    shard_tokens: int
    window: int  # tokens of context at most
    threads: int  # windows at a time; nothing else here depends on it

    @property
    def n_shards(self) -> int:
        """Shards per layer."""
        return -(-self.n_tokens // self.shard_tokens)

    def shard_slice(self, shard: int) -> slice:
        """The tokens of one shard."""
        return slice(shard * self.shard_tokens, min((shard + 1) * self.shard_tokens, self.n_tokens))

    def to_json(self) -> dict[str, Any]:
        """The content of `run.json`."""
        return {"format": _FORMAT, "version": _VERSION, **asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> TraceRun:
        """Read `run.json`. InputError if there is none, FormatError if a field is missing or wrong."""
        path = folder / "run.json"
        if not path.is_file():
            raise InputError(
                "no traces here (no run.json)", where=folder, fix="make them with collect-traces"
            )
        values = parse_json(path.read_bytes(), path)
        _refuse_two_parts(values, path)
        check_header(values, path, _FORMAT, _VERSION)
        run = from_fields(cls, values, path)
        for name in ("n_layers", "d_model", "d_ff", "n_tokens", "shard_tokens", "window", "threads"):
            if getattr(run, name) < 1:
                raise FormatError("must be positive", where=path, field=name, got=getattr(run, name))
        return run


def _refuse_two_parts(values: Mapping[str, Any], path: Path) -> None:
    """Version 1 tuned and measured on the same tokens, which cannot be divided again."""
    if values.get("format") == _FORMAT and values.get("version") == 1:
        raise FormatError(
            "traces from an older hotcold, without a calibration part", where=path, field="version",
            got=1, expected=_VERSION, fix="run collect-traces again with a new --out",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TraceShard:
    """One line of the manifest: a committed shard of one layer."""

    layer: int
    shard: int
    bytes: int
    sha256: str
    fired: int  # active bits in it
    clipped: int  # values of x that did not fit into float16

    @property
    def file(self) -> str:
        """Path inside the trace folder."""
        return f"layer-{self.layer:03d}/shard-{self.shard:06d}.safetensors"

    def line(self) -> str:
        """The manifest line, without newline."""
        return json.dumps(asdict(self))

    def read(self, folder: Path) -> dict[str, np.ndarray]:
        """Read the shard's tensors. FormatError if the file is missing, cut or altered."""
        path = folder / self.file
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise FormatError("listed in the manifest, but missing", where=path) from error
        if len(data) != self.bytes:
            raise FormatError(
                "truncated shard", where=path, field="bytes", got=len(data), expected=self.bytes
            )
        digest = hashlib.sha256(data).hexdigest()
        if digest != self.sha256:
            raise FormatError("damaged shard", where=path, field="sha256", got=digest, expected=self.sha256)
        return read_tensors(data, path)


class Traces:
    """A complete trace folder, for reading. Only `layer` touches the shards.

    `run` tells what was run; `ids`, `document` int32 and `part` uint8, an index into
    `hotcold.text.PARTS`, are arrays [n_tokens].
    """

    def __init__(self, folder: str | Path) -> None:
        """Open a folder. InputError for a missing or unfinished one, FormatError for a broken one."""
        self.folder = Path(folder)
        self.run = TraceRun.read(self.folder)
        tokens = _read_tokens(self.folder, self.run)
        self.ids, self.document, self.part = tokens["ids"], tokens["document"], tokens["part"]
        self.shards = read_manifest(self.folder, self.run)
        missing = self.run.n_layers * self.run.n_shards - len(self.shards)
        if missing:
            fix = "run the same collect-traces command again to finish them"
            raise InputError(
                f"these traces are incomplete: {missing} shards are missing", where=self.folder, fix=fix
            )

    def layer(self, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """`x` float16 [n_tokens, d_model] and packed `active` uint8 [n_tokens, ceil(d_ff / 8)] of one layer.

        FormatError names the shard and the field that is wrong.
        """
        run, whole = self.run, {}
        kinds = {"x": (run.d_model, np.dtype(np.float16)), "active": (-(-run.d_ff // 8), np.dtype(np.uint8))}
        for shard in self.shards:
            if shard.layer == layer:
                rows, tensors = run.shard_slice(shard.shard), shard.read(self.folder)
                for name, (width, dtype) in kinds.items():
                    shape, file = (rows.stop - rows.start, width), self.folder / shard.file
                    part = check_tensor(tensors, name, shape, dtype, file)
                    if name not in whole:  # not before: a width is only trustworthy once a shard has it
                        whole[name] = np.empty((run.n_tokens, width), dtype)
                    whole[name][rows] = part
        return whole["x"], whole["active"]

    def active(self, layer: int) -> Iterator[np.ndarray]:
        """Packed `active` uint8 [tokens, ceil(d_ff / 8)] of a layer, shard by shard. Raises like `layer`."""
        run = self.run
        for shard in self.shards:
            if shard.layer == layer:
                rows, tensors = run.shard_slice(shard.shard), shard.read(self.folder)
                shape = (rows.stop - rows.start, -(-run.d_ff // 8))
                file = self.folder / shard.file
                yield check_tensor(tensors, "active", shape, np.dtype(np.uint8), file)

    def starts(self) -> np.ndarray:
        """Which tokens had no context, being the first of a window, bool [n_tokens]."""
        starts = np.zeros(self.run.n_tokens, bool)
        for shard in range(self.run.n_shards):
            rows = self.run.shard_slice(shard)
            starts[[rows.start + cut.start for cut in windows(self.document[rows], self.run.window)]] = True
        return starts

    def sparsity(self) -> np.ndarray:
        """Share of neurons that did not fire, float64 [n_layers]."""
        return sparsity(self.run, self.shards)


def windows(document: np.ndarray, window: int) -> Iterator[slice]:
    """Cut a shard, `document` [tokens], into runs of at most `window` tokens of one document."""
    changes = np.flatnonzero(np.diff(document)) + 1
    for start, stop in zip([0, *changes], [*changes, len(document)], strict=True):
        for begin in range(start, stop, window):
            yield slice(begin, min(begin + window, stop))


def sparsity(run: TraceRun, shards: list[TraceShard]) -> np.ndarray:
    """Share of neurons that did not fire per layer, float64 [n_layers], by the manifest's counts."""
    fired = np.zeros(run.n_layers)
    for shard in shards:
        fired[shard.layer] += shard.fired
    return 1.0 - fired / (run.n_tokens * run.d_ff)


def tokens_digest(tokens: Mapping[str, np.ndarray]) -> str:
    """Hex sha256 over the arrays of `tokens.safetensors`, which ties a trace to its text and tokenizer."""
    digest = hashlib.sha256()
    for name in _TOKENS:
        digest.update(np.ascontiguousarray(tokens[name]).tobytes())
    return digest.hexdigest()


def read_manifest(folder: Path, run: TraceRun) -> list[TraceShard]:
    """The committed shards: a prefix of all (shard, layer) pairs, shard-major.

    An unfinished last line is ignored. FormatError for any other broken line, or one out of order.
    """
    path = folder / "manifest.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    shards = [_parse_line(line, path, f"line {number}") for number, line in enumerate(lines, start=1)]
    for number, shard in enumerate(shards):
        expected = divmod(number, run.n_layers)
        if (shard.shard, shard.layer) != expected or shard.shard >= run.n_shards:
            got = f"shard {shard.shard} of layer {shard.layer}"
            raise FormatError("out of order", where=path, field=f"line {number + 1}", got=got)
    return shards


def _read_tokens(folder: Path, run: TraceRun) -> dict[str, np.ndarray]:
    path = folder / "tokens.safetensors"
    if not path.is_file():
        raise FormatError("missing", where=path)
    tensors = read_tensors(path.read_bytes(), path)
    for name, dtype in _TOKENS.items():
        check_tensor(tensors, name, (run.n_tokens,), dtype, path)
    if tokens_digest(tensors) != run.text_sha256:
        raise MismatchError(
            "belongs to a different run", where=path, got=tokens_digest(tensors), expected=run.text_sha256
        )
    if (highest := int(tensors["part"].max())) >= len(PARTS):
        raise FormatError("unknown part", where=path, field="part", got=highest, expected="0, 1 or 2")
    return tensors


def _parse_line(line: bytes, path: Path, field: str) -> TraceShard:
    return from_fields(TraceShard, parse_json(line, path, field), path, prefix=f"{field}, ")
