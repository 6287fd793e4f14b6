"""Exported programs: weights behind a graph signature, and how a program is put together again.

Only names that ``torch.export`` makes public are used (``ExportedProgram``, ``graph_signature``), but what its verifier
accepts is not specified: all inputs that are state come before the user's inputs, and each has one spec, in order.
Tested on torch 2.11 and 2.13.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputKind, InputSpec, TensorArgument
from torch.fx import GraphModule, Node

from slope_compile.config import LayerConfig
from slope_compile.graph_state import COLUMN_MASK, PATTERN, VALUES, compressed_state
from slope_compile.passes.graph import give_value
from slope_compile.passes.weights import CompressedWeight
from slope_compile.report import Decision
from slope_compile.rules import is_router, layer_path


class ExportedWeights:
    """Weights of an exported program, lifted to inputs; implements ``passes.weights.WeightStore``.

    ``module`` is a copy of the program's graph module; specs and state are collected here and put together by
    :func:`rebuild`.
    """

    def __init__(self, program: ExportedProgram, module: GraphModule) -> None:
        self.module = module
        self.state = dict(program.state_dict)
        placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
        specs = program.graph_signature.input_specs
        self.specs: dict[Node, InputSpec] = dict(zip(placeholders, copy.deepcopy(specs), strict=True))

    def tensor(self, node: Node) -> Tensor | None:
        spec = self.specs.get(node)
        if spec is None or spec.kind is not InputKind.PARAMETER or spec.target is None:
            return None
        value = self.state[spec.target]
        return value if isinstance(value, Tensor) else None

    def path(self, node: Node) -> str:
        spec = self.specs.get(node)
        target = spec.target if spec is not None and spec.target else str(node)
        return layer_path(target) or target

    def ruling(self, node: Node) -> Decision | None:
        return None

    def owned(self, node: Node) -> bool:
        return True

    def router(self, node: Node) -> bool:
        return is_router(self.path(node), self.state)

    def pruned(self, node: Node, layer: LayerConfig, transposed: bool) -> bool:
        return False  # the dense weight goes away

    def compressed(self, node: Node, layer: LayerConfig, transposed: bool, before: Node) -> CompressedWeight:
        target = self.specs[node].target
        assert target is not None
        nodes, last = {}, node
        for suffix, tensor in compressed_state(
            self.state[target], layer, transposed, self.path(node)
        ).items():
            with self.module.graph.inserting_after(last):
                last = self.module.graph.placeholder(f"{node.name}{suffix}")
            give_value(last, tensor, like=node)
            parameter = isinstance(tensor, nn.Parameter)
            self.specs[last] = InputSpec(
                kind=InputKind.PARAMETER if parameter else InputKind.BUFFER,
                arg=TensorArgument(name=last.name),
                target=target + suffix,
                persistent=None if parameter else True,
            )
            self.state[target + suffix] = tensor
            nodes[suffix] = last
        return CompressedWeight(nodes[VALUES], nodes[PATTERN], nodes.get(COLUMN_MASK))


def rebuild(program: ExportedProgram, module: GraphModule, weights: ExportedWeights) -> ExportedProgram:
    """The program with the rewritten graph; dense weights that nothing reads any more are dropped.

    What is left of the program's state is copied (tied tensors stay tied): the result is there to be trained, and an
    exported program shares its state with the model that it came from.
    """
    for node in [n for n in module.graph.nodes if n.op == "placeholder"]:
        spec = weights.specs[node]
        replaced = spec.target is not None and f"{spec.target}{VALUES}" in weights.state
        if replaced and not node.users:
            module.graph.erase_node(node)
            assert spec.target is not None
            del weights.state[spec.target]
    memo: dict[int, object] = {}
    state = {n: copy.deepcopy(t, memo) if n in program.state_dict else t for n, t in weights.state.items()}
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    for node in placeholders:
        weights.specs[node].arg.name = node.name
    outputs = copy.deepcopy(program.graph_signature.output_specs)
    returned = module.graph.output_node().args[0]
    for spec, node in zip(outputs, returned, strict=True):  # type: ignore[arg-type]
        if isinstance(node, Node) and hasattr(spec.arg, "name"):
            spec.arg.name = node.name
    module.recompile()
    result = ExportedProgram(
        root=module,
        graph=module.graph,
        graph_signature=ExportGraphSignature([weights.specs[n] for n in placeholders], outputs),
        state_dict=state,
        range_constraints=copy.deepcopy(program.range_constraints),
        module_call_graph=list(program.module_call_graph),
        example_inputs=program.example_inputs,
        constants=program.constants,
        verifiers=[program.verifier],
    )
    return result
