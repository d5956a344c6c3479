"""Telling glibc to keep big buffers, without which torch on a CPU spends half of its time in page faults.

By default glibc maps every large buffer freshly and gives it back when it is freed, so each operation of a
training step touches pages for the first time again.
"""

from __future__ import annotations

import ctypes

__all__ = ["keep_big_buffers"]

# <malloc.h>
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_TOP_PAD = 64 << 20
_NEVER = (1 << 31) - 1


def keep_big_buffers() -> bool:
    """Keep freed memory inside this process from now on; False if the C library is not glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _TOP_PAD))
    return [mallopt(option, value) for option, value in settings] == [1, 1, 1]
