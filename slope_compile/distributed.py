"""Wrappers for training on several processes, and what they require of a model.

``DistributedDataParallel`` records the parameters and their shapes when it wraps a model, so a model has to be
converted before.  In each backward it waits for the gradients of all parameters, but adapters have gradients only while
they are on.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable

import torch.distributed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def without_wrapper(module: nn.Module) -> nn.Module:
    """The model inside a ``DistributedDataParallel``, or the module itself."""
    if isinstance(module, DistributedDataParallel):
        inner: nn.Module = module.module
        return inner
    return module


def data_parallel(parameters: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """The live ``DistributedDataParallel`` wrappers that reduce gradients of any of these parameters.

    A model has no reference to its wrapper, so wrappers are looked for among all live objects.  Without a process group
    there are none.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    wanted = {id(parameter) for parameter in parameters}
    # type() rather than isinstance(), which would run __class__ of lazy proxies.
    wrappers = [o for o in gc.get_objects() if issubclass(type(o), DistributedDataParallel)]
    return [wrapper for wrapper in wrappers if any(id(p) in wanted for p in wrapper.parameters())]


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to a module or to a part of it."""
    # By name: importing FSDP takes its time.
    return any(base.__name__ == "FSDPModule" for module in model.modules() for base in type(module).__mro__)


def adapters_will_fail(wrapper: DistributedDataParallel) -> str | None:
    """Why a model whose adapters come on later cannot train in this wrapper, with the way out; None if it can."""
    if wrapper.static_graph:
        return (
            "DistributedDataParallel(static_graph=True) ends the run with an error when the adapters come on; wrap the "
            "model with find_unused_parameters=True instead"
        )
    if not wrapper.find_unused_parameters:
        return (
            "DistributedDataParallel waits for gradients of the adapters, which are off; wrap the model with "
            "find_unused_parameters=True"
        )
    return None
