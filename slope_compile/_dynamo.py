"""What the backend has to know about graphs that Dynamo hands over.

Private names used, tested on torch 2.11 and 2.13: ``node.meta["grapharg"]`` and its ``source`` (the chain of
attribute accesses by which Dynamo reached an input), ``node._dynamo_source`` and ``node.meta["tensor_dict"]``
(which AOTAutograd expects on every input of a graph from Dynamo), and
the running ``OutputGraph`` with its local and global scope,
from which the chain can be followed to the real module.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from typing import Any

from torch import Tensor, nn
from torch._dynamo.output_graph import OutputGraph
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

_COMPONENT = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
_PARAMETRIZED = re.compile(r"^(?P<layer>.*)\.parametrizations\.(?P<name>\w+)\.(original|\d+\..*)$")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an input of the graph comes from."""

    root: nn.Module | None
    """The outermost module on the way, None if the frame cannot be reached."""
    name: str
    """Qualified name inside ``root``: ``h.0.mlp.c_fc.weight``."""

    @property
    def layer(self) -> str:
        """Module path of the layer the tensor belongs to, through any parametrization."""
        match = _PARAMETRIZED.match(self.name)
        return match["layer"] if match else self.name.rpartition(".")[0]


def origin(placeholder: Node) -> Origin | None:
    """The origin of a graph input; None for inputs that are not attributes of a module."""
    source = getattr(placeholder.meta.get("grapharg"), "source", None)
    if source is None:
        return None
    text = source.name if isinstance(source.name, str) else source.name()
    components = _COMPONENT.findall(text)
    if not components:
        return None
    return Origin(_root_module(text), ".".join(components))


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


def _running() -> OutputGraph | None:
    """The OutputGraph that called the backend, found on the stack (Dynamo publishes it nowhere else)."""
    frame = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, OutputGraph):
            return owner
        frame = frame.f_back  # type: ignore[assignment]
    return None


def working_copy(module: GraphModule) -> GraphModule:
    """A copy whose graphs, those of higher-order bodies too, can be rewritten; tensors and submodules are shared.

    Dynamo goes on reading the placeholders of the graph it handed over, so that one must stay as it is.
    """
    graph = Graph()
    mapped: dict[Node, Node] = {}
    result = graph.graph_copy(module.graph, mapped)
    output = graph.output(result)
    output.meta = dict(module.graph.output_node().meta)
    for old, new in mapped.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copied = GraphModule(module, graph, class_name=type(module).__name__)
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
