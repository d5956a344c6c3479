"""The JSON that hotcold prints is JSON, whatever the figures."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from hotcold.files.json import json_text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def as_written(value: object) -> object:
    """null for what is no number."""
    if isinstance(value, dict):
        return {key: as_written(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [as_written(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@given(VALUES)
def test_no_nan_is_printed(value):
    text = json_text(value)
    assert json.loads(text, parse_constant=refuse) == as_written(value)
    assert "\n" not in text
