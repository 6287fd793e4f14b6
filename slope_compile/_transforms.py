"""Whether forward-mode differentiation or a transform of ``torch.func`` is under way.

Private names used: ``torch.autograd.forward_ad._current_level``, ``torch._C._are_functorch_transforms_active``, and the
attribute ``_dynamo_marked_constant``.
"""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def inside_transform() -> bool:
    """Whether something is under way for which the operators have no rules; their definition consists of some that do.

    Autograd would drop the tangent of forward mode without a word.
    """
    return _inside_func() or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)


def _inside_func() -> bool:
    return torch._C._are_functorch_transforms_active()


# As torch.compiler.assume_constant_result, which imports Dynamo: else the call stays in every graph, for nobody.
# Dynamo guards on the transforms that are under way when a graph begins, and knows of those inside.
_inside_func._dynamo_marked_constant = True  # type: ignore[attr-defined]
