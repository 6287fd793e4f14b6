"""The parameters that a module itself holds, by name and in their order.

Private name used, tested on torch 2.11 and 2.13: ``nn.Module._parameters``.  ``named_parameters`` leaves out what a
module holds under a second name, and cannot change the order.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def holds_parameter(module: nn.Module, name: str) -> bool:
    """Whether the module has a parameter of that name itself, and it is not None."""
    return module._parameters.get(name) is not None


def put_first(module: nn.Module, names: Iterable[str]) -> None:
    """Bring the parameters of these names, where the module has them, in front of its others."""
    first = [name for name in names if name in module._parameters]
    for name in [*first, *(name for name in module._parameters if name not in first)]:
        module._parameters[name] = module._parameters.pop(name)
