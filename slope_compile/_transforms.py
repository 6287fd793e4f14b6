"""Whether forward-mode differentiation or a transform of ``torch.func`` is under way.

Private names used: ``torch.autograd.forward_ad._current_level``, ``torch._C._are_functorch_transforms_active``, and the
attribute ``_dynamo_marked_constant``.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def inside_transform() -> bool:
    """Whether the code runs under forward-mode differentiation or a transform of ``torch.func``.

    The operators have no rules for these; the operations in their reference definitions have.  Without a rule,
    autograd would silently drop the tangent of forward mode.
    """
    return _inside_func() or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)


def _inside_func() -> bool:
    return torch._C._are_functorch_transforms_active()


# The same as torch.compiler.assume_constant_result, which would import Dynamo.  Without it, a call whose result is not
# used stays in every graph.  The constant is right: Dynamo guards on the transforms that are active when a graph
# begins, and traces those that begin inside.
_inside_func._dynamo_marked_constant = True  # type: ignore[attr-defined]
