"""When a kernel may be tested on a device, and of which the result is known.

A test compiles, launches and reads results back.  While the current stream is captured for a CUDA graph none of that is
allowed, and what was tried would be taken for a fault of the kernel: an untested kernel is left out then, and tested
at its next use.  One thread tests at a time, so that none meets a test that another has begun and not ended.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

from slope_compile.log import log

_ended: set[tuple[Any, ...]] = set()
"""Cases of which the result is known."""
_put_off: set[tuple[Any, ...]] = set()
"""Cases that a capture met untested, of which the log has told."""
_one_at_a_time = threading.RLock()


def trusted(passes: Callable[..., bool], device: torch.device, *rest: Any) -> bool:
    """Whether a kernel passes its test, which remembers its results; the first use runs it, outside of captures.

    Args:
        passes: called with the device and the rest.
    """
    case = (device, *rest)
    if case in _ended:
        return passes(*case)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        if case not in _put_off:
            _put_off.add(case)
            log.warning(
                "a CUDA graph is captured before the kernels that it wants were tested (%s): it records slower ones; "
                "run once before the capture", ", ".join(map(str, case)),
            )  # fmt: skip
        return False
    with _one_at_a_time:
        right = passes(*case)
        _ended.add(case)
    return right
