"""Tables for people: Markdown that reads as well on a terminal, or the bare columns."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

__all__ = ["columns", "markdown"]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A Markdown table with padded cells; columns of numbers are to the right, those of `left` are not."""
    lines = _aligned([head, *rows], left)
    dashes = ["-" * (len(cell) + 1) for cell in lines[0]]
    rule = [f":{dash}" if i in left else f"{dash}:" for i, dash in enumerate(dashes)]
    first, *others = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([first, f"|{'|'.join(rule)}|", *others])


def columns(head: Sequence[str], rows: Iterable[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """The same without any lines."""
    return "\n".join("  ".join(line).rstrip() for line in _aligned([head, *rows], left))


def _aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> list[list[str]]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def pad(i: int, cell: str) -> str:
        return cell.ljust(widths[i]) if i in left else cell.rjust(widths[i])

    return [[pad(i, cell) for i, cell in enumerate(line)] for line in lines]
