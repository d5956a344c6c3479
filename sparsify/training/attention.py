"""Attention for training and sampling on a CPU: query heads that share a KV head are one matrix product.

transformers' own ways either repeat keys and values for each query head (eager: sampling spends most of its
time on those copies) or use a fused kernel whose backward pass is slow on CPUs. Same function, fewer bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

__all__ = ["use_grouped_attention"]

_NAME = "hotcold_grouped"


def use_grouped_attention(model: PreTrainedModel) -> None:
    """Let `model` compute attention in groups from now on. Its config file will not mention it."""
    AttentionInterface.register(_NAME, _grouped)
    AttentionMaskInterface.register(_NAME, eager_mask)
    model.set_attn_implementation(_NAME)


def _grouped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax attention without dropout; returns [batch, tokens, heads, d].

    `query` is [batch, heads, tokens, d], `key` and `value` are [batch, kv heads, seen, d]; `attention_mask`
    [batch, 1, tokens, seen] is added to the scores.
    """
    batch, heads, tokens, d = query.shape
    groups, seen = key.shape[1:3]
    grouped = (query * scaling).reshape(batch, groups, heads // groups * tokens, d)
    scores = grouped @ key.transpose(-1, -2)
    if attention_mask is not None:
        by_head = scores.view(batch, groups, heads // groups, tokens, seen)
        scores = (by_head + attention_mask[:, :, None, :, :seen]).view_as(scores)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).view(batch, heads, tokens, d).transpose(1, 2), None
