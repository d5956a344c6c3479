"""Tables keep every cell, in columns that are aligned."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hotcold.table import columns, markdown

CELLS = st.text(st.sampled_from("ab1–. "), max_size=9).map(str.strip)
TABLES = st.integers(1, 5).flatmap(
    lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1, max_size=5)
)


@given(TABLES, st.sets(st.integers(0, 4)))
def test_markdown_gives_every_cell_back_from_lines_of_one_length(table, left):
    lines = markdown(table[0], table[1:], left).splitlines()
    assert len(lines) == len(table) + 1
    assert len({len(line) for line in lines}) == 1
    found = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert found[:1] + found[2:] == table
    assert [rule.startswith(":") for rule in found[1]] == [i in left for i in range(len(table[0]))]
    assert [rule.endswith(":") for rule in found[1]] == [i not in left for i in range(len(table[0]))]


def test_words_are_to_the_left_and_numbers_to_the_right():
    rows = [("dense", "1.5"), ("exact", "10.25")]
    assert markdown(("side", "t/s"), rows) == (
        "| side  |   t/s |\n|:------|------:|\n| dense |   1.5 |\n| exact | 10.25 |"
    )
    assert columns(("side", "t/s"), rows) == "side     t/s\ndense    1.5\nexact  10.25"
    assert columns(("t/s", "side"), [row[::-1] for row in rows], left=(0, 1)) == (
        "t/s    side\n1.5    dense\n10.25  exact"
    )
