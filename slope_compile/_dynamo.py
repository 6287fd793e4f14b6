"""Everything that depends on how Dynamo builds the graphs it passes to the backend.

Private names used, tested on torch 2.11 and 2.13: ``node.meta["grapharg"]`` and its ``source`` (the chain of
attribute accesses by which Dynamo reached an input), ``node._dynamo_source`` and ``node.meta["tensor_dict"]``
(which AOTAutograd expects on every input of a graph from Dynamo), the running ``OutputGraph`` with its local and
global scope, from which the chain can be followed to the real module, ``install_guard`` with ``GuardBuilder.ID_MATCH``,
``_LazyGraphModule`` (as Dynamo's own graphs are),
``OptimizedModule`` and ``Module._compiled_call_impl`` (what was handed to ``torch.compile``), the code objects of
``OutputGraph.call_user_compiler`` and ``Module._call_impl`` (by which frames on the stack are recognised),
``_grad_increment_nesting`` and ``_vmap_increment_nesting`` (with which transforms of ``torch.func`` begin), and
``use_recursive_dict_tags_for_guards``, ``recompile_limit`` and ``accumulated_recompile_limit`` of its configuration.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from types import CodeType, FrameType
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from torch._C._functorch import _grad_increment_nesting, _vmap_increment_nesting
from torch._dynamo.eval_frame import OptimizedModule
from torch._dynamo.guards import GuardBuilder, install_guard
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.source import LocalSource
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from slope_compile.distributed import without_wrapper
from slope_compile.rules import layer_path, plain_path

_UNLIMITED = 1 << 30
_COMPONENT = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an input of the graph comes from."""

    root: nn.Module | None
    """The outermost module on the way, None if the frame cannot be reached."""
    name: str
    """Qualified name inside ``root``: ``h.0.mlp.c_fc.weight``."""

    @property
    def layer(self) -> str:
        """Path of the layer the tensor belongs to."""
        return layer_path(self.name)


def avoid_dangling_guards() -> None:
    """Switch off an optimization of guards that makes torch 2.11 crash, in the whole process.

    Guards remember the dicts of a model's modules.  When one of those has changed (a parametrization came or went, a
    module went into eval mode) and the guards are dropped later, Dynamo keeps their address, and the next change of a
    dict writes into memory that is no longer theirs: the process aborts, somewhere else.  pytorch#183753 is the fix,
    and since 2.12 the optimization is off (pytorch#181873); without it, checking guards takes a little longer.
    """
    if torch.__version__ < "2.12":
        torch._dynamo.config.use_recursive_dict_tags_for_guards = False


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that was given to ``torch.compile``, or the model itself if it is not compiled."""
    return model._orig_mod if isinstance(model, OptimizedModule) else model


def unlimited_recompiles() -> AbstractContextManager[None]:
    """A context in which Dynamo compiles a function as often as its arguments ask for it."""
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(
        recompile_limit=_UNLIMITED, accumulated_recompile_limit=_UNLIMITED
    )
    return patched


def origin(placeholder: Node) -> Origin | None:
    """The origin of a graph input; None for inputs that are not attributes of a module."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    if source is None:
        return None
    text = source.name if isinstance(source.name, str) else source.name()
    components = _COMPONENT.findall(text)
    if not components:
        return None
    root = _root_module(text)
    model = None if root is None else without_wrapper(root)
    if model is not root:
        components = components[1:]
    return Origin(model, plain_path(".".join(components)))


def _root_module(text: str) -> nn.Module | None:
    """Follow ``L['self'].a._modules['b']...`` from the frame being compiled to the first module on the way."""
    graph = _running()
    start = re.match(r"([LG])\['([^']+)'\]", text)
    if graph is None or start is None:
        return None
    scope = graph.local_scope if start[1] == "L" else graph.global_scope
    value: Any = scope.get(start[2])
    rest = text[start.end() :]
    while not isinstance(value, nn.Module):
        step = re.match(r"\.(\w+)|\['([^']+)'\]|\[(\d+)\]", rest)
        if value is None or step is None:
            return None
        try:
            value = getattr(value, step[1]) if step[1] else value[step[2] if step[2] else int(step[3])]
        except (AttributeError, KeyError, IndexError, TypeError):
            return None
        rest = rest[step.end() :]
    return value


def model_of(root: nn.Module) -> tuple[nn.Module, str]:
    """The model that a module belongs to which Dynamo compiles on its own, and the module's path in it.

    A graph break inside a block, or compiling block by block, leaves Dynamo with one block at a time; the rest of the
    model runs around it, so it is found on the stack:

    1. what was handed to ``torch.compile``, if the module is part of it;
    2. if that is itself a numbered block of something larger (``layers.3``), the outermost such model.

    A wrapper around a whole model (``wrapper.model``) does not count: paths, and with them random masks, are those that
    ``sparsify_`` finds in the model.
    """
    compiled: nn.Module | None = None
    around: list[nn.Module] = []
    for owner in _owners(_CALLS):
        if isinstance(owner, nn.Module):
            inner = without_wrapper(uncompiled(owner))
            if compiled is None and (isinstance(owner, OptimizedModule) or owner._compiled_call_impl is not None):
                compiled = inner
            around.append(inner)
    model = compiled if compiled is not None and _path(compiled, root) is not None else root
    for outer in reversed(around):
        if any(part.isdecimal() for part in (_path(outer, model) or "").split(".")):
            model = outer
            break
    return model, _path(model, root) or ""


def _path(model: nn.Module, module: nn.Module) -> str | None:
    return next((plain_path(path) for path, found in model.named_modules() if found is module), None)


def guard_parameter(placeholder: Node) -> None:
    """Have Dynamo check that the parameter behind an input is this very one, before it reuses the compiled graph.

    Dynamo reuses one compiled graph for every module with the same code and shapes: blocks of a model, models of a
    class.  That is wrong if the graph depends on something about this one parameter.
    """
    source = _source(placeholder)
    if source is not None:
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def guard_module(placeholder: Node) -> None:
    """Have Dynamo check the module through which an input was reached, where that is an argument of the frame.

    Dynamo counts recompilations for each guarded module.  So the blocks of a deep model that are compiled one by one
    have a limit each, and do not use up a common one (after which Dynamo would leave the rest eager).
    """
    source, graph = _source(placeholder), _running()
    while getattr(source, "base", None) is not None:
        source = source.base
    local = graph.local_scope.get(source.local_name) if graph is not None and isinstance(source, LocalSource) else None
    if isinstance(local, nn.Module):
        install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def _source(placeholder: Node) -> Any:
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    return source if TracingContext.try_get() is not None else None


def _running() -> OutputGraph | None:
    """The OutputGraph that called the backend, found on the stack (Dynamo publishes it nowhere else)."""
    return next((owner for owner in _owners(_COMPILE) if isinstance(owner, OutputGraph)), None)


_CALLS = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)
"""Code of the functions that run at every call of a module."""
_COMPILE = (OutputGraph.call_user_compiler.__code__, OutputGraph._call_user_compiler.__code__)


def _owners(codes: tuple[CodeType, ...]) -> Iterator[Any]:
    """``self`` in the frames that run one of these functions, from here outwards.

    Other frames are not looked into: up to Python 3.12 that leaves a copy of all their variables behind, and so keeps
    alive what a caller deletes later on.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code in codes:
            yield frame.f_locals["self"]
        frame = frame.f_back


def working_copy(module: GraphModule) -> GraphModule:
    """A copy whose graphs, those of higher-order bodies too, can be rewritten; tensors and submodules are shared.

    Dynamo goes on reading the placeholders of the graph it handed over, so that one must stay as it is.  The copy's
    Python code is generated on demand: passes and compilers read the graph, and writing out the code
    after each pass took twice as long as the passes.
    """
    graph = Graph()
    mapped: dict[Node, Node] = {}
    result = graph.graph_copy(module.graph, mapped)
    output = graph.output(result)
    output.meta = dict(module.graph.output_node().meta)
    for old, new in mapped.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied = _LazyGraphModule(module, graph, class_name=type(module).__name__)
    copied.meta = dict(module.meta)
    for name in ("_param_name_to_source", "_backend_id"):
        if hasattr(module, name):
            setattr(copied, name, getattr(module, name))
    for name, child in module.named_children():
        if isinstance(child, GraphModule) and hasattr(copied, name):
            setattr(copied, name, working_copy(child))
    return copied


def mark_added_input(placeholder: Node) -> None:
    """Give an input that we add to a Dynamo graph what AOTAutograd expects: no source, and an address that stays."""
    placeholder._dynamo_source = None
    placeholder.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}


def is_real(value: object) -> bool:
    """Whether an example input is a tensor with data."""
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta


def tracing(arguments: Sequence[Any]) -> bool:
    """Whether a compiled graph is called for its shapes only.

    Where gradients are reduced in several buckets, Dynamo cuts a graph in pieces, and calls each to compile the next.
    """
    return any(isinstance(argument, FakeTensor) for argument in arguments)


def parameter_behind(placeholder: Node, given: Any) -> Any:
    """The parameter that an input of the graph will be, where Dynamo gives its shape only; else what it gives.

    It does so for the pieces that it compiles one after the other (see :func:`tracing`).
    """
    if not isinstance(given, FakeTensor):
        return given
    example = getattr(placeholder.meta.get("grapharg"), "example", None)
    return example if isinstance(example, nn.Parameter) else given


def has_transforms(module: GraphModule) -> bool:
    """Whether part of a graph is inside of a transform of ``torch.func``, where a weight is no parameter any more."""
    begins = (_grad_increment_nesting, _vmap_increment_nesting)
    return any(module.graph.find_nodes(op="call_function", target=begin) for begin in begins)
