"""FFN activations that transformers lacks. They give exact zeros, which is what the runtime skips."""

from __future__ import annotations

from torch import Tensor, nn, relu, where

__all__ = ["DReLU", "FATReLU", "ReLU2", "ShiftedReLU", "make_activation", "rectify_output"]


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


class ShiftedReLU(nn.Module):
    """max(x - shift, 0) (arXiv 2310.04564)."""

    def __init__(self, shift: float) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return relu(x - self.shift)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"shift={self.shift:g}"


class ReLU2(nn.Module):
    """max(x, 0)² (arXiv 2402.03804)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return relu(x).square()


class DReLU(nn.ReLU):
    """ReLU that wants to be applied to the up projection too (arXiv 2406.05955)."""

    rectifies_up = True


def make_activation(kind: str, parameter: float) -> nn.Module:
    """The module of an activation whose name `hotcold.model.activation_names.parse` has taken apart."""
    match kind:
        case "fatrelu":
            return FATReLU(parameter)
        case "shifted_relu":
            return ShiftedReLU(parameter)
        case "relu2":
            return ReLU2()
    return DReLU()


def rectify_output(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A forward hook for up projections: with ReLU on the gate this makes dReLU (arXiv 2406.05955)."""
    return output.relu()
