"""Which device each layer goes to: in order, and on as few of them as the model needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement, groupby

from hotcold.errors import UnsupportedError
from hotcold.runtime.sizes import format_bytes

__all__ = ["Fixed", "fill", "spans", "spread"]

_HALVINGS = 16


@dataclass(frozen=True, slots=True)
class Fixed:
    """Bytes beside layers: on `each` device in use, and more on the `first` (embedding) and `last` (head).

    Where these are one device, `tied` bytes are needed once only: a head that is the embedding.
    """

    first: int
    last: int = 0
    each: int = 0
    tied: int = 0

    def on(self, *, first: bool, last: bool) -> int:
        """Bytes on a device in use."""
        return self.each + first * self.first + last * self.last - (first and last) * self.tied


def fill(sizes: Sequence[int], fixed: Fixed, budgets: Sequence[int]) -> tuple[list[int], list[int]]:
    """Devices of layers of these bytes, from the first on as far as they fit; and the fixed bytes per device.

    Fewer devices are better than more, and earlier than later ones. Raises UnsupportedError if not even
    `fixed` fits.
    """
    pairs = combinations_with_replacement(range(len(budgets)), 2)
    best: tuple[list[int], list[int]] | None = None
    for first, last in sorted(pairs, key=lambda pair: pair[1] - pair[0]):
        extra = [fixed.on(first=i == first, last=i == last) for i in range(len(budgets))]
        homes = _in_order(sizes, [budget - n for budget, n in zip(budgets, extra, strict=True)], first, last)
        if homes is not None and (best is None or len(homes) > len(best[0])):
            used = {first, *homes}
            best = homes, [n if i in used else 0 for i, n in enumerate(extra)]
    if best is None:
        raise UnsupportedError(
            "not enough GPU memory for embedding, head, and buffers",
            got=format_bytes(max(budgets)),
            expected=f"{format_bytes(fixed.on(first=True, last=True))} or more",
            fix="raise --vram-budget, or use --backend cpu",
        )
    return best


def _in_order(sizes: Sequence[int], room: list[int], first: int, last: int) -> list[int] | None:
    """Layers on the devices from `first` to `last`, both of which must have some; None if they cannot."""
    homes: list[int] = []
    device = first
    for size in sizes:
        device = next((i for i in range(device, last + 1) if room[i] >= size), None)
        if device is None:
            break
        room[device] -= size
        homes.append(device)
    if homes and homes[-1] < last and room[last] >= sizes[len(homes) - 1]:
        homes[-1] = last
    ends = (homes[0], homes[-1]) if homes else (first, first)
    return homes if ends == (first, last) and min(room[first], room[last]) >= 0 else None


def spread(
    frames: Sequence[int], neurons: Sequence[int], fixed: Fixed, budgets: Sequence[int]
) -> tuple[list[int], list[int]]:
    """`fill` for layers of which a part may stay away: all of a frame is there, of `neurons` bytes some.

    As many layers as can be have their frame on a device. If they all fit with their neurons, it is as `fill`
    says, else with the greatest share of each one's neurons for which there is room.
    """
    n = len(fill(frames, fixed, budgets)[0])

    def with_share(share: float) -> tuple[list[int], list[int]]:
        sizes = [frame + math.ceil(share * more) for frame, more in zip(frames[:n], neurons, strict=False)]
        return fill(sizes, fixed, budgets)

    whole = with_share(1.0)
    if len(whole[0]) == n:
        return whole
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        low, high = (share, high) if len(with_share(share)[0]) == n else (low, share)
    return with_share(low)


def spans(homes: Sequence[int]) -> list[tuple[int, range]]:
    """Devices and their layers, in order."""
    found, start = [], 0
    for device, layers in groupby(homes):
        stop = start + len(list(layers))
        found.append((device, range(start, stop)))
        start = stop
    return found
