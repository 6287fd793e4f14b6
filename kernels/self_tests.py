"""Decides when a kernel may be self-tested and remembers the results.

A test compiles, launches and reads results back.  While the current stream is captured for a CUDA graph none of that is
allowed, and a test that tried would blame the kernel.  An untested kernel is therefore not used during a capture, and
is tested at its next use.  One thread tests at a time; another that needs the same kernel waits for the result.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from slope_compile.log import log

_results: dict[tuple[Any, ...], bool] = {}
"""Test and its arguments -> whether it passed.  They are as few as the configurations of the kernels."""
_put_off: set[tuple[Any, ...]] = set()
"""Untested cases met during a capture, already logged."""
_one_at_a_time = threading.RLock()


def trusted(passes: Callable[..., bool], device: torch.device, *rest: Any) -> bool:
    """Whether a kernel passes its test; the first use runs it, outside of captures.

    Args:
        passes: the test, called with the device and the rest.  The caller sees to it that arguments for which the test
            does the same are the same.
    """
    case = (passes, device, *rest)
    known = _results.get(case)
    if known is not None:
        return known
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if case not in _put_off:
            _put_off.add(case)
            log.warning(
                "a CUDA graph is captured before the kernels that it wants were tested (%s): it records slower ones; "
                "run once before the capture", ", ".join(map(str, (device, *rest))),
            )  # fmt: skip
        return False
    with _one_at_a_time:
        known = _results.get(case)  # another thread may have tested it while this one waited
        if known is None:
            known = _results[case] = passes(device, *rest)
    return known
