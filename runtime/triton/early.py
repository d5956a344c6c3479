"""Kernels that begin while the one before them ends: programmatic dependent launch (CUDA, Hopper and later).

A token is some hundred short kernels in a row, and between two of them the memory is idle for about a
microsecond: the last programs of one drain, those of the next start and wait for their first bytes. A kernel
launched early starts as soon as all programs of the one before it have started, and reads what nothing before
it writes, its weights, ahead of `wait_for_last`. What that lets through sees everything that was written
before; it must stand in every kernel that is launched so, ahead of whatever else is read or written. What is
given to a kernel as weights must not be what the kernel just before it computes.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = ["let_next_start", "wait_for_last"]


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """From here on the next kernel may start, once all programs of this one have come here."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(EARLY: tl.constexpr):
    """Wait until all kernels before this one are through."""
    if EARLY:
        gdc_wait()
