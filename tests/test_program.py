"""Way C: exported programs and GraphModules, made sparse, saved, loaded and trained without the model's class."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule, symbolic_trace

import slope_compile as slope
from graphs import attribute_graph, exported, nodes
from masked import MaskedLinear, every_entry, masked_copy, picked_now
from recording import compiled
from recording import fresh_dynamo as fresh_dynamo
from slope_compile.kernels import ops
from slope_compile.passes.normalize import LINEAR
from tolerances import assert_same
from toy import DENSE, SPARSE, Toy, loss_of, step, token_ids, toy

BACKWARD = slope.SlopeConfig(column_refresh="backward")
Program = ExportedProgram | GraphModule
SHAPES = {
    f"blocks.{block}.{name}": shape
    for block in (0, 1)
    for name, shape in {"qkv": (48, 16), "out": (16, 16), "up": (32, 16), "down": (16, 32)}.items()
}
"""(N, K) of the linears of the blocks."""

every_source = pytest.mark.parametrize("source", ["exported", "graph_module"])


def program_of(model: nn.Module, source: str, ids: Tensor) -> Program:
    if source == "graph_module":
        return attribute_graph(model, ids)
    return exported(model, ids, strict=source == "strict")


def transformed(model: nn.Module, source: str, ids: Tensor, config: slope.SlopeConfig = BACKWARD) -> Program:
    return slope.transform(program_of(model, source, ids), config)


def module_of(program: Program) -> GraphModule:
    """What runs: of an exported program, with its state as attributes."""
    module = program.module() if isinstance(program, ExportedProgram) else program
    assert isinstance(module, GraphModule)
    return module


def state_of(program: Program) -> dict[str, Tensor]:
    return dict(program.state_dict if isinstance(program, ExportedProgram) else program.state_dict())


def report_of(program: Program) -> slope.Report:
    module = program.graph_module if isinstance(program, ExportedProgram) else program
    report = module.meta["slope_report"]
    assert isinstance(report, slope.Report)
    return report


def masks_of_program(program: Program) -> dict[str, Tensor]:
    """Path -> keep mask ``[N, K]``, read bit by bit from the state."""
    masks = {}
    for name, tensor in state_of(program).items():
        if name.endswith(".weight_pattern"):
            path = name.removesuffix(".weight_pattern")
            K = SHAPES[path][1]
            masks[path] = torch.stack([(tensor[:, k // 8] >> (k % 8)) & 1 for k in range(K)], dim=1).bool()
    return masks


def assert_same_gradients(module: nn.Module, reference: nn.Module, masks: dict[str, Tensor]) -> None:
    """Of every parameter; those of sparse weights at the kept positions."""
    named = dict(module.named_parameters())
    for name, parameter in reference.named_parameters():
        expected, path = parameter.grad, name.removesuffix(".weight")
        assert expected is not None
        if name.endswith(".weight") and path in masks:
            name, expected = f"{name}_values", expected[masks[path]].view(expected.shape[0], -1)
        got = named.pop(name).grad
        assert got is not None, f"{name} has no gradient"
        assert_same(got, expected, name)
    assert not named, "parameters that were not compared"


# --- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["exported", "strict", "graph_module"])
@pytest.mark.parametrize("backward", ["double_pruned", "exact"])
def test_forward_and_all_gradients(source: str, backward: Any) -> None:
    dense, ids = toy(), token_ids()
    config = slope.SlopeConfig(backward=backward, column_refresh="backward")
    program = transformed(dense, source, ids, config)
    masks, module = masks_of_program(program), module_of(program)
    assert tuple(masks) == SPARSE
    reference = masked_copy(dense, masks, picked_now if backward == "double_pruned" else every_entry)
    assert_same(step(module, ids), step(reference, ids))
    assert_same_gradients(module, reference, masks)


@every_source
@pytest.mark.parametrize("mask", ["random", "magnitude"])
def test_masks_are_those_of_sparsify(source: str, mask: Any) -> None:
    dense, config = toy(), slope.SlopeConfig(mask=mask, seed=3)
    program = transformed(dense, source, token_ids(), config)
    slope.sparsify_(dense, config)
    expected = dense.state_dict()
    state = state_of(program)
    for path in SPARSE:
        theirs = f"{path}.parametrizations.weight"
        assert torch.equal(state[f"{path}.weight_pattern"], expected[f"{theirs}.0.pattern"])
        assert torch.equal(state[f"{path}.weight_column_mask"], expected[f"{theirs}.0.column_mask"])
        assert torch.equal(state[f"{path}.weight_values"], expected[f"{theirs}.original"])


@every_source
def test_dtypes(source: str) -> None:
    """bf16 state and results; as accurate as bf16 allows."""
    dense, ids = toy(torch.bfloat16), token_ids()
    program = transformed(dense, source, ids)
    assert all(state_of(program)[f"{path}.weight_values"].dtype is torch.bfloat16 for path in SPARSE)
    masks = masks_of_program(program)
    out = module_of(program)(ids)
    assert out.dtype is torch.bfloat16
    truth = masked_copy(copy.deepcopy(dense).double(), masks)(ids)
    assert float((out.double() - truth).detach().abs().max()) < 0.05 * float(truth.detach().abs().max())


@every_source
def test_dynamic_shapes(source: str) -> None:
    dense = toy()
    batch, length = Dim("batch", min=1, max=64), Dim("length", min=2, max=64)
    program: Program = exported(dense, token_ids(3, 5), dynamic_shapes=({0: batch, 1: length},))
    if source == "graph_module":
        program = module_of(program)
    result = slope.transform(program, BACKWARD)
    masks, module = masks_of_program(result), module_of(result)
    reference = masked_copy(dense, masks, picked_now)
    for shape in ((1, 2), (7, 11), (3, 5)):
        ids = token_ids(*shape)
        module.zero_grad()
        reference.zero_grad()
        assert_same(step(module, ids), step(reference, ids), str(shape))
        assert_same_gradients(module, reference, masks)
    if isinstance(result, ExportedProgram):
        assert isinstance(program, ExportedProgram)
        assert result.range_constraints == program.range_constraints


# --- state -----------------------------------------------------------------------------------------------------------


@every_source
def test_names_and_bytes_of_the_state(source: str) -> None:
    dense, rank = toy(torch.float32), 2
    program = transformed(dense, source, token_ids(), slope.SlopeConfig(adapter_rank=rank))
    state = state_of(program)
    expected: dict[str, tuple[int, ...]] = {name: tuple(t.shape) for name, t in dense.state_dict().items()}
    for path in SPARSE:
        N, K = SHAPES[path]
        del expected[f"{path}.weight"]
        sizes: dict[str, tuple[int, ...]] = {"values": (N, K // 2)}
        sizes |= {"pattern": (N, K // 8), "column_mask": (N, K // 2 // 8)}
        sizes |= {"adapter_A": (rank, K), "adapter_B": (N, rank), "adapter_scale": (1,)}
        expected |= {f"{path}.weight_{suffix}": size for suffix, size in sizes.items()}
    assert {name: tuple(t.shape) for name, t in state.items()} == expected
    compressed = sum(
        t.numel() * t.element_size() for n, t in state.items() if n.endswith(("_values", "_pattern", "_mask"))
    )
    elements = sum(SHAPES[path][0] * SHAPES[path][1] for path in SPARSE)
    assert compressed == elements * 2 + elements // 8 + elements // 16  # half of 4 bytes, and a bit and a half

    module = module_of(program)
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted(n for n in expected if not n.endswith(("_pattern", "_mask", "_scale")))
    if isinstance(program, ExportedProgram):
        signature = program.graph_signature
        assert set(signature.parameters) == set(trained)
        assert set(signature.buffers) == set(expected) - set(trained)
    # Nothing but the state: no dense weight hides in a constant or an attribute.
    dense_sizes = {SHAPES[path] for path in SPARSE}
    leaves = [*module.parameters(), *module.buffers(), *(t for t in vars(module).values() if isinstance(t, Tensor))]
    assert all(id(t) in {id(p) for p in [*module.parameters(), *module.buffers()]} for t in leaves)
    left = [n for n, t in state.items() if tuple(t.shape) in dense_sizes and not n.startswith(DENSE)]
    assert [n for n in left if not n.endswith("_values")] == []


@every_source
def test_the_graph_and_the_report(source: str) -> None:
    program = transformed(toy(), source, token_ids())
    module = program.graph_module if isinstance(program, ExportedProgram) else program
    assert len(nodes(module, ops.linear)) == len(SPARSE)
    assert len(nodes(module, LINEAR)) == len(DENSE)
    report = report_of(program)
    assert [d.weight for d in report.sparse] == list(SPARSE)
    assert {d.weight: d.reason for d in report.dense} == {DENSE[0]: slope.Reason.FIRST, DENSE[1]: slope.Reason.HEAD}


def test_tied_tensors_stay_tied() -> None:
    dense, ids = toy(), token_ids()
    dense.head.weight = cast(nn.Parameter, dense.embedding.weight)
    for source in ("exported", "graph_module"):
        module = module_of(transformed(dense, source, ids))
        assert module.get_parameter("head.weight") is module.get_parameter("embedding.weight")
        assert module.get_parameter("head.weight") is not dense.head.weight


def test_frozen_weights_stay_frozen() -> None:
    dense, ids = toy(), token_ids()
    dense.blocks[0].requires_grad_(False)
    module = module_of(transformed(dense, "graph_module", ids))
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (not name.startswith("blocks.0."))


@every_source
def test_the_argument_is_not_changed(source: str) -> None:
    dense, ids = toy(), token_ids()
    program = program_of(dense, source, ids)
    state = {name: (id(t), t.clone()) for name, t in state_of(program).items()}
    code = program.graph_module.code if isinstance(program, ExportedProgram) else program.code
    signature = str(program.graph_signature) if isinstance(program, ExportedProgram) else ""
    expected = dense(ids)
    result = slope.transform(program, BACKWARD)
    train(module_of(result), [ids], 0.5)
    after = program.graph_module if isinstance(program, ExportedProgram) else program
    assert after.code == code
    assert "slope_report" not in after.meta
    assert not isinstance(program, ExportedProgram) or str(program.graph_signature) == signature
    assert list(state_of(program)) == list(state)
    assert all(torch.equal(t, state[name][1]) for name, t in state_of(program).items())
    assert torch.equal(module_of(program)(ids), expected)
    assert torch.equal(dense(ids), expected)


# --- files -----------------------------------------------------------------------------------------------------------

FRESH = """
import sys
import torch
import slope_compile
torch.set_num_threads(1)
program = torch.export.load(sys.argv[1])
module = program.module()
ids, targets = torch.load(sys.argv[2])
out = module(ids)
torch.nn.functional.cross_entropy(out.flatten(0, -2), ids.flatten()).backward()
gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
slope_compile.set_adapters(module, True)
slope_compile.refresh_columns_(module)
torch.save({"out": out.detach(), "gradients": gradients, "on": module(ids).detach()}, sys.argv[3])
"""


def test_a_fresh_process_loads_it_with_slope_compile_alone(tmp_path: Path) -> None:
    config = slope.SlopeConfig(adapter_rank=2)
    program, ids = slope.transform(exported(toy(), token_ids()), config), token_ids()
    files = [str(tmp_path / name) for name in ("program.pt2", "ids.pt", "result.pt")]
    torch.export.save(program, files[0])
    torch.save((ids, ids), files[1])
    done = subprocess.run([sys.executable, "-c", FRESH, *files], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result, module = torch.load(files[2]), module_of(program)
    assert_same(result["out"], step(module, ids))
    expected = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    assert result["gradients"].keys() == expected.keys()
    for name, gradient in result["gradients"].items():
        assert_same(gradient, expected[name], name)
    assert_same(result["on"], result["out"], "B is zero:")


def test_saved_and_loaded_here() -> None:
    """With dynamic shapes, in training, and again after training; and it is no larger than its state."""
    batch = Dim("batch", min=1, max=64)
    program = slope.transform(
        exported(toy(torch.float32), token_ids(3, 5), dynamic_shapes=({0: batch},)), slope.SlopeConfig(adapter_rank=2)
    )
    loaded = through_a_file(program)
    state = program.state_dict
    assert list(loaded.state_dict) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in loaded.state_dict.items())
    assert str(loaded.graph_signature) == str(program.graph_signature)
    ids = token_ids(8, 5)
    one, other = module_of(program), module_of(loaded)
    assert train(one, [ids] * 3, 0.1) == train(other, [ids] * 3, 0.1)
    again = module_of(through_a_file(loaded))
    assert torch.equal(again(ids), other(ids))


def through_a_file(program: ExportedProgram) -> ExportedProgram:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


# --- training --------------------------------------------------------------------------------------------------------


def train(
    run: Callable[[Tensor], Tensor], batches: list[Tensor], lr: float, schedule: slope.AdapterSchedule | None = None
) -> list[float]:
    """A plain loop; the losses."""
    module = cast(nn.Module, run)
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    losses = []
    for ids in batches:
        loss = loss_of(run(ids), ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()
        losses.append(loss.item())
    return losses


def test_training_equals_that_of_the_prepared_model() -> None:
    """Eager way B computes the exact input gradient, as the graph does with ``backward="exact"``; adapters included."""
    dense, batches = toy(), [token_ids() for _ in range(6)]
    config = slope.SlopeConfig(backward="exact", adapter_rank=2)
    module = module_of(transformed(dense, "graph_module", batches[0], config))
    prepared = copy.deepcopy(dense)
    slope.sparsify_(prepared, config)
    losses = []
    for model in (module, prepared):
        schedule = slope.AdapterSchedule(model, total_steps=6, start_step=3)
        losses.append(train(model, batches, 0.02, schedule))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    assert losses[0][-1] < losses[0][0]
    for path in SPARSE:
        trained = prepared.get_parameter(f"{path}.parametrizations.weight.original").detach()
        assert float((module.get_parameter(f"{path}.weight_values").detach() - trained).abs().max()) < 1e-6


def test_double_pruned_training_equals_that_of_the_compiled_prepared_model() -> None:
    dense, batches = toy(), [token_ids() for _ in range(4)]
    module = module_of(transformed(dense, "exported", batches[0]))
    slope.sparsify_(dense, BACKWARD)
    compiled_losses = []
    optimizer, run = torch.optim.AdamW(dense.parameters(), lr=0.02), compiled(dense)
    for ids in batches:
        loss = loss_of(run(ids), ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        compiled_losses.append(loss.item())
    assert train(module, batches, 0.02) == pytest.approx(compiled_losses, rel=1e-9)


def test_a_transformed_graph_can_be_compiled() -> None:
    dense, ids = toy(), token_ids()
    module = module_of(transformed(dense, "graph_module", ids, slope.SlopeConfig(adapter_rank=2, exclude=(SPARSE[0],))))
    before, expected = copy.deepcopy(module.state_dict()), module(ids)
    run = compiled(module, "eager")
    assert torch.equal(run(ids), expected)
    slope.set_adapters(module, True)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("_adapter_B"):
                before[name].copy_(parameter.normal_())
    expected = module(ids)
    assert torch.equal(run(ids), expected), "the switch reaches compiled code"
    after = module.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before), "adapters and what was excluded: not pruned"
    slope.set_adapters(module, False)
    assert torch.equal(run(ids), module(ids))


def test_a_prepared_model_that_was_exported() -> None:
    """Its weights are expressions already; transform takes the products of them."""
    model, ids = toy(), token_ids()
    slope.sparsify_(model, slope.SlopeConfig(backward="exact"))
    program = slope.transform(exported(model, ids))
    assert len(nodes(program.graph_module, ops.linear)) == len(SPARSE)
    assert not nodes(program.graph_module, ops.expand)
    assert {d.reason for d in report_of(program).sparse} == {slope.Reason.PREPARED}
    module = module_of(through_a_file(program))
    assert_same(step(module, ids), step(model, ids))
    for name, parameter in model.named_parameters():
        got, expected = module.get_parameter(name).grad, parameter.grad
        assert got is not None
        assert expected is not None
        assert_same(got, expected, name)


# --- errors ----------------------------------------------------------------------------------------------------------


@every_source
def test_transformed_already(source: str) -> None:
    program = transformed(toy(), source, token_ids())
    with pytest.raises(slope.ConversionError, match="transform: the graph has been transformed already; transform the"):
        slope.transform(program)
    with pytest.raises(slope.ConversionError, match="has been transformed already"):
        slope.transform(module_of(program))


@every_source
def test_nothing_eligible(source: str) -> None:
    program = program_of(toy(), source, token_ids())
    with pytest.raises(slope.ConversionError) as caught:
        slope.transform(program, slope.SlopeConfig(exclude=(r"blocks\..*",)))
    message = str(caught.value)
    assert "no linear of the graph is eligible; change include, exclude, first_dense, heads_dense or pattern" in message
    for text in ("blocks.1.up", "excluded by the configuration", "head", "output head"):
        assert text in message


@pytest.mark.parametrize("thing", [nn.Linear(4, 4), torch.ones(2), None], ids=["module", "tensor", "none"])
def test_neither_a_program_nor_a_graph(thing: Any) -> None:
    with pytest.raises(TypeError, match="transform: expected an ExportedProgram or a GraphModule, got"):
        slope.transform(thing)


def test_no_configuration() -> None:
    with pytest.raises(slope.ConfigError, match=r"transform: config: expected a SlopeConfig, got \{'pattern': '2:8'\}"):
        slope.transform(symbolic_trace(nn.Linear(4, 4)), {"pattern": "2:8"})  # type: ignore[call-overload]


def test_a_symbolically_traced_module() -> None:
    """``torch.fx`` leaves linears as calls of modules, without values; in the end the same products."""
    dense = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    result = slope.transform(symbolic_trace(dense), BACKWARD)
    assert [d.weight for d in report_of(result).sparse] == ["2"]
    x = torch.randn(3, 8, dtype=torch.float64)
    pattern = result.get_buffer("2.weight_pattern")
    mask = torch.stack([(pattern[:, k // 8] >> (k % 8)) & 1 for k in range(16)], dim=1).bool()
    reference = masked_copy(dense, {"2": mask}, picked_now)
    assert isinstance(reference.get_submodule("2"), MaskedLinear)
    assert_same(result(x), reference(x))
    result(x).square().sum().backward()
    reference(x).square().sum().backward()
    assert_same_gradients(result, reference, {"2": mask})


def test_state_of_toy_is_as_this_file_assumes() -> None:
    model: Toy = toy()
    assert {path: tuple(model.get_parameter(f"{path}.weight").shape) for path in SHAPES} == SHAPES
