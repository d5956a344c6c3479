"""FFN activations that transformers lacks. They give exact zeros, which is what the runtime skips."""

from __future__ import annotations

from torch import Tensor, nn, where

__all__ = ["FATReLU", "rectify_output"]


class FATReLU(nn.Module):
    """x where it is positive and reaches `threshold`, else 0; not shifted (arXiv 2402.13516, equation 3)."""

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return where((x > 0) & (x >= self.threshold), x, 0.0)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"threshold={self.threshold:g}"


def rectify_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook for up projections: with ReLU on the gate this makes dReLU (arXiv 2406.05955)."""
    return output.relu()
