"""DistributedDataParallel and FSDP2 with two processes on gloo: what one process computes of the whole batch.

All cases run in one pair of processes, which write down what they have; the tests compare.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import slope_compile as slope
from prepared import SPARSE, Net, net
from recording import compiled
from recording import fresh_dynamo as fresh_dynamo
from tolerances import assert_same

WORLD, STEPS, SWITCH = 2, 4, 2
"""The adapters come on after two of four steps; the columns are picked again every second."""


@dataclasses.dataclass(frozen=True)
class Case:
    way: str
    order: str
    """Which wrapper is outermost: "compiled", "wrapped" (DistributedDataParallel), "eager", or "shards" (FSDP2)."""
    pieces: bool = False
    """Whether Dynamo cuts the graph at the buckets in which gradients are reduced."""

    @property
    def name(self) -> str:
        return f"{self.way}_{self.order}" + "_in_pieces" * self.pieces


CASES = [
    Case("A", "compiled", pieces=True),
    Case("B", "compiled", pieces=True),
    Case("B", "wrapped"),
    Case("B", "shards"),
]


def make(case: Case) -> Net:
    torch.manual_seed(5)
    model = net()
    if case.way == "B":
        slope.sparsify_(model, slope.SlopeConfig(adapter_rank=2, column_refresh=2))
    return model


def run_of(case: Case, model: Net) -> Any:
    options = {"column_refresh": 2, "exclude": (r"blocks\.1\.down",)} if case.way == "A" else {}
    return model if case.order == "eager" else compiled(model, options=options)


def distributed(case: Case, model: Net) -> Any:
    if case.order == "shards":
        for block in model.blocks:
            fully_shard(block)
            block.compile(backend="slope", options={"compiler": "aot_eager"})
        return sharded(model)
    wrap = functools.partial(
        DistributedDataParallel, find_unused_parameters=case.way == "B", bucket_cap_mb=0.005 if case.pieces else 25
    )
    # The first bucket has a size of its own.
    dist._DEFAULT_FIRST_BUCKET_BYTES = 2000 if case.pieces else 1 << 20  # type: ignore[attr-defined]
    return run_of(case, wrap(model)) if case.order == "compiled" else wrap(run_of(case, model))  # type: ignore[arg-type]


def sharded(model: nn.Module) -> nn.Module:
    """By FSDP2."""
    fully_shard(model)
    return model


def train(case: Case, model: Net, run: Any, rank: int | None) -> dict[str, dict[str, Tensor]]:
    """State after the last step and its gradients; a rank of None has the whole batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = slope.AdapterSchedule(model, total_steps=STEPS, start_step=SWITCH) if case.way == "B" else None
    for number in range(STEPS):
        x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        if rank is not None:
            x = x.chunk(WORLD)[rank]
        optimizer.zero_grad()
        run(x).square().mean().backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"state": whole(model.state_dict()), "gradients": whole(gradients)}


def whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of shards, all of them."""
    return {n: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for n, t in tensors.items()}


def refusals() -> dict[str, str]:
    """What is refused at once, not when the adapters come on."""

    def message(action: Any) -> str:
        try:
            action()
        except (slope.SlopeError, torch._dynamo.exc.BackendCompilerFailed) as error:
            error = getattr(error, "inner_exception", error)
            return f"{type(error).__name__}: {error}"
        return "nothing was raised"

    def schedule_of(**settings: Any) -> slope.AdapterSchedule:
        model = make(Case("B", "eager"))
        late = slope.AdapterSchedule(model, total_steps=STEPS)
        model.wrapper = [DistributedDataParallel(model, **settings)]  # type: ignore[assignment]
        return late

    dense = DistributedDataParallel(net())
    prepared = DistributedDataParallel(make(Case("B", "eager")), static_graph=True)
    return {
        "sparsify_, inside": message(lambda: slope.sparsify_(dense.module)),
        "sparsify_, wrapper": message(lambda: slope.sparsify_(dense)),
        "densify_": message(lambda: slope.densify_(prepared.module)),
        "static_graph": message(lambda: slope.AdapterSchedule(prepared, total_steps=STEPS)),
        "static_graph, wrapped later": message(lambda: schedule_of(static_graph=True).step()),
        "unused": message(lambda: schedule_of().step()),
        "dense shards": message(lambda: compiled(sharded(net()))(torch.randn(3, 8, dtype=torch.float64))),
        "right": message(lambda: schedule_of(find_unused_parameters=True).step()),
        "adapters on": message(lambda: slope.AdapterSchedule(prepared, total_steps=STEPS, start_step=0)),
    }


def worker(rank: int, folder: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    found: dict[str, Any] = {"refusals": refusals()}
    for case in CASES:
        torch._dynamo.reset()
        model = make(case)
        found[case.name] = train(case, model, distributed(case, model), rank)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process wrote down."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_in_tests, args=(str(folder), sys.path), nprocs=WORLD)  # type: ignore[attr-defined,no-untyped-call]
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def _in_tests(rank: int, folder: str, path: list[str]) -> None:
    sys.path[:] = path
    worker(rank, folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_is_that_of_one_process(ranks: list[dict[str, Any]], case: Case) -> None:
    one, other = (rank[case.name] for rank in ranks)
    model = make(case)
    expected = train(case, model, run_of(case, model), None)
    assert one["gradients"].keys() == expected["gradients"].keys()
    adapters = [name for name in one["gradients"] if name.endswith((".A", ".B"))]
    assert len(adapters) == (2 * len(SPARSE) if case.way == "B" else 0), "the adapters came on"
    for part in ("state", "gradients"):
        for name, tensor in expected[part].items():
            assert torch.equal(one[part][name], other[part][name]), f"{name}: the ranks differ"
            if tensor.is_floating_point():
                assert_same(one[part][name], tensor, name)
            else:
                assert torch.equal(one[part][name], tensor), name
    if case.way == "A":
        zeros = {p: float((one["state"][f"{p}.weight"] == 0).double().mean()) for p in SPARSE}
        assert zeros == {path: 0.0 if path == "blocks.1.down" else 0.5 for path in SPARSE}
    elif case.order != "shards":
        assert sum(name.endswith("column_mask") for name in one["state"]) == len(SPARSE)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sparsify_, inside", "ConversionError: sparsify_: .* DistributedDataParallel.*sparsify_ the model first"),
        ("sparsify_, wrapper", "ConversionError: sparsify_: .* DistributedDataParallel.*sparsify_ the model first"),
        ("densify_", "ConversionError: densify_: .* DistributedDataParallel"),
        ("static_graph", "ScheduleError: .*static_graph=True.*find_unused_parameters=True"),
        ("static_graph, wrapped later", "ScheduleError: .*static_graph=True.*find_unused_parameters=True"),
        ("unused", "ScheduleError: .*waits for gradients of the adapters.*find_unused_parameters=True"),
        ("dense shards", "ConfigError: .*'blocks.0.up' is dense and sharded.* sparsify_ the model first"),
        ("right", "nothing was raised"),
        ("adapters on", "nothing was raised"),
    ],
)
def test_what_would_fail_later_is_refused_at_once(ranks: list[dict[str, Any]], what: str, message: str) -> None:
    for rank in ranks:
        assert re.match(message, rank["refusals"][what]), rank["refusals"][what]
