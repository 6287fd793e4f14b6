"""One class for prepared layers that are alike, so that code compiled for one block serves the others.

``torch.nn.utils.parametrize`` makes a class for each module, with a property in the place of the weight.  Dynamo guards
on classes: of forty equal blocks that are compiled one by one, every one would be compiled anew.  A property needs the
weight's name and nothing else of its module, so layers of one class with the same weights parametrized can share.

The properties are our own: those of ``parametrize`` refer to the module that the class was made for.  They would keep
it alive, and ``parametrize.cached()`` would find that module's weight for every layer (private names used:
``_cache_enabled`` and ``_cache``).

When ``parametrize`` changes the class of one layer, that layer gets a class of its own first: the property is deleted
by ``remove_parametrizations``, and registering a parametrization on another tensor adds one.  Both functions have the
layer in a local variable ``module``, through which it is found (torch 2.11 to 2.13; tests fail when that changes).

``parametrize`` refuses to pickle, since its classes cannot be found by name.  A shared class can be made again from the
stock class and the names, so whole models go through ``torch.save`` and to other processes (private name used:
``_inject_new_class``).
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

_Classes = weakref.WeakValueDictionary[frozenset[str], type]
_shared: weakref.WeakKeyDictionary[type, _Classes] = weakref.WeakKeyDictionary()
"""Stock class -> names of the parametrized tensors -> the class of such layers, while there are any."""


class _Shared(type):
    """The metaclass of classes that several modules share.

    Setting or deleting an attribute first gives one module a class of its own, and then changes that class only.
    """

    def __delattr__(cls, name: str) -> None:
        delattr(_own_class(cls, name), name)

    def __setattr__(cls, name: str, value: Any) -> None:
        setattr(_own_class(cls, name), name, value)


def _own_class(cls: type, name: str) -> type:
    """Give the module whose class is about to be changed a class of its own, and return that class.

    The module is a local variable of the function two frames further up.
    """
    module = sys._getframe(2).f_locals.get("module")
    if not isinstance(module, nn.Module) or type(module) is not cls:
        raise RuntimeError(
            f"cannot change {name!r} of a class that layers prepared by sparsify_ share; change it before sparsify_"
        )
    unshare(module)
    return type(module)


def share(module: nn.Module) -> None:
    """Give a parametrized module the class of others like it."""
    own = type(module)
    if type(own) is not type or not parametrize.is_parametrized(module):
        return  # shared already, or of a class with rules of its own
    names = frozenset(name for name, value in vars(own).items() if isinstance(value, property))
    parametrizations = module.parametrizations
    assert isinstance(parametrizations, nn.ModuleDict)
    if names == set(parametrizations):
        module.__class__ = _shared_class(own, names)


def _shared_class(own: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """The shared class for a module whose own class is ``own``."""
    classes = _shared.setdefault(own.__bases__[0], weakref.WeakValueDictionary())
    found = classes.get(names)
    if found is None:
        pickling = {"__reduce_ex__": _reduce, "__getstate__": own.__bases__[0].__getstate__}
        contents = _contents(own) | {name: _property(name) for name in names} | pickling
        found = classes[names] = _Shared(own.__name__, own.__bases__, contents)
    return found


def _reduce(module: nn.Module, protocol: int) -> tuple[Any, ...]:
    """How to pickle a module of a shared class."""
    shared = type(module)
    names = tuple(sorted(name for name, value in vars(shared).items() if isinstance(value, property)))
    return _blank, (shared.__bases__[0], names), module.__getstate__()


def _blank(stock: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """A module of the class that modules of a stock class with these weights share; it has no contents yet."""
    module = stock.__new__(stock)
    parametrize._inject_new_class(module)
    adapt(module)
    module.__class__ = _shared_class(type(module), frozenset(names))
    return module


def adapt(module: nn.Module) -> None:
    """Adjust ``parametrize``'s class (repr, forward) on the module's own class."""
    own: Any = type(module)
    own.__repr__ = nn.Module.__repr__  # shows the children, which the stock class may hide (Conv1D does)
    if own.forward is nn.Linear.forward:
        own.forward = linear_forward


def linear_forward(layer: nn.Linear, input: Tensor) -> Tensor:
    """``nn.Linear.forward`` in a file that Dynamo may start a graph in: it never does in PyTorch's own modules.

    So a prepared layer is in a graph also where a graph break leaves the container around it to Python, be it
    ``nn.Sequential`` or ``nn.TransformerEncoderLayer``.
    """
    return F.linear(input, layer.weight, layer.bias)


def unshare(module: nn.Module) -> None:
    """Give a parametrized module a class of its own, for something to change: a deep copy shares the original's too."""
    if parametrize.is_parametrized(module):
        shared = type(module)
        module.__class__ = type(shared.__name__, shared.__bases__, _contents(shared))


def _contents(cls: type) -> dict[str, Any]:
    return {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}


def _property(name: str) -> property:
    """What ``parametrize`` puts in the place of a tensor, for any module that has it."""

    def get(module: nn.Module) -> Tensor:
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            raise RuntimeError("torch.jit.script: a sparse weight is computed in Python; densify_ the model first")
        parametrizations: Any = module.parametrizations
        if not parametrize._cache_enabled:
            computed: Tensor = parametrizations[name]()
            return computed
        key = (id(module), name)
        if parametrize._cache.get(key) is None:
            parametrize._cache[key] = parametrizations[name]()
        found = parametrize._cache[key]
        assert found is not None
        return found

    def set_original(module: nn.Module, value: Tensor) -> None:
        parametrizations: Any = module.parametrizations
        parametrizations[name].right_inverse(value)

    return property(get, set_original)
