"""The threshold on a layer's logits that keeps a wanted share of the neurons that fire."""

from __future__ import annotations

import numpy as np

from hotcold.errors import InputError

__all__ = ["threshold_for_recall"]


def threshold_for_recall(logits: np.ndarray, active: np.ndarray, target: float) -> float:
    """The greatest float32 threshold at which `logits >= threshold` has a micro recall of at least `target`.

    `logits` float32 and `active` bool are [tokens, d_ff]. Recall falls and predicted sparsity rises with
    the threshold, so this is the sparsest choice. Where nothing fired any threshold has full recall; it is
    then just above the greatest logit. InputError for a target outside 0..1.
    """
    if not 0 < target <= 1:
        raise InputError(
            "the target recall is out of range", where="--target-recall", got=target, expected="0 < r <= 1"
        )
    firing = logits[active]
    if not firing.size:
        return float(np.nextafter(logits.max(), np.float32(np.inf)))
    # `misses` of the sorted logits may lie below the threshold; the tolerance keeps 1 - 0.9 from losing one
    misses = int((1 - target) * firing.size + 1e-9)
    return float(np.partition(firing, misses)[misses] if misses < firing.size else firing.max())
