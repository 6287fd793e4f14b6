"""Way in C: ``transform`` rewrites exported programs and FX GraphModules; no model object is needed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from typing import overload

from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from slope_compile._export import ExportedWeights, rebuild
from slope_compile.config import LayerConfig, SlopeConfig, checked_config
from slope_compile.cost import Device
from slope_compile.errors import ConversionError
from slope_compile.graph_state import COLUMN_MASK, PATTERN, VALUES, compressed_state
from slope_compile.log import log
from slope_compile.options import EXPORT_FUSIONS, parse_device, parse_fusions
from slope_compile.passes.context import Context
from slope_compile.passes.graph import attribute, give_value
from slope_compile.passes.pipeline import run_passes
from slope_compile.passes.weights import CompressedWeight
from slope_compile.report import Decision, Reason, Report
from slope_compile.rules import is_router, layer_path


@overload
def transform(
    program: ExportedProgram,
    config: SlopeConfig | None = None,
    *,
    fusions: str | Iterable[str] = EXPORT_FUSIONS,
    device: Device | str | None = None,
) -> ExportedProgram: ...
@overload
def transform(
    program: GraphModule,
    config: SlopeConfig | None = None,
    *,
    fusions: str | Iterable[str] = EXPORT_FUSIONS,
    device: Device | str | None = None,
) -> GraphModule: ...
def transform(
    program: ExportedProgram | GraphModule,
    config: SlopeConfig | None = None,
    *,
    fusions: str | Iterable[str] = EXPORT_FUSIONS,
    device: Device | str | None = None,
) -> ExportedProgram | GraphModule:
    """Make the linears of a graph sparse, with compressed state in the result.

    The argument is not changed, and the result shares no parameter with it.  The result's parameters are the
    compressed values (names: ``graph_state``); an ExportedProgram can be saved, loaded and run with ``slope_compile``
    imported, and is trainable through ``.module()``; a GraphModule is trainable as it is.  Adapters (``adapter_rank``)
    are part of the state and off; :func:`~slope_compile.schedule.set_adapters` or an ``AdapterSchedule`` inserts their
    nodes in a GraphModule.

    With ``backward="double_pruned"`` and a column mask that is stored (``column_refresh`` a number or "never"), the
    mask is refreshed by :func:`~slope_compile.columns.refresh_columns_`: a graph does not count steps.

    ``fusions`` names those that are to run, of ``passes.pipeline.FUSIONS``.  With a ``device`` of the
    cost model (or the name of one in ``cost.DATA_SHEETS``) linears whose rewrite is predicted slower on it stay dense.

    Returns:
        A program of the same type.  ``result.meta["slope_report"]`` (of an ExportedProgram:
        ``result.graph_module.meta[...]``) holds the :class:`~slope_compile.report.Report`.

    Raises:
        ConversionError: the graph has been transformed already, or has no eligible linear.
        ConfigError: no such fusion, no such device, or ``config`` is no SlopeConfig.
        TypeError: neither an ExportedProgram nor a GraphModule.
    """
    config, enabled = checked_config("transform", config), parse_fusions("transform: fusions", fusions)
    peaks = parse_device("transform: device", device)
    if isinstance(program, ExportedProgram):
        module = _copy(program.graph_module)
        exported = ExportedWeights(program, module)
        report = _run(module, Context(config, exported, enabled, device=peaks))
        result = rebuild(program, module, exported)
        result.graph_module.meta["slope_report"] = report
        return result
    if isinstance(program, GraphModule):
        module = _copy(program)
        attributes = AttributeWeights(module)
        report = _run(module, Context(config, attributes, enabled, device=peaks))
        attributes.remove_replaced()
        module.recompile()
        module.meta["slope_report"] = report
        return module
    raise TypeError(f"transform: expected an ExportedProgram or a GraphModule, got {type(program).__name__}")


def _copy(module: GraphModule) -> GraphModule:
    with warnings.catch_warnings():
        # torch 2.13 warns about its own pytree specs while it copies them.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        return copy.deepcopy(module)


def _run(module: GraphModule, context: Context) -> Report:
    run_passes(module, context)
    report = context.report
    if any(d.reason is Reason.ALREADY_SPARSE for d in report):
        raise ConversionError("transform: the graph has been transformed already; transform the original instead")
    if not report.sparse:
        raise ConversionError(
            "transform: no linear of the graph is eligible; change include, exclude, first_dense, heads_dense or "
            f"pattern in the SlopeConfig, or leave the device out:\n{report}"
        )
    if any(context.config.layer(d.weight).interval and d.backward == "double_pruned" for d in report.sparse):
        log.info("transform: call refresh_columns_(module) every column_refresh steps while training the result")
    log.info("transform: %d of %d linears are sparse", len(report.sparse), len(report))
    return report


class AttributeWeights:
    """Weights that are attributes of a GraphModule; implements ``passes.weights.WeightStore``."""

    def __init__(self, module: GraphModule) -> None:
        self.module = module
        self.replaced: list[str] = []

    def tensor(self, node: Node) -> Tensor | None:
        value = attribute(self.module, str(node.target)) if node.op == "get_attr" else None
        return value if isinstance(value, nn.Parameter) else None

    def path(self, node: Node) -> str:
        target = str(node.target)
        return layer_path(target) or target

    def ruling(self, node: Node) -> Decision | None:
        return None

    def owned(self, node: Node) -> bool:
        return True

    def router(self, node: Node) -> bool:
        return is_router(self.path(node), (name for name, _ in self.module.named_parameters()))

    def pruned(self, node: Node, layer: LayerConfig, transposed: bool) -> bool:
        return False  # the dense weight goes away

    def compressed(self, node: Node, layer: LayerConfig, transposed: bool, before: Node) -> CompressedWeight:
        target = str(node.target)
        weight = attribute(self.module, target)
        owner_path, _, name = target.rpartition(".")
        owner = attribute(self.module, owner_path) if owner_path else self.module
        nodes = {}
        for suffix, tensor in compressed_state(weight, layer, transposed, self.path(node)).items():
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(name + suffix, tensor)
            else:
                owner.register_buffer(name + suffix, tensor)
            if suffix in (VALUES, PATTERN, COLUMN_MASK):
                with self.module.graph.inserting_before(before):
                    nodes[suffix] = self.module.graph.get_attr(target + suffix)
                give_value(nodes[suffix], tensor, like=node)
        self.replaced.append(target)
        return CompressedWeight(nodes[VALUES], nodes[PATTERN], nodes.get(COLUMN_MASK))

    def remove_replaced(self) -> None:
        """Delete the dense weights that nothing reads any more."""
        for node in list(self.module.graph.nodes):
            if node.op == "get_attr" and node.target in self.replaced and not node.users:
                self.module.graph.erase_node(node)
        read = {str(n.target) for n in self.module.graph.nodes if n.op == "get_attr"}
        for target in self.replaced:
            if target not in read:
                owner_path, _, name = target.rpartition(".")
                delattr(attribute(self.module, owner_path) if owner_path else self.module, name)
