"""Parts of a model whose rest is computed on another device."""

from typing import Annotated

import numpy
from numpy.typing import NDArray

import hotcold.runtime.cpu._cpu


def set_neurons(model: hotcold.runtime.cpu._cpu.Model, layer: int, n: int, gate: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], gate_type: int, up: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)] | None, up_type: int, down: Annotated[NDArray[numpy.uint8], dict(shape=(None,), order='C', device='cpu', writable=False)], down_type: int, bias: Annotated[NDArray[numpy.float32], dict(shape=(None,), order='C', device='cpu', writable=False)] | None = None) -> None:
    """
    Holds `n` neurons of a layer, numbered from 0. Without gates, what decides is in their place, plus `bias`.
    """

def run_layers(sequence: hotcold.runtime.cpu._cpu.Sequence, x: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')], first: int, last: int, position: int) -> None:
    """Layers [first, last) on the residual stream x, in place."""

def run_neurons(sequence: hotcold.runtime.cpu._cpu.Sequence, layer: int, normed: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu', writable=False)], index: Annotated[NDArray[numpy.int32], dict(shape=(None,), order='C', device='cpu', writable=False)], tokens: Annotated[NDArray[numpy.uint64], dict(shape=(None,), order='C', device='cpu', writable=False)], y: Annotated[NDArray[numpy.float32], dict(shape=(None, None), order='C', device='cpu')]) -> int:
    """
    y = what the listed neurons add; `tokens` has bit t where token t wants a neuron. Returns how many fired.
    """
