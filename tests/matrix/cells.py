"""The columns of the coverage table: ways to run a model, and what is asserted of each.

Every cell asserts, with the reference being the dense model under hand-made masks (``tests/masked.py``):

1. each eligible linear is sparse in the graphs that were compiled, and counted
2. each other one has a decision with the reason that the row expects, and no product with a dense weight is left
   that has no decision
3. outputs, and in training every gradient, are the reference's to rounding
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import slope_compile as slope
from masked import (
    assert_same_gradients,
    every_entry,
    masked_copy,
    masks_of,
    picked_now,
    unpacked,
)
from matrix.models import Model
from recording import Compilation, Recording, compiled_way, record
from slope_compile.kernels import ops
from slope_compile.report import Decision, Reason, Report
from tolerances import assert_same


@dataclasses.dataclass(frozen=True)
class Cell:
    """What was counted in a cell whose assertions hold."""

    sparse: int
    """Linears that are sparse products in the graphs that were compiled."""
    eligible: int
    """Those that ought to be; more than ``sparse`` only in a release of torch that leaves some to Python."""
    graphs: int
    """Graphs with linears that were compiled, over all calls."""
    reasons: dict[str, int]
    """Reason -> number of linears that stay dense for it."""


def fill(model: Model, mode: str, compiler: str = "aot_eager") -> Cell:
    """Run a cell.

    Raises:
        AssertionError: an assertion of the module docstring does not hold.
    """
    torch._dynamo.reset()
    try:
        with pytest.MonkeyPatch.context() as patch:
            return MODES[mode](model, record(patch), compiler)
    finally:
        torch._dynamo.reset()


# --- running ---------------------------------------------------------------------------------------------------------


def dense_model(model: Model, dtype: torch.dtype | None = None) -> nn.Module:
    return model.make().to(dtype or model.dtype).train()


def inputs_of(model: Model, batch: int = 2, sequence: int = 7, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    given = model.inputs(batch, sequence)
    return {k: v.to(dtype or model.dtype) if v.is_floating_point() else v for k, v in given.items()}


def run(module: Callable[..., Any], inputs: Mapping[str, Tensor], backward: bool = True) -> Tensor:
    """Forward, and backward of a random sum of the outputs, the same for one shape."""
    returned = module(**inputs)
    result = returned if isinstance(returned, Tensor) else returned.logits
    if backward:
        weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (result * weights.to(result.dtype)).sum().backward()
    return result.detach()


def in_eval_mode(reference: nn.Module) -> nn.Module:
    """As it is; PyTorch's encoder stays in training mode (it has no dropout), as its fast path reads attributes of
    ``nn.MultiheadAttention`` that the reference has not."""
    return reference.train(not hasattr(reference, "config"))


def compare(model: nn.Module, compiled: Callable[..., Any], reference: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """One training step: outputs and all gradients."""
    result, expected = run(compiled, inputs), run(reference, inputs)
    assert_same(result, expected, "output")
    assert_same_gradients(model, reference)


# --- counting --------------------------------------------------------------------------------------------------------


def weight_paths(dense: nn.Module) -> set[str]:
    """Every matrix that a linear could have, found without the library: by classes and names of parameters."""
    paths = set()
    for path, module in dense.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or isinstance(module, nn.Embedding | nn.modules.conv._ConvNd):
                continue
            if isinstance(module, nn.MultiheadAttention) or "Experts" in type(module).__name__:
                paths.add(f"{path}.{name}")
            elif name == "weight":
                paths.add(path)
    return paths


def count(
    dense: nn.Module, decisions: list[Decision], expected: Mapping[str, Reason], parts: int = 1, left: str = "(?!)"
) -> Cell:
    """Assert the first two points for a list of decisions; eligible linears that ``left`` matches may be in no graph.

    Where there are several graphs, those that stay dense may be in none: a head behind the last break, for example.
    """
    alike = _names_of_one_weight(dense)
    eligible = weight_paths(dense) - set(expected)
    sparse = {d.weight for d in decisions if d.sparse}
    missing = {path for path in eligible - sparse if not re.fullmatch(left, path)}
    assert not missing, f"missing {missing}"
    assert sparse <= eligible, f"not expected {sparse - eligible}"
    found: dict[str, Reason] = {}
    for decision in decisions:
        if not decision.sparse:
            path = next((p for p in alike.get(decision.weight, [decision.weight]) if p in expected), decision.weight)
            found[path] = decision.reason
    if parts > 1:  # a function that is compiled by itself gets the experts' tensor as an argument, which has no path
        known = weight_paths(dense)
        found = {path: r for path, r in found.items() if r is not Reason.EXPERTS or path in known}
    wanted = {path: reason for path, reason in expected.items() if parts == 1 or path in found}
    assert found == wanted, f"dense: {found}, expected {wanted}"
    reasons: dict[str, int] = {}
    for reason in expected.values():
        reasons[reason.value] = reasons.get(reason.value, 0) + 1
    return Cell(len(sparse), len(eligible), 0, reasons)


def count_graphs(
    model: Model, dense: nn.Module, module: nn.Module, recording: Recording, inner: str = "", mode: str = ""
) -> Cell:
    """Of compiled graphs: as many dense products as decisions for them, and each linear in some graph that ran."""
    graphs = [one for one in recording if len(one.report)]
    for one in graphs:
        assert one.sparse >= len(one.report.sparse) > 0 or not one.report.sparse
        named = [d for d in one.report.dense if d.reason is not Reason.EXPERTS]
        assert one.dense_linears == len(named), "a linear without a decision"
    decisions = [d for one in graphs for d in _served(one, module, _in_the_model(one.report, dense, inner))]
    elsewhere = {d.weight: model.compiled[d.weight] for d in decisions if d.weight in model.compiled}
    decisions = [dataclasses.replace(d, weight=elsewhere.get(d.weight, (d.weight,))[0]) for d in decisions]
    expected = {**model.dense, **dict(elsewhere.values())}
    left = model.left.get(mode, "(?!)") if torch.__version__ < "2.12" else "(?!)"
    return dataclasses.replace(count(dense, decisions, expected, len(graphs), left), graphs=len(graphs))


def _served(one: Compilation, module: nn.Module, found: list[Decision]) -> list[Decision]:
    """The decisions of a graph, and again for each prepared weight that it was called with in place of the first."""
    layers = {id(p): _layer(name) for name, p in module.named_parameters() if name.endswith(".original")}
    decisions = {decision.weight: decision for decision in found}
    for call in one.calls:
        for first, now in zip(one.inputs, call, strict=True):
            decision = decisions.get(layers.get(id(first), ""))
            if decision is not None and id(now) in layers and layers[id(now)] not in decisions:
                decisions[layers[id(now)]] = again = dataclasses.replace(decision, weight=layers[id(now)])
                found.append(again)
    return found


def _layer(name: str) -> str:
    """``h.0.fc.parametrizations.weight.original`` -> ``h.0.fc``; of other tensors than "weight", with their name."""
    return name.replace("parametrizations.", "").removesuffix(".original").removesuffix(".weight")


def _in_the_model(decisions: Iterable[Decision], dense: nn.Module, inner: str) -> list[Decision]:
    """Decisions by paths in the model: those of the part at ``inner`` go by paths in it, where it was called alone."""
    known = {*_names_of_one_weight(dense), *(path for path, _ in dense.named_modules())}
    outer = {d.weight: d.weight if d.weight in known or not inner else f"{inner}.{d.weight}" for d in decisions}
    return [dataclasses.replace(decision, weight=outer[decision.weight]) for decision in decisions]


def _names_of_one_weight(dense: nn.Module) -> dict[str, list[str]]:
    """Path of a layer -> the paths under which the same weight is registered."""
    groups: dict[int, list[str]] = {}
    for name, parameter in dense.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name.removesuffix(".weight"))
    return {path: group for group in groups.values() for path in group}


# --- modes -----------------------------------------------------------------------------------------------------------


def eager(model: Model, recording: Recording, compiler: str) -> Cell:
    dense = dense_model(model)
    prepared = copy.deepcopy(dense)
    report = slope.sparsify_(prepared)
    compare(prepared, prepared, masked_copy(dense, masks_of(prepared)), inputs_of(model))
    return count(dense, list(report), model.dense)


def train(model: Model, recording: Recording, compiler: str, way: str, backward: str) -> Cell:
    dense = dense_model(model)
    module, compiled = compiled_way(way, dense, compiler, {"backward": backward})
    result = run(compiled, inputs := inputs_of(model))
    reference = masked_copy(dense, masks_of(module), picked_now if backward == "double_pruned" else every_entry)
    assert_same(result, run(reference, inputs), "output")
    assert_same_gradients(module, reference)
    return count_graphs(model, dense, module, recording)


def inference(model: Model, recording: Recording, compiler: str) -> Cell:
    dense = dense_model(model).eval()
    module, compiled = compiled_way("B", dense, compiler)
    with torch.no_grad():
        result = run(compiled, inputs := inputs_of(model), backward=False)
        reference = in_eval_mode(masked_copy(dense, masks_of(module)))
        assert_same(result, run(reference, inputs, backward=False), "output")
    return count_graphs(model, dense, module, recording)


def dynamic(model: Model, recording: Recording, compiler: str) -> Cell:
    dense = dense_model(model)
    module, compiled = compiled_way("B", dense, compiler, {"backward": "exact"}, dynamic=True)
    reference = masked_copy(dense, masks_of(module))
    compare(module, compiled, reference, inputs_of(model, 2, 7))
    graphs = len(recording)
    for shape in ((3, 9), (5, 6)):
        for one in (module, reference):
            one.zero_grad()
        compare(module, compiled, reference, inputs_of(model, *shape))
    assert model.partial or len(recording) == graphs, "compiled again for another shape"
    return count_graphs(model, dense, module, recording)


def autocast(model: Model, recording: Recording, compiler: str) -> Cell:
    """Against the same model without autocast: no further away than the masked reference under autocast."""
    dense = dense_model(model, torch.float32)
    module, compiled = compiled_way("B", dense, compiler, {"backward": "exact"})
    truth, reference = (masked_copy(dense, masks_of(module), columns) for columns in (every_entry, None))
    inputs = inputs_of(model, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        result, expected = run(compiled, inputs), run(reference, inputs)
    true = run(truth, inputs)
    _no_further("output", result, expected, true)
    theirs = dict(reference.named_parameters())
    for name, parameter in truth.named_parameters():
        gradient, ours = parameter.grad, _gradient(module, truth, name)
        assert (ours is None) == (gradient is None), name
        if gradient is not None and ours is not None:
            other = theirs[name].grad
            assert other is not None
            _no_further(name, ours, other, gradient)
    products = [n for one in recording for n in one.module.graph.nodes if n.target is ops.linear]
    assert {n.meta["example_value"].dtype for n in products} == {torch.bfloat16}
    return count_graphs(model, dense, module, recording)


def _gradient(module: nn.Module, truth: nn.Module, name: str) -> Tensor | None:
    """The dense-shaped gradient of a parameter of a prepared model, zero where it is pruned."""
    parts = name.rpartition(".")
    names = dict(module.named_parameters())
    stored = f"{parts[0]}.parametrizations.{parts[2]}.original"
    if stored not in names:
        return names[name].grad
    mask, grad = masks_of(module)[parts[0] if parts[2] == "weight" else name], names[stored].grad
    assert grad is not None
    dense = torch.zeros(mask.shape, dtype=grad.dtype)
    dense[mask] = grad.flatten()
    return dense if dense.shape == truth.get_parameter(name).shape and not _is_conv1d(module, parts[0]) else dense.t()


def _is_conv1d(module: nn.Module, path: str) -> bool:
    return any(base.__name__ == "Conv1D" for base in type(module.get_submodule(path)).__mro__)


def _no_further(what: str, result: Tensor, reference: Tensor, truth: Tensor) -> None:
    ours, theirs = (float((x.double() - truth.double()).norm()) for x in (result, reference))
    allowed = 2 * theirs + 2.0**-8 * float(truth.double().norm()) + 1e-6
    assert ours <= allowed, f"{what}: error {ours:.3g}, the reference's under autocast is {theirs:.3g}"


def checkpointing(model: Model, recording: Recording, compiler: str) -> Cell:
    dense = dense_model(model)
    fields = {"backward": "exact"}
    module, compiled = compiled_way("B", dense, compiler, fields)
    if "checkpointing" in model.apart:
        compiled = _compile_apart(module, model.apart["checkpointing"][0], compiler)
    if model.blocks:
        for path in [p for p, _ in module.named_modules() if re.fullmatch(model.blocks, p)]:
            block = module.get_submodule(path)
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
    else:
        module.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    reference = masked_copy(dense, masks_of(module))
    compare(module, compiled, reference, inputs_of(model))
    if not model.partial:
        assert any("checkpoint" in str(t) for one in recording for t in one.after), "nothing is recomputed"
    return count_graphs(model, dense, module, recording)


def _compile_apart(module: nn.Module, blocks: str, compiler: str) -> nn.Module:
    """The model itself, each of its blocks compiled."""
    for path, block in module.named_modules():
        if re.fullmatch(blocks, path):
            block.compile(backend=slope.slope, options={"compiler": compiler})
    return module


def accumulation(model: Model, recording: Recording, compiler: str) -> Cell:
    """Two micro-batches, a step of the optimizer, and another micro-batch, with columns picked at each backward."""
    dense = dense_model(model)
    fields = {"backward": "double_pruned", "column_refresh": "backward"}
    module, compiled = compiled_way("B", dense, compiler, fields)
    reference = masked_copy(dense, masks_of(module), picked_now)
    optimizers = [torch.optim.SGD(one.parameters(), lr=1e-2) for one in (module, reference)]
    for _ in range(2):
        inputs = inputs_of(model)
        run(compiled, inputs), run(reference, inputs)
    assert_same_gradients(module, reference)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    compare(module, compiled, reference, inputs_of(model))
    return count_graphs(model, dense, module, recording)


def breaks(model: Model, recording: Recording, compiler: str) -> Cell:
    dense = dense_model(model)
    module, compiled = compiled_way("B", dense, compiler, {"backward": "exact"})
    middles = [m for path, m in module.named_modules() if re.fullmatch(model.middle, path)]
    for middle in middles:
        middle.register_forward_hook(_break)
    assert middles
    broken = counters["graph_break"].total()
    compare(module, compiled, masked_copy(dense, masks_of(module)), inputs_of(model))
    # Not by counting graphs: Dynamo of torch 2.11 leaves what holds the break to Python, when that is PyTorch's own.
    assert counters["graph_break"].total() - broken >= len(middles), "the graph was not broken"
    return count_graphs(model, dense, module, recording, mode="breaks")


def _break(*_: Any) -> None:
    torch._dynamo.graph_break()


def generate(model: Model, recording: Recording, compiler: str) -> Cell:
    dense = dense_model(model).eval()
    module, _ = compiled_way("B", dense, compiler)
    reference = masked_copy(dense, masks_of(module))
    options: dict[str, Any] = {"compiler": compiler}
    parts: list[Any] = [module]
    if module.config.is_encoder_decoder:  # type: ignore[union-attr]
        parts.append(module.get_encoder())  # type: ignore[operator]
    for part in parts:  # generate() runs the encoder by itself
        part.forward = torch.compile(part.forward, backend=slope.slope, options=options)
    caches = _watch_caches(module)
    prompt = inputs_of(model)
    if "input_features" in prompt:
        del prompt["decoder_input_ids"]  # Whisper begins with tokens of its own
    settings = {
        "max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "use_cache": True,
        "cache_implementation": "static", "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    with torch.no_grad():
        result, expected = (m.generate(**prompt, **settings) for m in (module, reference))  # type: ignore[operator]
    assert caches == ["StaticCache"] * 3
    assert torch.equal(result.sequences, expected.sequences)
    assert len(result.logits) == 3
    for ours, theirs in zip(result.logits, expected.logits, strict=True):
        assert_same(ours, theirs, "logits")
    encoder = next((path for path, m in module.named_modules() if len(parts) > 1 and m is parts[1]), "")
    return count_graphs(model, dense, module, recording, inner=encoder)


def _watch_caches(module: Any) -> list[str]:
    """What kind of cache each call of the model gets from here on."""
    caches, forward = [], module.forward

    @functools.wraps(forward)  # generate() goes by the signature
    def watched(*args: Any, **kwargs: Any) -> Any:
        cache = kwargs["past_key_values"]
        caches.append(type(getattr(cache, "self_attention_cache", cache)).__name__)
        return forward(*args, **kwargs)

    module.forward = watched
    return caches


def export(model: Model, recording: Recording, compiler: str) -> Cell:
    """``transform`` of the exported dense model: forward, and the gradients of every parameter of the program."""
    dense, inputs = dense_model(model).eval(), inputs_of(model)
    program = slope.transform(torch.export.export(dense, (), inputs), slope.SlopeConfig(backward="exact"))
    module = program.module()
    report: Report = program.graph_module.meta["slope_report"]
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    masks = {}
    for decision in report.sparse:
        name = decision.weight if f"{decision.weight}_pattern" in state else f"{decision.weight}.weight"
        masks[decision.weight] = unpacked(state[f"{name}_pattern"], decision.shape[1])
    reference = in_eval_mode(masked_copy(dense, masks))
    assert_same(run(module, inputs), run(reference, inputs), "output")
    compared = 0
    for name, parameter in reference.named_parameters():
        layer = name.removesuffix(".weight")
        if f"{name}_values" in state:
            mask, grad, stored = masks[layer], parameter.grad, state[f"{name}_values"].grad
            assert grad is not None
            assert stored is not None
            owner = reference.get_submodule(layer) if name.endswith(".weight") else None
            dense_grad = grad.t() if owner is not None and getattr(owner, "transposed", False) else grad
            assert_same(stored, dense_grad[mask].view(mask.shape[0], -1), name)
            compared += 1
        elif name in state:
            grad, stored = parameter.grad, state[name].grad
            assert (grad is None) == (stored is None), name
            if grad is not None and stored is not None:
                assert_same(stored, grad, name)
    assert compared == len(masks)
    return count(dense, list(report), {**model.dense, **model.dense_in_graph})


Mode = Callable[[Model, Recording, str], Cell]

MODES: dict[str, Mode] = {
    "eager": eager,
    "train": functools.partial(train, way="B", backward="double_pruned"),
    "drop-in": functools.partial(train, way="A", backward="exact"),
    "inference": inference,
    "dynamic": dynamic,
    "autocast": autocast,
    "checkpointing": checkpointing,
    "accumulation": accumulation,
    "breaks": breaks,
    "generate": generate,
    "export": export,
}
