"""Running a model over text and recording, for each FFN layer, its input and which neurons fired.

Each shard is computed from its own tokens alone, in windows that are run one by one: the same tokens always
meet the same matrix shapes, so that a shard comes out byte for byte the same whenever it is computed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from hotcold import text
from hotcold.cpus import in_threads
from hotcold.errors import InputError
from hotcold.model.limits import check_ids, check_window, n_embeddings
from hotcold.predictor.traces.reader import windows
from hotcold.predictor.traces.writer import TraceWriter
from hotcold.progress import Progress

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor, nn
    from transformers import PreTrainedModel

    from hotcold.model.checkpoint import FfnLayer

    _Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]

__all__ = ["check_tokens", "collect", "gather_tokens"]

_FLOAT16_MAX = float(np.finfo(np.float16).max)


def gather_tokens(
    source: str, tokenizer: Tokenizer, n_tokens: int, share: float = 0.05
) -> dict[str, np.ndarray]:
    """Take `n_tokens` tokens of `source`: of its train part, then a `share` each of calibrate and of test.

    Returns the arrays of `tokens.safetensors`: `ids`, `document` int32 and `part` uint8, each [n_tokens].
    InputError if a part of the text is too short.
    """
    n_part = max(1, round(n_tokens * share))
    sizes = {"train": n_tokens - 2 * n_part, "calibrate": n_part, "test": n_part}
    if sizes["train"] < 1:
        raise InputError("too few tokens for three parts", got=n_tokens, fix="give a larger --tokens")
    parts = [_part(source, part, tokenizer, sizes[part]) for part in text.PARTS]
    stream = [ids for part in parts for ids in part]
    lengths = [len(ids) for ids in stream]
    return {
        "ids": np.concatenate(stream),
        "document": np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        "part": np.repeat(np.arange(len(parts), dtype=np.uint8), list(sizes.values())),
    }


def _part(source: str, part: text.Part, tokenizer: Tokenizer, n_tokens: int) -> list[np.ndarray]:
    try:
        return text.token_stream(text.documents(source, part), tokenizer, n_tokens)
    except InputError as error:
        if error.expected is None:
            raise
        what = f"{error.what} for its {part} part"
        raise InputError(what, where=source, got=error.got, expected=error.expected, fix=error.fix) from error


def check_tokens(model: PreTrainedModel, tokens: dict[str, np.ndarray], window: int) -> None:
    """Raise InputError for ids or windows that the model has no embeddings for, before a write."""
    check_ids(tokens["ids"], n_embeddings(model))
    check_window(model, min(window, int(np.bincount(tokens["document"]).max())))


def collect(
    model: PreTrainedModel,
    layers: list[FfnLayer],
    tokens: dict[str, np.ndarray],
    writer: TraceWriter,
    n_threads: int = 1,
) -> None:
    """Compute and commit the shards that `writer` misses, `n_threads` windows at a time.

    One shard of all layers is held in memory.
    """
    run = writer.run
    done = run.shard_slice(writer.next_shard).start
    with Progress("collect", total=run.n_tokens, unit="tok", start=min(done, run.n_tokens)) as progress:
        for shard in range(writer.next_shard, run.n_shards):
            rows = run.shard_slice(shard)
            recorder = _record(
                model, layers, tokens["ids"][rows], tokens["document"][rows], run.window, n_threads, progress
            )
            for layer, recorded in enumerate(recorder.layers):
                writer.write(
                    layer, shard, recorded.x, recorded.active, fired=recorded.fired, clipped=recorded.clipped
                )


def _record(
    model: PreTrainedModel,
    layers: list[FfnLayer],
    ids: np.ndarray,
    document: np.ndarray,
    window: int,
    n_threads: int,
    progress: Progress,
) -> _Recorder:
    import torch

    def run(rows: slice) -> int:
        recorder.here.rows = rows
        with torch.inference_mode():
            # the base model: without the LM head, whose logits nobody wants
            model.base_model(torch.from_numpy(ids[rows].astype(np.int64))[None], use_cache=False)
        return rows.stop - rows.start

    with _Recorder(layers, len(ids)) as recorder:
        for n_tokens in in_threads(run, windows(document, window), n_threads):
            progress.advance(n_tokens)
    return recorder


@dataclass(slots=True)
class _Recorded:
    """What one layer saw: x float16 [tokens, d_model], active uint8 [tokens, ceil(d_ff / 8)], and counts."""

    x: np.ndarray
    active: np.ndarray
    fired: int = 0
    clipped: int = 0


class _Recorder:
    """Hooks on every FFN layer that file what passes as rows of the shard, while the `with` block lasts.

    Which rows they are, each thread says in `here.rows`.
    """

    def __init__(self, layers: list[FfnLayer], n_tokens: int) -> None:
        self.here = threading.local()
        self._counting = threading.Lock()
        self.layers = [
            _Recorded(
                np.empty((n_tokens, layer.gate.in_features), np.float16),
                np.empty((n_tokens, -(-layer.gate.out_features // 8)), np.uint8),
            )
            for layer in layers
        ]
        self._modules = layers
        self._hooks: list = []

    def __enter__(self) -> Self:
        for number, (layer, recorded) in enumerate(zip(self._modules, self.layers, strict=True)):
            self._hooks += [
                layer.norm.register_forward_pre_hook(self._input_hook(recorded, number)),
                layer.down.register_forward_pre_hook(self._active_hook(recorded)),
            ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()

    def _input_hook(self, recorded: _Recorded, layer: int) -> _Hook:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = _tokens(inputs[0]).float().numpy()
            if not np.isfinite(x).all():
                raise InputError("activations are not finite", where=f"layer {layer}", fix="check the model")
            clipped = int(np.count_nonzero(np.abs(x) > _FLOAT16_MAX))
            recorded.x[self.here.rows] = np.clip(x, -_FLOAT16_MAX, _FLOAT16_MAX)
            with self._counting:
                recorded.clipped += clipped

        return hook

    def _active_hook(self, recorded: _Recorded) -> _Hook:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            active = (_tokens(inputs[0]) != 0).numpy()
            fired = int(np.count_nonzero(active))
            recorded.active[self.here.rows] = np.packbits(active, axis=-1, bitorder="little")
            with self._counting:
                recorded.fired += fired

        return hook


def _tokens(values: Tensor) -> Tensor:
    """[tokens, n] of the one sequence that is run: some FFNs drop the dimension of the batch."""
    return values.reshape(-1, values.shape[-1])
