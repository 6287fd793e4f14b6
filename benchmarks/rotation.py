"""Cold weights: how many copies of a weight to go round, so that none is found in a cache.

In a model each layer's weight is read once a step, between all the others; a benchmark that reads one weight over and
over finds it in the last-level cache and measures something else.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch

_TIMES = 4
"""The copies together hold so many times the cache."""
_MOST = 512
"""Copies; what takes more are the weights of tests, for which a launch is all there is to time."""
_FALLBACK = 32 << 20
"""Where the system does not tell the size of its cache."""


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [
        _bytes(path.read_text(encoding="utf-8"))
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=_FALLBACK)


def copies(smallest: int, cache: int) -> int:
    """Number of copies, two to 512.

    Args:
        smallest: bytes that the contender with the smallest weight reads in a call.
        cache: size of the last-level cache.
    """
    return min(_MOST, max(2, math.ceil(_TIMES * cache / smallest)))


def _bytes(text: str) -> int:
    """``"32768K"`` -> 33554432."""
    text = text.strip()
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
    return int(text[:-1]) * unit if unit else int(text)
