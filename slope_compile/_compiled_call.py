"""Whether something that ``torch.compile`` returned is running, further out on the stack.

Private names used, tested on torch 2.11 and 2.13: the function ``compile_wrapper`` and its file ``eval_frame.py``, by
which the frame is recognised; Dynamo itself is not imported.  ``sys._getframe`` is CPython's.
"""

from __future__ import annotations

import sys
from types import FrameType


def in_compiled_call() -> bool:
    """Whether a compiled call is under way in this thread."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "compile_wrapper" and frame.f_code.co_filename.endswith("eval_frame.py"):
            return True
        frame = frame.f_back
    return False
