"""``torch.compile(model, backend="slope")`` as a user runs it: modes, shapes, precisions, frozen parts.

Partial graphs, dense weights, options, several models and the models of transformers have files of their own.
"""

from __future__ import annotations

import collections
import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

import slope_compile as slope
from masked import assert_same_gradients, masked_copy, masks_of, masks_of_prepared, picked_now
from recording import compiled, compiled_way, every_way, record
from recording import fresh_dynamo as fresh_dynamo
from tolerances import assert_same
from toy import DENSE, SPARSE, Toy, gradients, loss_of, step, token_ids, toy

no_gradients = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])


def by_name(**arguments: Any) -> Any:
    """A compiled dense toy, the backend found by its name."""
    return torch.compile(toy(torch.float32), backend="slope", **arguments)


# --- shapes ----------------------------------------------------------------------------------------------------------


@every_way
def test_one_graph_for_every_shape(way: str) -> None:
    """Counted by Dynamo, which may call the backend twice for it: it starts again once floats turn out constant."""
    counters.clear()
    dense = toy()
    # Symbols are slow in AOTAutograd: one way is enough there.
    model, run = compiled_way(way, dense, "eager" if way == "A" else "aot_eager", dynamic=True, fullgraph=True)
    step(run, token_ids(3, 5))
    reference = masked_copy(dense, masks_of(model), picked_now)
    for shape in ((2, 7), (5, 4), (9, 11)):
        model.zero_grad()
        reference.zero_grad()
        ids = token_ids(*shape)
        assert_same(step(run, ids), step(reference, ids), str(shape))
        assert_same_gradients(model, reference)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("adapters", [False, True])
def test_compiled_with_the_exact_backward_equals_eager(adapters: bool, compiler: str) -> None:
    """Outputs and every gradient of the prepared model itself, adapters on and off."""
    eager, ids = toy(), token_ids()
    slope.sparsify_(eager, slope.SlopeConfig(backward="exact", adapter_rank=2))
    for name, parameter in eager.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter)
    slope.set_adapters(eager, adapters)
    model = copy.deepcopy(eager)
    assert_same(step(compiled(model, compiler), ids), step(eager, ids), "logits")
    expected = dict(eager.named_parameters())
    for name, parameter in model.named_parameters():
        theirs = expected[name].grad
        assert (parameter.grad is None) == (theirs is None) == (name.endswith((".A", ".B")) and not adapters), name
        if parameter.grad is not None and theirs is not None:
            assert_same(parameter.grad, theirs, name)


@pytest.mark.slow
def test_a_shape_that_changes_is_compiled_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's default: static at first, dynamic from the second length on."""
    recording = record(monkeypatch)
    model, run = compiled_way("B", toy())
    outputs = [step(run, token_ids(3, length)).shape[1] for length in (5, 6, 7, 9)]
    assert outputs == [5, 6, 7, 9]
    assert [one.sparse for one in recording] == [len(SPARSE)] * 2
    assert len(masks_of(model)) == len(SPARSE)


# --- precision -------------------------------------------------------------------------------------------------------


def error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Largest error of a set of tensors, each relative to its largest entry."""
    return max(float((found[n].double() - t).abs().max() / t.abs().max()) for n, t in truth.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_way
def test_autocast(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products in half precision, weights and gradients in float32, as near to float64 as the masked dense model."""
    recording = record(monkeypatch)
    dense, ids = toy(torch.float32), token_ids(6, 9)
    model, run = compiled_way(way, dense, fields={"backward": "exact"})

    logits = autocast_step(run, ids, dtype)
    assert recording.sparse == len(SPARSE)
    assert_as_good_as_stock(dense, model, ids, logits, dtype)


def autocast_step(model: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Forward under autocast and backward; returns the logits."""
    with torch.autocast("cpu", dtype):
        logits: Tensor = model(ids)
    loss_of(logits.float(), ids).backward()
    return logits.detach()


def assert_as_good_as_stock(
    dense: nn.Module, model: nn.Module, ids: Tensor, logits: Tensor, dtype: torch.dtype
) -> None:
    """Against the same masks on the dense model: under stock autocast (the yardstick), and in float64 (the truth)."""
    assert logits.dtype == dtype
    assert all(g.dtype == torch.float32 for g in gradients(model).values())
    masks = masks_of(model)
    stock, truth = masked_dense(dense, masks), masked_dense(dense, masks).double()
    yardstick = {"logits": autocast_step(stock, ids, dtype), **kept_gradients(stock, masks)}
    exact = {"logits": step(truth, ids), **kept_gradients(truth, masks)}
    found = {"logits": logits, **compressed_gradients(model, masks)}
    assert found.keys() == exact.keys()
    assert error(found, exact) <= 1.5 * error(yardstick, exact)


def masked_dense(dense: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy with zeros in the weights: stock layers, so that autocast treats them as any others."""
    copied = copy.deepcopy(dense)
    for path, mask in masks.items():
        weight = copied.get_parameter(f"{path}.weight")
        with torch.no_grad():
            weight.mul_(mask)
    return copied


def kept_gradients(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    found = gradients(model)
    return {f"{path}.weight": found[f"{path}.weight"][mask] for path, mask in masks.items()}


def compressed_gradients(model: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    found = gradients(model)
    if f"{next(iter(masks))}.weight" in found:
        return kept_gradients(model, masks)
    return {f"{path}.weight": found[f"{path}.parametrizations.weight.original"].flatten() for path in masks}


@every_way
def test_bfloat16_model(way: str) -> None:
    """No autocast, everything in half precision: no worse than the masked dense model in the same dtype."""
    dense, ids = toy(torch.bfloat16), token_ids(6, 9)
    model, run = compiled_way(way, dense, fields={"backward": "exact"})
    logits = step(run, ids)
    masks = masks_of(model)
    stock, truth = masked_dense(dense, masks), masked_dense(dense, masks).double()
    yardstick = {"logits": step(stock, ids), **kept_gradients(stock, masks)}
    exact = {"logits": step(truth, ids), **kept_gradients(truth, masks)}
    found = {"logits": logits, **compressed_gradients(model, masks)}
    assert all(t.dtype == torch.bfloat16 for t in found.values())
    assert error(found, exact) <= 1.5 * error(yardstick, exact)


# --- without gradients -----------------------------------------------------------------------------------------------


@no_gradients
@every_way
def test_forward_only(way: str, context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference, then training of the same compiled model."""
    recording = record(monkeypatch)
    dense, ids = toy(), token_ids()
    model, run = compiled_way(way, dense)
    with context():
        logits = run(ids)
    assert not logits.requires_grad
    reference = masked_copy(dense, masks_of(model), picked_now)
    assert recording.sparse_paths == list(SPARSE)
    # A dense-shaped weight is not compressed for a few tokens: test_dense_inference.py.
    assert recording.sparse == (0 if way == "A" else len(SPARSE))
    assert_same(logits.clone(), reference(ids).detach())
    assert_same(step(run, ids), step(reference, ids))
    assert_same_gradients(model, reference)


@every_way
def test_switching_between_training_and_evaluation(way: str) -> None:
    """Dropout acts in training alone, before and after a step of the optimizer."""
    dense, ids = toy(), token_ids()
    dense.blocks[1].down = nn.Sequential(dense.blocks[1].down, nn.Dropout(0.5))  # type: ignore[arg-type]
    model, run = compiled_way(way, dense)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        run.eval()
        with torch.no_grad():
            first, second = run(ids), run(ids)
            assert torch.equal(first, second)
            assert_same(first, masked_now(dense, model)(ids))
        run.train()
        assert not torch.equal(run(ids), run(ids))
        step(run, ids)
        optimizer.step()
        optimizer.zero_grad()


def masked_now(dense: nn.Module, model: nn.Module) -> nn.Module:
    """The masked dense twin of a model as it is now, in evaluation."""
    state = copy.deepcopy(model).eval()
    if masks_of_prepared(state):
        slope.densify_(state)
    twin = copy.deepcopy(dense).eval()
    twin.load_state_dict(state.state_dict())
    return masked_copy(twin, masks_of(model))


@pytest.mark.parametrize("gradients_on", [False, True], ids=["inference", "training"])
@every_way
def test_weights_changed_in_place(way: str, gradients_on: bool) -> None:
    """New values between two calls are used by the second one: nothing derived from the old ones is kept."""
    dense, ids = toy(), token_ids()
    model, run = compiled_way(way, dense)
    with torch.set_grad_enabled(gradients_on):
        before = run(ids)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        after = run(ids)
    assert not torch.allclose(before, after)
    assert_same(after.detach(), masked_now(dense, model)(ids).detach())


@every_way
def test_a_loaded_state_is_used(way: str) -> None:
    dense, ids = toy(), token_ids()
    model, run = compiled_way(way, dense)
    step(run, ids)
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        expected = run(ids)
        for parameter in model.parameters():
            parameter.zero_()
        assert not torch.allclose(run(ids), expected)
        model.load_state_dict(state)
        assert torch.equal(run(ids), expected)


# --- frozen parts ----------------------------------------------------------------------------------------------------


@every_way
def test_frozen_layers_get_no_gradient(way: str) -> None:
    """A frozen block passes the gradient on to the one below it."""
    dense, ids = toy(), token_ids()
    dense.blocks[1].requires_grad_(False)
    model, run = compiled_way(way, dense)
    logits = step(run, ids)
    reference = masked_copy(dense, masks_of(model), picked_now)
    assert_same(logits, step(reference, ids))
    frozen = [n for n, p in model.named_parameters() if n.startswith("blocks.1.") and p.grad is not None]
    assert frozen == []
    found, expected = gradients(model), gradients(reference)
    for name in ("embedding.weight", "blocks.0.norm.weight", "blocks.0.up.bias", "head.weight"):
        assert_same(found[name], expected[name], name)


# --- what runs -------------------------------------------------------------------------------------------------------


@every_way
def test_no_dense_product_but_those_of_the_dense_layers(way: str) -> None:
    """Counted while it runs, backward included; what sparse operators do internally is not counted."""
    _, run = compiled_way(way, toy(torch.float32))
    ids = token_ids()
    step(run, ids)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step(run, ids)
    counted: collections.Counter[str] = collections.Counter()
    for event in profiler.events() or ():
        parent = event.cpu_parent
        while parent is not None and not parent.name.startswith("slope::"):
            parent = parent.cpu_parent
        if parent is None:
            counted[event.name] += 1
    # Forward one each; backward one for the input's gradient (the embedding trains) and one for the weight's.
    assert counted["aten::addmm"] + counted["aten::mm"] == 3 * len(DENSE)
    assert sum(n for name, n in counted.items() if name.startswith("slope::")) >= 3 * len(SPARSE)


# --- Inductor --------------------------------------------------------------------------------------------------------


def one_block() -> nn.Module:
    """As small as it can be: generating code is what takes the time here."""
    model = toy(torch.float32)
    del model.blocks[1]
    return model


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
def test_modes_through_inductor(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward only, by name: each mode compiles with its options and computes what the masked model does."""
    recording = record(monkeypatch)
    run = by_name(mode=mode)
    del run._orig_mod.blocks[1]
    dense, ids = copy.deepcopy(run._orig_mod), token_ids()
    with torch.no_grad():
        logits = run(ids)
        reference = masked_copy(dense, masks_of(run._orig_mod))
        assert_same(logits, reference(ids))
    (graph,) = recording
    assert graph.compiler == "inductor"
    assert graph.patches == torch._inductor.list_mode_options(mode)


@pytest.mark.parametrize(
    "way", [pytest.param("A", id="A_dense"), pytest.param("B", id="B_prepared", marks=pytest.mark.slow)]
)
def test_inference_through_inductor_uses_the_weights_as_they_are(way: str) -> None:
    """Generated code without gradients: any batch size, and no number of an old weight in it."""
    dense = one_block()
    model, run = compiled_way(way, dense, compiler="inductor", dynamic=True)
    model.eval()
    with torch.inference_mode():
        for shape in ((3, 5), (4, 6)):
            ids = token_ids(*shape)
            before = run(ids).clone()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5)
            after = run(ids)
            assert not torch.allclose(before, after)
            assert_same(after, masked_now(dense, model)(ids).detach())


@pytest.mark.slow
@every_way
def test_autocast_through_inductor(way: str) -> None:
    """bfloat16 products in generated code, forward and backward, as good as those of stock autocast."""
    dense, ids = one_block(), token_ids(6, 9)
    model, run = compiled_way(way, dense, compiler="inductor", fields={"backward": "exact"})
    logits = autocast_step(run, ids, torch.bfloat16)
    assert_as_good_as_stock(dense, model, ids, logits, torch.bfloat16)


@pytest.mark.slow
def test_dynamic_training_through_inductor() -> None:
    dense = one_block()
    model, run = compiled_way("B", dense, compiler="inductor", dynamic=True)
    reference = masked_copy(dense, masks_of(model), picked_now)
    for shape in ((3, 5), (4, 6)):
        model.zero_grad()
        reference.zero_grad()
        ids = token_ids(*shape)
        assert_same(step(run, ids), step(reference, ids), str(shape))
        assert_same_gradients(model, reference)


def test_freezing_a_prepared_model(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Constants in place of parameters: products stay sparse, and nobody complains about columns that none will train.

    What is folded into the code is of this compilation; the next one starts from the values of its time.
    """
    recording = record(monkeypatch)
    dense, ids = one_block(), token_ids()
    model, run = compiled_way("B", dense, compiler="inductor")
    with torch.no_grad(), torch._inductor.config.patch(freezing=True), caplog.at_level(logging.WARNING):
        assert_same(run(ids), masked_now(dense, model)(ids))
        for parameter in model.parameters():
            parameter.mul_(1.5)
        torch._dynamo.reset()
        assert_same(run(ids), masked_now(dense, model)(ids))
    assert [one.sparse for one in recording] == [3, 3]
    assert [r.getMessage() for r in caplog.records if r.name == "slope_compile"] == []


def test_freezing_a_dense_model_is_said_to_leave_it_dense(caplog: pytest.LogCaptureFixture) -> None:
    """Its parameters are constants of the graph; who they are is lost, so nothing is pruned."""
    model, ids = one_block(), token_ids()
    with torch.no_grad(), torch._inductor.config.patch(freezing=True), caplog.at_level(logging.WARNING):
        expected = model(ids)
        assert torch.equal(compiled(model, "eager")(ids), expected)
    (said,) = (r.getMessage() for r in caplog.records if r.name == "slope_compile")
    assert said == (
        "backend 'slope': 5 linears run dense, since Inductor's freezing has made constants of their weights; "
        "sparsify_ the model first, or compile it without freezing"
    )


def test_freezing_by_option() -> None:
    """Dynamo does not see the option, so the weights are still parameters, and are pruned."""
    run = by_name(options={"freezing": True})
    del run._orig_mod.blocks[1]
    dense, ids = copy.deepcopy(run._orig_mod), token_ids()
    with torch.no_grad():
        logits = run(ids)
    assert_same(logits, masked_copy(dense, masks_of(run._orig_mod))(ids).detach())


@pytest.mark.parametrize("how", ["compile", "explain"])
def test_guards_of_torch_2_11_keep_no_addresses(how: str) -> None:
    """Its optimization of guards, which crashes, is off; where it is sound, it stays as the user has it."""
    model = toy(torch.float32)
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        if how == "compile":
            torch.compile(model, backend=slope.slope, options={"compiler": "eager"})(token_ids())
        else:
            slope.explain(model, token_ids())
        assert torch._dynamo.config.use_recursive_dict_tags_for_guards == (torch.__version__ >= "2.12")


def test_a_dense_model_beside_a_prepared_one_is_left_alone() -> None:
    """A frozen teacher, in the graph of its student; and a matrix of the student's own that no linear layer owns."""

    class Student(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(16, self.head.out_features))

        def forward(self, ids: Tensor) -> Tensor:
            y: Tensor = super().forward(ids) @ self.weight.t()
            return y

    teacher, student = toy().requires_grad_(False), Student()
    slope.sparsify_(student)
    ids = token_ids()
    expected = (student(ids).sum() - teacher(ids).sum()).detach()

    def difference(ids: Tensor) -> Any:
        return student(ids).sum() - teacher(ids).sum()

    run = torch.compile(difference, backend="slope", options={"compiler": "eager"})
    for _ in range(2):
        torch.testing.assert_close(run(ids), expected)
    assert all(bool((p != 0).all()) for name, p in teacher.named_parameters() if name.endswith("weight"))
    assert bool((student.weight != 0).all())
