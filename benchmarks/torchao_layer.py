"""torchao's 2:4 training layer, where its last release with one (0.18) is installed.

Its weight stays dense; every forward pass prunes it by a transposable mask and compresses it twice.
"""

from __future__ import annotations

import copy
import importlib

from torch import nn


def converted(model: nn.Module) -> nn.Module:
    """A copy of a dense model, not yet compiled, whose linears are torchao's.

    Raises:
        ImportError: torchao is missing, or is a release without sparsity.
    """
    training = importlib.import_module("torchao.sparsity.training")
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._compiled_call_impl = None
    linears = {name: training.SemiSparseLinear for name, module in twin.named_modules() if type(module) is nn.Linear}
    training.swap_linear_with_semi_sparse_linear(twin, linears)
    return twin
