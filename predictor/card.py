"""The model card of a predictor bundle: what it is, how good it is, how it is used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hotcold.predictor.training.metrics import mean_metrics, table

if TYPE_CHECKING:
    from hotcold.predictor.bundle import PredictorBundle

__all__ = ["model_card"]

_CARD = """\
---
library_name: hotcold
tags:
- activation-sparsity
- powerinfer
---
# Activation predictors

For each FFN layer two thin matrices that tell, from {input}, which neurons will fire: neuron `j` is predicted
active iff `({formula})[j] >= threshold`.

- kind: `{kind}`
- model: {model}, fingerprint `{fingerprint}`
- {n_layers} layers, d_model {d_model}, d_ff {d_ff}
{quality}
```python
from hotcold.predictor.bundle import PredictorBundle

predictors = PredictorBundle.from_pretrained("PATH")
layer = predictors.layers[0]
active = layer.logits(x) >= layer.threshold  # x: [tokens, {d_model}]
```
"""


_QUALITY = """\
- trained on {train_tokens} tokens of {text}
- {chosen_on}
- recall {recall:.4f} (target {target}), predicted sparsity {predicted:.4f}, true sparsity {true:.4f}

Recall is the share of firing neurons that are predicted, predicted sparsity the share of neurons that are
not computed. Each layer's threshold is the greatest that reaches the target recall on the tokens that it was
chosen on, in the first layer also nearly full recall on the first tokens of a context.

{table}
"""

_ORIGIN = """\
- converted from {origin}; hotcold has not measured how good they are

{table}
"""


def model_card(bundle: PredictorBundle) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    kind, residual = bundle.kind, "the residual stream before the FFN norm"
    return _CARD.format(
        kind=kind.name, formula=kind.formula,
        input="the FFN's input after its norm" if kind.normed else residual,
        model=bundle.training.get("model", "unknown"), fingerprint=bundle.model_fingerprint,
        n_layers=bundle.n_layers, d_model=bundle.d_model, d_ff=bundle.d_ff,
        quality=_measured(bundle) if bundle.metrics else _unmeasured(bundle),
    )  # fmt: skip


def _measured(bundle: PredictorBundle) -> str:
    mean, training = mean_metrics(bundle.metrics), bundle.training
    return _QUALITY.format(
        train_tokens=training.get("train_tokens", "unknown"), text=training.get("text", "unknown"),
        chosen_on=_chosen_on(training), target=bundle.target_recall,
        recall=mean.recall, predicted=mean.predicted_sparsity, true=mean.true_sparsity,
        table=table(bundle.ranks, bundle.thresholds, bundle.metrics),
    )  # fmt: skip


def _chosen_on(training: Mapping[str, Any]) -> str:
    """Which tokens thresholds and metrics are from: the same ones in bundles of version 1 traces."""
    if "heldout_tokens" in training:
        return f"threshold and metrics from {training['heldout_tokens']} tokens of other documents"
    calibrate, test = (training.get(f"{part}_tokens", "unknown") for part in ("calibrate", "test"))
    return f"threshold from {calibrate} tokens of other documents, metrics from {test} tokens of still others"


def _unmeasured(bundle: PredictorBundle) -> str:
    rows = enumerate(zip(bundle.ranks, bundle.thresholds, strict=True))
    lines = [f"| {number} | {rank} | {threshold:.3f} |" for number, (rank, threshold) in rows]
    origin = bundle.training.get("converted_from", "unknown")
    return _ORIGIN.format(
        origin=origin, table="\n".join(["| layer | rank | threshold |", "|---:|---:|---:|", *lines])
    )
