"""The ``torch.compile`` backend ``"slope"``.

Found by name through the ``torch_dynamo_backends`` entry point; ``torch.compile(model, backend=slope_compile.slope)``
does the same without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule, Node

from slope_compile._dynamo import avoid_dangling_guards, has_transforms, origin, tracing, working_copy
from slope_compile._inductor import compile_graph
from slope_compile.columns import StoredColumns, before_training_forward
from slope_compile.dense_weights import DynamoWeights
from slope_compile.errors import ConfigError
from slope_compile.kernels import ops
from slope_compile.log import log
from slope_compile.options import BackendOptions, parse_options
from slope_compile.outside import without_product
from slope_compile.passes.context import Context
from slope_compile.passes.pipeline import run_passes
from slope_compile.pattern import Pattern
from slope_compile.report import Decision, Reason, Report


def slope(
    graph_module: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Rewrite a graph from Dynamo to sparse products and hand it to Inductor.

    Linears of a prepared model (``sparsify_``) become products with their compressed weights; linears of a dense model
    get their weights pruned in place at first compilation and become products with weights that are compressed on the
    fly; in inference with few tokens they stay dense products, of the pruned weights.  A graph without linears is
    compiled as it is.

    Args:
        graph_module, example_inputs: as Dynamo passes them.
        mode, options: as given to ``torch.compile``; see :func:`slope_compile.options.parse_options`.

    Raises:
        ConfigError: unknown or contradictory options (Dynamo shows it as the cause of a ``BackendCompilerFailed``).
    """
    avoid_dangling_guards()  # Dynamo makes the graph's guards after this returns
    parsed = parse_options(mode, options)
    graph_module = working_copy(graph_module)
    weights = DynamoWeights(graph_module, example_inputs, parsed.config)
    context = Context(parsed.config, weights, parsed.fusions, device=parsed.device)
    graph_module = run_passes(graph_module, context)
    _check_agreement(parsed, context.report)
    columns = _prepared_columns(context, weights)
    _log(context.report, len(weights.read))
    if has_transforms(graph_module):
        log.warning(
            "backend 'slope': a graph has transforms of torch.func in it; linears inside of them run dense, with "
            "prepared weights expanded; backward() gives the same gradients with 2:4 products"
        )
    if not len(context.report):
        _find_lone_weights(graph_module)
    inputs = [*example_inputs, *(get() for get in weights.extra)]
    graph_module.recompile()
    compiled = compile_graph(graph_module, inputs, parsed.compiler, parsed.patches)
    # Last: where compiling fails, the weights are as they were.
    weights.commit(prepared=any(decision.reason is Reason.PREPARED for decision in context.report))
    return _calling(compiled, weights, columns)


ColumnArguments = Callable[[Sequence[Any]], StoredColumns]
"""Arguments of the compiled graph -> the stored columns of one prepared weight among them."""


def _calling(
    compiled: Callable[..., Any], weights: DynamoWeights, columns: Sequence[ColumnArguments]
) -> Callable[..., Any]:
    """The compiled graph with its added inputs, after the column masks have been looked after."""
    extra, stored, read, states = weights.extra, weights.stored, weights.read, weights.states
    if not extra and not stored and not read and not columns:
        return compiled

    def call(*args: Any) -> Any:
        if not tracing(args):
            for pruned in read:
                pruned.before_call()
            for weight, state, path in states:
                state.before_call(weight, path)
            before_training_forward([*(find() for find in stored), *(find(args) for find in columns)])
        return compiled(*args, *(get() for get in extra))

    return call


def _prepared_columns(context: Context, weights: DynamoWeights) -> list[ColumnArguments]:
    """By position, not by tensor: Dynamo runs one compiled graph for all blocks of a model that are alike."""
    found = []
    positions = {placeholder: position for position, placeholder in enumerate(weights.placeholders)}
    for site in context.columns:
        nodes = (site.values, site.pattern, site.column_mask, site.column_age)
        if any(node.op == "get_attr" for node in nodes):
            continue  # frozen: nobody trains it
        if any(node not in weights.inputs for node in nodes):
            log.warning("column mask of %s is not an input of the graph and will not be refreshed", site.values)
            continue
        found.append(_column_arguments([positions[node] for node in nodes], site.nm, site.interval))
    return found


def _column_arguments(positions: Sequence[int], nm: Pattern, interval: int) -> ColumnArguments:
    def find(args: Sequence[Any]) -> StoredColumns:
        values, pattern, column_mask, column_age = (args[position] for position in positions)
        return StoredColumns(values, values.detach, pattern, column_mask, column_age, nm, interval)

    return find


def _check_agreement(options: BackendOptions, report: Report) -> None:
    """Options that a prepared model has already settled otherwise are a contradiction, not a wish to ignore."""
    prepared = [d for d in report if d.reason is Reason.PREPARED]
    if not prepared:
        return
    for field in ("pattern", "backward"):
        wanted = getattr(options.config, field)
        other = next((d for d in prepared if not _agrees(d, field, wanted)), None)
        if field in options.given and not options.config.overrides and other is not None:
            raise ConfigError(
                f"option {field!r} is {wanted!r}, but {other.weight!r} was prepared by sparsify_ with "
                f"{getattr(other, field)!r}; set it in the SlopeConfig given to sparsify_ and leave it out here"
            )


def _agrees(decision: Decision, field: str, wanted: object) -> bool:
    """A layer whose rows cannot be grouped is exact under ``backward="double_pruned"`` too."""
    found = getattr(decision, field)
    ungrouped = field == "backward" and found == "exact" and decision.shape[0] % Pattern.parse(decision.pattern).group
    return found == wanted or bool(ungrouped)


def _find_lone_weights(graph_module: GraphModule) -> None:
    """A graph without linears has no use for a prepared weight, unless Dynamo left its product to Python."""
    for node in graph_module.graph.find_nodes(op="call_function", target=ops.expand):
        source = node.args[0]
        found = origin(source) if isinstance(source, Node) else None
        without_product(str(source) if found is None else found.layer)


def _log(report: Report, read: int) -> None:
    frozen = [d for d in report if d.reason is Reason.FROZEN]
    if frozen and not report.sparse:
        log.warning(
            "backend 'slope': %d linears run dense, since Inductor's freezing has made constants of their weights; "
            "sparsify_ the model first, or compile it without freezing",
            len(frozen),
        )
    if len(report):
        log.info("%d of %d linears of the graph are sparse", len(report.sparse), len(report))
        log.debug("decisions:\n%s", report)
    if read:
        log.info(
            "%d of them are dense products of a pruned weight: without gradients and with few tokens, compressing it "
            "at every call takes longer; sparsify_ stores it compressed",
            read,
        )
