"""Speed beside quality: hotcold in each mode and llama.cpp dense, alternately, on the same text.

A shared machine drifts by a third within minutes and every program drifts with it, so the sides take turns
inside each round, in an order that changes from round to round, and a ratio is the median of the rounds' own
ratios, with a confidence interval (`Ratio`). So does the read bandwidth: it is measured before and after each
run of a side, with plain loads and with prefetching, as in the engine. The share of a side is relative to the
best of these readings, since a loop slower than the engine would give a share above 100 %; the report has the
median of its runs' own shares. Tokens are those of a text, not random ones: how many neurons fire depends on
the text. They are fed independent of the engine's choices (teacher forcing), so that all sides compute the
same positions. Only computing is timed (`Side.seconds`), and one run of each side before the first round is
not counted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hotcold.errors import InputError
from hotcold.eval.perplexity import Quality, compare
from hotcold.eval.results import Activity, Ratio, Report, Row, Spread
from hotcold.eval.roofline import Roofline, dense_bytes_per_token, read_bandwidth
from hotcold.eval.sides import EngineSide, Peer, Side
from hotcold.progress import Progress

__all__ = ["Plan", "Segment", "bench", "segments"]

_SETTLE_S = 0.02  # idle worker threads of the previous side spin for some milliseconds before they sleep


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run: `rounds` rounds of `n_prompt` tokens in one block and `n_gen` one at a time."""

    rounds: int
    n_prompt: int
    n_gen: int

    def __post_init__(self) -> None:
        for name in ("rounds", "n_prompt", "n_gen"):
            if getattr(self, name) < 1:
                raise InputError("must be at least 1", where=name, got=getattr(self, name))

    @property
    def n_tokens(self) -> int:
        return self.rounds * (self.n_prompt + self.n_gen)


@dataclass(frozen=True, slots=True)
class Segment:
    """The tokens of one round, int32: a block of `prompt`, then `generated` one at a time."""

    prompt: np.ndarray
    generated: np.ndarray

    @property
    def middle(self) -> int:
        """The mean position of the generated tokens, which sets the size of the KV cache."""
        return len(self.prompt) + len(self.generated) // 2


@dataclass(frozen=True, slots=True)
class _Speed:
    """Tokens per second of one side in one round, and the best read bandwidth (GB/s) beside it."""

    prompt: float
    generation: float
    bandwidth: float


_Round = Mapping[str, _Speed]
_Reading = tuple[float, float]  # of the read bandwidth in GB/s: plain, and prefetching


def segments(ids: np.ndarray, plan: Plan) -> list[Segment]:
    """One segment per round, each its own piece of the text; ids int32 [plan.n_tokens]."""
    pieces = ids.reshape(plan.rounds, plan.n_prompt + plan.n_gen)
    return [Segment(piece[: plan.n_prompt], piece[plan.n_prompt :]) for piece in pieces]


def bench(
    peers: Mapping[str, Peer],
    ours: Mapping[str, EngineSide],
    texts: Sequence[Segment],
    windows: Sequence[np.ndarray],
    *,
    truth: str,
    n_threads: int,
    originals: Mapping[str, Peer | EngineSide] | None = None,
) -> Report:
    """Time all sides on `texts`, then measure the quality of each on `windows`; none if there are none.

    `peers` are llama.cpp on dense files of the same weights; ratios are to the fastest of them. `truth` names
    the one that computes the same function as ours: KL and same-top-1 are against it, and the other peers,
    which compute something else at the same cost, get no quality. `originals` are the model that was made
    sparse, in any engine: all rows also have ratios to them, and they have a perplexity.
    """
    originals = originals or {}
    sides: dict[str, Peer | EngineSide] = {**originals, **peers, **ours}
    _check_vocabulary(sides, truth)
    _warm_up(sides, texts[0])
    engines = {name: side for name, side in sides.items() if isinstance(side, EngineSide)}
    for side in engines.values():
        side.engine.reset_stats()
    found, readings = _rounds(sides, texts, n_threads)
    bandwidth = Spread.of([speed.bandwidth for speeds in found for speed in speeds.values()])
    activity = {name: _activity(side, texts) for name, side in engines.items()}
    parts = {name: of.parts for name, of in activity.items()}
    parts |= {
        name: dense_bytes_per_token(side.path, texts[0].middle)
        for name, side in sides.items()
        if not isinstance(side, EngineSide)
    }
    quality = _quality({truth: peers[truth], **ours}, windows, truth) | _quality(originals, windows, None)
    baseline = {metric: _fastest(found, metric, list(peers)) for metric in ("prompt", "generation")}
    rows = [
        Row(
            side=name,
            prompt=_spread(found, "prompt", name),
            generation=_spread(found, "generation", name),
            ratio_prompt=_ratio(found, "prompt", name, baseline["prompt"]),
            ratio=_ratio(found, "generation", name, baseline["generation"]),
            roofline=Roofline(parts[name], bandwidth.median),
            share=Spread.of(
                [Roofline(parts[name], at.bandwidth).share(at.generation) for at in _of(found, name)]
            ),
            activity=activity.get(name),
            quality=quality.get(name),
            to_originals={of: _ratio(found, "generation", name, of) for of in originals},
        )
        for name in sides
    ]
    plain, prefetching = (Spread.of(readings_of) for readings_of in zip(*readings, strict=True))
    return Report(rows, baseline["generation"], baseline["prompt"], truth, bandwidth, plain, prefetching)


def _check_vocabulary(sides: Mapping[str, Side], truth: str) -> None:
    """All sides get the same ids, so their vocabularies must have the same size."""
    expected = sides[truth].n_vocab
    for name, side in sides.items():
        if side.n_vocab != expected:
            raise InputError("the vocabulary size differs", where=name, got=side.n_vocab, expected=expected)


def _warm_up(sides: Mapping[str, Side], text: Segment) -> None:
    with Progress("warm-up", total=len(sides), unit="run") as progress:
        for side in sides.values():
            _time(side, text)
            progress.advance(1)


def _rounds(
    sides: Mapping[str, Side], texts: Sequence[Segment], n_threads: int
) -> tuple[list[_Round], list[_Reading]]:
    """Speeds of all sides in each round, and all readings of the bandwidth."""
    names = list(sides)
    found: list[_Round] = []
    readings: list[_Reading] = []
    with Progress("bench", total=len(texts) * len(names), unit="run") as progress:
        for index, segment in enumerate(texts):
            readings.append(_reading(n_threads))
            speeds = {}
            for name in _order(names, index):
                prompt, generation = _time(sides[name], segment)
                time.sleep(_SETTLE_S)
                readings.append(_reading(n_threads))
                speeds[name] = _Speed(prompt, generation, max(*readings[-2], *readings[-1]))
                progress.advance(1, side=name, tok_s=generation)
            found.append(speeds)
    return found, readings


def _reading(n_threads: int) -> _Reading:
    return read_bandwidth(n_threads), read_bandwidth(n_threads, prefetching=True)


def _order(names: Sequence[str], index: int) -> list[str]:
    """Rotated by one each round, and turned around every other round, so that neighbors change too."""
    turn = index % len(names)
    rotated = [*names[turn:], *names[:turn]]
    return rotated if index % 2 == 0 else rotated[::-1]


def _time(side: Side, segment: Segment) -> tuple[float, float]:
    """Tokens per second of the prompt and of generation."""
    side.reset()
    side.prefill(segment.prompt)
    prompt_s = side.seconds
    for token in segment.generated:
        side.decode(int(token))
    generation_s = side.seconds - prompt_s
    return len(segment.prompt) / prompt_s, len(segment.generated) / generation_s


def _activity(side: EngineSide, texts: Sequence[Segment]) -> Activity:
    """What was counted in the timed rounds; recall takes another pass, which looks at what was skipped."""
    engine = side.engine
    if engine.mode == "predicted":
        engine.reset_stats()
        engine.audit = True
        for segment in texts:
            _time(side, segment)
    stats = engine.stats()
    engine.audit = False
    return Activity(
        sparsity=math.nan if engine.mode == "dense" else stats.sparsity,
        predicted_sparsity=stats.predicted_sparsity if engine.mode == "predicted" else math.nan,
        recall=stats.recall,
        inputs=stats.input_sparsity,
        parts=engine.bytes_per_token(texts[0].middle),
    )


def _quality(
    sides: Mapping[str, Side], windows: Sequence[np.ndarray], truth: str | None
) -> dict[str, Quality]:
    if not windows or not sides:
        return {}
    total = sum(len(ids) for ids in windows) * len(sides)
    with Progress("quality", total=total, unit="tok") as progress:
        return compare(sides, windows, truth, progress.advance)


def _of(found: Sequence[_Round], name: str) -> list[_Speed]:
    return [speeds[name] for speeds in found]


def _samples(found: Sequence[_Round], metric: str, name: str) -> np.ndarray:
    return np.array([getattr(speed, metric) for speed in _of(found, name)])


def _spread(found: Sequence[_Round], metric: str, name: str) -> Spread:
    return Spread.of(_samples(found, metric, name))


def _ratio(found: Sequence[_Round], metric: str, name: str, baseline: str) -> Ratio:
    return Ratio.of(_samples(found, metric, name) / _samples(found, metric, baseline))


def _fastest(found: Sequence[_Round], metric: str, names: Sequence[str]) -> str:
    return max(names, key=lambda name: _spread(found, metric, name).median)
