"""Input rules: which inputs of a matrix count, so that what belongs to the others need not be read.

What a firing rule is to neurons, an input rule is to inputs. It stands at a site, which is what some matrices
of a layer read together. Input j counts iff its score reaches the layer's threshold. A score is |x_j| times
a weight that is fixed for each input: 1 for `magnitude` (TEAL, arXiv 2408.14690), the norm of what the input
is multiplied by, ‖W[:, j]‖ over all matrices of the site, for `wina` (arXiv 2505.19427). So a backend needs
no more than one number per input, below which |x_j| is taken for 0. The first token of a context keeps all of
its inputs: it is the attention sink of all others (arXiv 2402.17762).

A new score is a row of `SCORES`. A new site is a row of `SITES`, its width in `site_widths`, and its place
in the engines. `config.json` says `"input_rules": {"o": {"score": "magnitude", "thresholds": [...]}}`; GGUF
metadata has the same under `hotcold.inputs.SITE.`, and the weights too, which a checkpoint does not store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hotcold.errors import FormatError

if TYPE_CHECKING:
    from hotcold.files.gguf import GGUFFile
    from hotcold.model.spec import ModelSpec

__all__ = [
    "CONFIG_KEY",
    "SCORES",
    "SITES",
    "InputRule",
    "config_entry",
    "least_inputs",
    "metadata_of",
    "rules_of_config",
    "rules_of_file",
    "site_slots",
    "site_widths",
    "weights_key",
]

# The slots of the matrices that read a site. A model without gates lacks `up`.
SITES = {"qkv": ("q", "k", "v"), "o": ("o",), "gate_up": ("gate", "up"), "down": ("down",)}
CONFIG_KEY = "input_rules"
_PREFIX = "hotcold.inputs"

Matrices = Iterable[np.ndarray]  # each [outputs, inputs]


def _column_norms(matrices: Matrices) -> np.ndarray:
    squares = sum(np.square(matrix, dtype=np.float64).sum(0) for matrix in matrices)
    return np.sqrt(squares).astype(np.float32)


# What |x_j| is multiplied by, float32 [inputs]; None: nothing.
SCORES: dict[str, Callable[[Matrices], np.ndarray] | None] = {"magnitude": None, "wina": _column_norms}


def site_slots(spec: ModelSpec, site: str) -> tuple[str, ...]:
    """The slots of the matrices that a model has at a site."""
    return tuple(slot for slot in SITES[site] if slot != "up" or spec.structure.gated)


def site_widths(spec: ModelSpec) -> dict[str, int]:
    """How many inputs each site has."""
    d = spec.d_model
    return {"qkv": d, "o": spec.n_heads * spec.head_dim, "gate_up": d, "down": spec.d_ff}


@dataclass(frozen=True, slots=True)
class InputRule:
    """An input of `site` in layer i counts iff its `score` is at least `thresholds[i]`."""

    site: str
    thresholds: tuple[float, ...]
    score: str = "magnitude"

    @property
    def weighted(self) -> bool:
        """Whether the score takes a weight per input."""
        return SCORES[self.score] is not None

    def weights(self, matrices: Matrices) -> np.ndarray | None:
        """What |x_j| is multiplied by, from the site's matrices in one layer; None: nothing."""
        weigh = SCORES[self.score]
        return None if weigh is None else weigh(matrices)

    def least(self, layer: int, width: int, weights: np.ndarray | None) -> np.ndarray:
        """The smallest |x_j| that counts, float32 [width]; infinite where no size is enough."""
        threshold = np.full(width, self.thresholds[layer], np.float32)
        if weights is None:
            return threshold
        never = np.where(threshold > 0, np.float32(np.inf), np.float32(0))
        return np.divide(threshold, weights, out=never, where=weights > 0)


def rules_of_config(
    config: Mapping[str, Any], n_layers: int, where: str | Path = "config.json"
) -> tuple[InputRule, ...]:
    """The input rules that `config.json` states; FormatError for what is none."""
    return _rules(config.get(CONFIG_KEY) or {}, n_layers, where, CONFIG_KEY)


def config_entry(rules: Iterable[InputRule]) -> dict[str, Any]:
    """What `config.json` says under `CONFIG_KEY`."""
    return {rule.site: {"score": rule.score, "thresholds": list(rule.thresholds)} for rule in rules}


def rules_of_file(file: GGUFFile, n_layers: int) -> tuple[InputRule, ...]:
    """The input rules of a GGUF file; FormatError for what is none."""
    entries: dict[str, dict[str, Any]] = {}
    for key, value in file.metadata.items():
        site, _, field = key.removeprefix(f"{_PREFIX}.").partition(".")
        if key.startswith(f"{_PREFIX}.") and field != "weights":
            entries.setdefault(site, {})[field] = value.tolist() if isinstance(value, np.ndarray) else value
    return _rules(entries, n_layers, file.path, _PREFIX)


def metadata_of(rules: Iterable[InputRule]) -> dict[str, Any]:
    """What GGUF metadata says of the rules, without weights."""
    found: dict[str, Any] = {}
    for rule in rules:
        found[f"{_PREFIX}.{rule.site}.score"] = rule.score
        found[f"{_PREFIX}.{rule.site}.thresholds"] = np.asarray(rule.thresholds, np.float32)
    return found


def weights_key(rule: InputRule) -> str:
    """The metadata key of a score's weights, float32 [n_layers * inputs]."""
    return f"{_PREFIX}.{rule.site}.weights"


def least_inputs(file: GGUFFile, spec: ModelSpec) -> dict[str, np.ndarray]:
    """By site, the smallest |x_j| that counts, float32 [n_layers, inputs]; only sites that have a rule."""
    found = {}
    for rule in rules_of_file(file, spec.n_layers):
        shape = spec.n_layers, site_widths(spec)[rule.site]
        weights = _weights(file, rule, shape) if rule.weighted else [None] * spec.n_layers
        found[rule.site] = np.stack([rule.least(i, shape[1], weights[i]) for i in range(spec.n_layers)])
    return found


def _rules(entries: Any, n_layers: int, where: str | Path, field: str) -> tuple[InputRule, ...]:
    """What config and metadata have in common: site -> score and thresholds."""
    if not isinstance(entries, Mapping):
        raise _bad(where, field, entries, "an object with a site in each entry")
    for site, entry in entries.items():
        if site not in SITES:
            raise _bad(where, field, site, " | ".join(SITES))
        if not isinstance(entry, Mapping) or set(entry) != {"score", "thresholds"}:
            raise _bad(where, f"{field}.{site}", entry, "score and thresholds")
        if entry["score"] not in list(SCORES):
            raise _bad(where, f"{field}.{site}.score", entry["score"], " | ".join(SCORES))
        if not _are_thresholds(entry["thresholds"], n_layers):
            expected = f"{n_layers} numbers, finite and not negative"
            raise _bad(where, f"{field}.{site}.thresholds", entry["thresholds"], expected)
    return tuple(
        InputRule(site, tuple(map(float, entries[site]["thresholds"])), entries[site]["score"])
        for site in SITES
        if site in entries
    )


def _are_thresholds(values: Any, n_layers: int) -> bool:
    if not isinstance(values, list) or len(values) != n_layers:
        return False
    largest = float(np.finfo(np.float32).max)
    return all(isinstance(t, int | float) and not isinstance(t, bool) and 0 <= t <= largest for t in values)


def _weights(file: GGUFFile, rule: InputRule, shape: tuple[int, int]) -> np.ndarray:
    key = weights_key(rule)
    values = file.require(key, np.ndarray)
    if values.dtype != np.float32 or values.size != shape[0] * shape[1]:
        raise _bad(file.path, key, f"{values.size} of {values.dtype}", f"{shape[0]} x {shape[1]} of float32")
    if not np.isfinite(values).all() or (values < 0).any():
        raise _bad(file.path, key, "others", "finite numbers, none of them negative")
    return values.reshape(shape)


def _bad(where: str | Path, field: str, got: Any, expected: str) -> FormatError:
    return FormatError("not an input rule", where=where, field=field, got=got, expected=expected)
