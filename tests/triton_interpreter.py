"""Triton's interpreter with its gaps closed, so that kernels run unmodified on CPU tensors.

The interpreter keeps bfloat16 as raw 16-bit integers: a dot multiplies those integers, and a cast from float32 cuts the
low bits off instead of rounding.  Both are put right here.  With NumPy 2.4, Triton 3.6 also fails to take the bound of
a loop from a one-element array.  ``TRITON_INTERPRET=1`` must be set before any kernel is imported.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def slow_interpreted() -> list[pytest.MarkDecorator]:
    """The marks of a case that is quick on a GPU and takes the interpreter seconds."""
    return [pytest.mark.slow] if interpreting() else []


def dtypes(*quick: torch.dtype) -> pytest.MarkDecorator:
    """Every dtype; all but these are slow for the interpreter, which does much the same for each."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    params = [pytest.param(d, id=name, marks=[] if d in quick else slow_interpreted()) for d, name in names.items()]
    return pytest.mark.parametrize("dtype", params)


def close_gaps() -> None:
    """Patch the interpreter of this process; harmless twice."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "gaps_closed", False):
        return

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return handle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    plain_dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, widened(a), widened(b), *rest)

    plain_convert = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source != tl.float32 or target != tl.bfloat16:
            return plain_convert(data, source, target, rounding)
        bits = np.ascontiguousarray(data).view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # ties to even
        quiet = (bits >> 16) | 0x40
        return np.where(np.isnan(data), quiet, nearest).astype(np.uint16)

    plain_patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, *scope: Any) -> None:
        plain_patch(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    builder.create_dot = create_dot
    interpreter._convert_float = convert
    interpreter._patch_lang_tensor = patch_tensor
    builder.gaps_closed = True
