"""The `relu` method: what the command line's few options mean as a config, for minutes on a CPU.

ReLU for SiLU, a layer-wise warm start, then KL from the dense model with a gentle progressive L1 and Q4_0
rounding at the end. The numbers were tuned on SmolLM2-135M.
"""

from __future__ import annotations

import argparse
from typing import Any

from hotcold.errors import InputError
from hotcold.sparsify.config import (
    L1,
    REDUCTIONS,
    Config,
    Generated,
    Learning,
    Reduction,
    Text,
    WarmStart,
)
from hotcold.sparsify.training.command import train

__all__ = ["DEFAULT_GENERATED", "DEFAULT_L1", "DEFAULT_TOKENS", "relu_config", "run"]

DEFAULT_TOKENS, DEFAULT_GENERATED, DEFAULT_L1 = 220_000, 0.65, 0.03
_LAYERWISE_SHARE = 0.14
_GENERATED_PASSES = 2
_SEQUENCE, _BATCH = 256, 2
# Parts of the end-to-end training: stage 0, a short warm-up at a tenth of the peak, one ramp.
_STAGES = ((0.0, 0.1), (0.1, 0.15), (1.0, 0.6))
_QUANTIZE_FROM = 0.75


def run(args: argparse.Namespace, given: dict[str, Any]) -> int:
    """Train as the options say."""
    own = {name: value for name, value in given.items() if name not in ("work", "dry_run")}
    return train(args, relu_config(**own))


def relu_config(
    *,
    text: str = "stdlib",
    tokens: int = DEFAULT_TOKENS,
    generated: float = DEFAULT_GENERATED,
    l1: float = DEFAULT_L1,
    l1_reduction: Reduction = "mean",
    quantize: bool = True,
    seed: int = 0,
) -> Config:
    """`tokens` in all phases together, the share `generated` of them written by the dense model.

    Raises InputError, naming the option, for a value out of its range.
    """
    step_tokens = _BATCH * _SEQUENCE
    if tokens < 2 * step_tokens:
        raise InputError("too few tokens", where="--tokens", got=tokens, expected=f">= {2 * step_tokens}")
    if not 0 <= generated <= 1:
        raise InputError("out of range", where="--generated", got=generated, expected="0 to 1")
    if l1 < 0:
        raise InputError("the L1 factor must not be negative", where="--l1", got=l1)
    if l1_reduction not in REDUCTIONS:
        known = " | ".join(REDUCTIONS)
        raise InputError("unknown reduction", where="--l1-reduction", got=l1_reduction, expected=known)
    warm = max(1, round(tokens * _LAYERWISE_SHARE) // step_tokens)
    steps = max(1, tokens // step_tokens - warm)
    return Config(
        steps=steps,
        sequence=_SEQUENCE,
        batch=_BATCH,
        quantize_from=_QUANTIZE_FROM if quantize else 1.0,
        warm_start=WarmStart(steps=warm, lr=1e-3),
        l1=L1(stages=_stages(l1, steps), reduction=l1_reduction),
        learning=Learning(lr=1.4e-3),
        text=(Text(text, 1 - generated), Text("generated", generated)),
        generated=Generated(tokens=max(_SEQUENCE, round(tokens * generated / _GENERATED_PASSES))),
        heldout=text,
        seed=seed,
    )


def _stages(peak: float, steps: int) -> tuple[tuple[float, int], ...]:
    stages: list[tuple[float, int]] = []
    for share, end in _STAGES:
        least = stages[-1][1] + 1 if stages else 0
        stages.append((peak * share, max(least, round(end * steps))))
    return tuple(stages)
