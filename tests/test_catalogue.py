"""Every error that the library raises on purpose, triggered.

Each message names the thing, the value, and the way out.  That the list is complete is read off the source: the
statement that raised each error is found in its traceback, and all such statements of the library must be met.
"""

from __future__ import annotations

import ast
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import slope_compile as slope
from graphs import attribute_graph
from prepared import Net, blocks
from slope_compile import cli_inspect, cost
from slope_compile.backend import slope as backend
from slope_compile.config import Override, SlopeConfig
from slope_compile.errors import SlopeError
from slope_compile.kernels import cpu_library, masks, metadata
from slope_compile.options import parse_options
from slope_compile.pattern import Pattern

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("slope_compile", "passes", "kernels")
ERRORS = {"ConfigError", "ConversionError", "PatternError", "ScheduleError", "SlopeError"}


def prepared(**fields: Any) -> nn.Module:
    model = blocks()
    slope.sparsify_(model, SlopeConfig(**fields))
    return model


def with_gradient() -> nn.Module:
    model = blocks()
    model(torch.randn(2, 8)).sum().backward()
    return model


def with_optimizer(keep: list[torch.optim.Optimizer]) -> nn.Module:
    model = with_gradient()
    keep.append(torch.optim.AdamW(model.parameters()))
    keep[0].step()
    keep[0].zero_grad()
    return model


def optimizer_has_state() -> None:
    keep: list[torch.optim.Optimizer] = []
    slope.sparsify_(with_optimizer(keep))


def schedule(**arguments: Any) -> slope.AdapterSchedule:
    given = {"total_steps": 10, "model": prepared(adapter_rank=2), **arguments}
    return slope.AdapterSchedule(given.pop("model"), **given)


def optimizer_without_adapters() -> None:
    model = blocks()
    optimizer = torch.optim.SGD(model.parameters())
    slope.sparsify_(model, slope.SlopeConfig(adapter_rank=2))
    schedule(model=model).step()
    del optimizer


def graph() -> Any:
    return attribute_graph(blocks(), torch.randn(2, 8))


def other_moments() -> None:
    keep: list[torch.optim.Optimizer] = []
    with_optimizer(keep)
    model = prepared()
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.load_state_dict(keep[0].state_dict())
    optimizer.step()


@contextmanager
def a_process_group() -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def wrapped_model() -> None:
    with a_process_group():
        slope.sparsify_(DistributedDataParallel(blocks()))


def wrapped_adapters() -> None:
    with a_process_group():
        wrapper = DistributedDataParallel(prepared(adapter_rank=2))
        schedule(model=wrapper)


def sharded(model: nn.Module) -> nn.Module:
    fully_shard(model)
    return model


def sharded_weights() -> None:
    with a_process_group():
        from_dynamo(sharded(Net()))


def from_dynamo(model: nn.Module, **options: Any) -> None:
    """What the backend raises for a model, without Dynamo's wrapping."""
    try:
        torch.compile(model, backend=backend, options={"compiler": "eager", **options})(torch.randn(2, 8))
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise error.inner_exception from None
    finally:
        torch._dynamo.reset()


def unknown_level() -> None:
    before = os.environ.get(cpu_library.VARIABLE)
    os.environ[cpu_library.VARIABLE] = "sse"
    try:
        cpu_library._requested()
    finally:
        os.environ.pop(cpu_library.VARIABLE)
        if before is not None:
            os.environ[cpu_library.VARIABLE] = before


def mask() -> torch.Tensor:
    return metadata.pack_mask(masks.choose_mask(torch.randn(4, 8), Pattern(2, 4), "random", 0, "a"))


def wrong_state() -> None:
    schedule().load_state_dict({})


def config(**fields: Any) -> SlopeConfig:
    return SlopeConfig(**fields)


def override(**fields: Any) -> Override:
    return Override(**fields)


def peaks(**rates: Any) -> cost.Device:
    return cost.Device("a", **{"peak": 1.0, "sparse_peak": 1.0, "bandwidth": 1.0, **rates})


def wrong_config() -> None:
    given: Any = {"seed": 1}
    slope.sparsify_(blocks(), given)


CONFIG = SlopeConfig()
ERROR_CASES: dict[str, tuple[Callable[[], Any], str]] = {
    # configuration
    "override_without_path": (lambda: Override.from_dict({"pattern": "2:8"}), "overrides.path {'pattern': '2:8'} '.*'"),
    "seed": (lambda: config(seed=1.5), "seed integer 1.5"),
    "flag": (lambda: config(first_dense="no"), "first_dense True False 'no'"),
    "rules": (lambda: config(include="a.*"), "include tuple 'a.*'"),
    "overrides": (lambda: config(overrides=(3,)), "overrides Override 3"),
    "no_config": (lambda: wrong_config(), "sparsify_ SlopeConfig {'seed' SlopeConfig.from_dict"),
    "json": (lambda: SlopeConfig.from_json("{"), "SlopeConfig JSON"),
    "json_type": (lambda: SlopeConfig.from_json("[]"), "SlopeConfig object list"),
    "field": (lambda: SlopeConfig.from_json('{"patern": "2:4"}'), "'patern' 'pattern'"),
    "no_regex": (lambda: override(path=3), "overrides.path expression 3"),
    "bad_regex": (lambda: config(exclude=("(",)), "exclude '('"),
    "override_pattern": (lambda: override(path=".*", pattern="2"), "overrides.pattern kept:group '2'"),
    "mask": (lambda: config(mask="best"), "mask random magnitude 'best'"),
    "column_refresh": (lambda: config(column_refresh=0), "column_refresh 'never' 0"),
    "adapter_rank": (lambda: config(adapter_rank=-1), "adapter_rank positive -1"),
    "adapter_scale": (lambda: config(adapter_scale=0.0), "adapter_scale positive 0.0"),
    "pattern": (lambda: Pattern(4, 4), "4:4 '2:4'"),
    "pattern_text": (lambda: Pattern.parse("two"), "'two' '2:4'"),
    # options of the backend
    "option": (lambda: parse_options(None, {"patern": 1}), "'patern' 'pattern'"),
    "option_config": (lambda: parse_options(None, {"config": {}}), "'config' SlopeConfig dict"),
    "option_twice": (lambda: parse_options(None, {"config": CONFIG, "seed": 1}), "'seed' leave"),
    "compiler": (lambda: parse_options(None, {"compiler": "gcc"}), "'compiler' aot_eager 'gcc'"),
    "modes": (lambda: parse_options("default", {"mode": "max-autotune"}), "'default' 'max-autotune' contradict"),
    "mode": (lambda: parse_options("max-autotun", {}), "'max-autotun' 'max-autotune'"),
    "not_inductor": (lambda: parse_options(None, {"compiler": "eager", "cpp.threads": 1}), "cpp.threads 'eager' leave"),
    "device": (lambda: parse_options(None, {"device": "H300"}), "'device' 'H300' slope_compile.cost.Device"),
    "fusion": (lambda: parse_options(None, {"fusions": "fuze"}), "'fusions' 'fuze' 'fuse'"),
    "settled": (lambda: from_dynamo(prepared(), backward="exact"), "'backward' '1' 'double_pruned' leave"),
    # conversions
    "nothing_eligible": (lambda: slope.sparsify_(blocks(), SlopeConfig(include=())), "0: excluded include SlopeConfig"),
    "prepared_twice": (lambda: slope.sparsify_(prepared()), "'1' densify_"),
    "meta": (lambda: slope.sparsify_(blocks(device="meta")), "'1' to_empty"),
    "gradient": (lambda: slope.sparsify_(with_gradient()), "'1' zero_grad"),
    "optimizer": (optimizer_has_state, "'1' new optimizer"),
    "moments": (other_moments, "AdamW 'exp_avg' '1 (8, 8) (8,) SlopeConfig optimizer"),
    "data_parallel": (wrapped_model, "sparsify_ DistributedDataParallel first"),
    "shards": (sharded_weights, "'blocks.0.up' fully_shard sparsify_ first"),
    "not_prepared": (lambda: slope.densify_(blocks()), "densify_ sparsify_"),
    "no_columns": (lambda: slope.refresh_columns_(blocks()), "refresh_columns_ sparsify_"),
    "transformed_twice": (lambda: slope.transform(slope.transform(graph())), "transform original"),
    "nothing_in_graph": (lambda: slope.transform(graph(), SlopeConfig(include=())), "0 excluded include SlopeConfig"),
    "explain": (lambda: slope.explain(nn.ReLU(), torch.randn(2)), "ReLU TORCH_LOGS"),
    "paths": (lambda: slope.training_state(blocks(), paths=["9"]), "'9' 0 1 2 3"),
    "corrupt": (lambda: metadata.check_pattern(mask() * 0, 8, Pattern(2, 4), "a.b"), "a.b 8 2 of 4"),
    "pattern_shape": (lambda: metadata.check_pattern(mask(), 24, Pattern(2, 4), "a.b"), "a.b uint8 24 [4, 1]"),
    # adapters
    "no_adapters": (lambda: slope.set_adapters(blocks(), True), "set_adapters adapter_rank"),
    "steps": (lambda: schedule(total_steps=0), "total_steps 1 0"),
    "steps_in_words": (lambda: schedule(total_steps="ten"), "total_steps int 'ten'"),
    "start_twice": (lambda: schedule(fraction=0.5, start_step=3), "fraction start_step one"),
    "fraction": (lambda: schedule(fraction=2.0), "fraction 1 2.0"),
    "start_step": (lambda: schedule(start_step=-1), "start_step 0 -1"),
    "start_after_the_end": (lambda: schedule(start_step=11), "start_step total_steps 10 11"),
    "lr_scale": (lambda: schedule(lr_scale=0.0), "lr_scale positive 0.0"),
    "no_optimizer": (lambda: schedule(lr_scale=2.0), "lr_scale optimizer="),
    "optimizer_first": (optimizer_without_adapters, "AdapterSchedule SGD .A sparsify_ add_param_group"),
    "unused_adapters": (wrapped_adapters, "DistributedDataParallel find_unused_parameters=True"),
    "state": (wrong_state, "total_steps AdapterSchedule"),
    "config_twice": (lambda: schedule(config=CONFIG), "config leave"),
    "schedule_without_config": (lambda: schedule(model=blocks()), "AdapterSchedule config=SlopeConfig(adapter_rank"),
    "schedule_without_rank": (lambda: schedule(model=blocks(), config=CONFIG), "AdapterSchedule adapter_rank"),
    "adapters_without_rank": (lambda: slope.sparsify.add_adapters_(blocks(), CONFIG), "adapter_rank"),
    # cost model
    "rate": (lambda: peaks(peak=0.0), "'a' peak positive 0.0"),
    "launch": (lambda: peaks(launch=-1.0), "'a' launch 0 -1.0"),
    "sheet": (lambda: cost.device("H300"), "'H300' H200 slope_compile.cost.Device"),
    "layer": (lambda: cost.Layer(8, 6, 4), "K 6 4 pattern"),
    "not_linear": (lambda: cost._line(cost.M**2), "M**2 slope_compile.cost.M"),
    # command line
    "inspect_config": (lambda: cli_inspect._config(Path("nowhere.json")), "--config nowhere.json"),
    "inspect_target": (lambda: cli_inspect.load("model"), "MODULE:FACTORY 'model'"),
    "inspect_module": (lambda: cli_inspect.load("no_such_module:f"), "'no_such_module' folder"),
    "inspect_function": (lambda: cli_inspect.load("json:no_such"), "json 'no_such'"),
    "inspect_result": (lambda: cli_inspect.load("builtins:dict"), "builtins:dict (model, args) dict"),
    "inspect_args": (lambda: cli_inspect.load("test_catalogue:bad_arguments"), "bad_arguments tuple int"),
    "level": (unknown_level, "SLOPE_COMPILE_CPU 'sse' avx2"),
}  # fmt: skip
"""Name -> (what raises it, the words that its message has: the thing, the value, the way out)."""


def bad_arguments() -> tuple[nn.Module, int]:
    return blocks(), 3


@functools.cache
def raised(name: str) -> tuple[str, Path, int]:
    """Message, file and line of a case's error."""
    try:
        ERROR_CASES[name][0]()
    except SlopeError as error:
        traceback = error.__traceback__
        assert traceback is not None
        while traceback.tb_next is not None:
            traceback = traceback.tb_next
        return str(error), Path(traceback.tb_frame.f_code.co_filename).resolve(), traceback.tb_lineno
    raise AssertionError(f"{name} raised nothing")


@pytest.mark.parametrize("name", ERROR_CASES)
def test_error(name: str) -> None:
    message, _, _ = raised(name)
    words = ERROR_CASES[name][1].split()
    assert [word for word in words if word not in message] == [], message


def test_every_statement_that_raises_one_is_met() -> None:
    statements = set()
    for folder in FOLDERS:
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Raise) or not isinstance(node.exc, ast.Call):
                    continue
                if isinstance(node.exc.func, ast.Name) and node.exc.func.id in ERRORS:
                    assert node.end_lineno is not None
                    statements.add((path.resolve(), node.lineno, node.end_lineno))
    met = {(path, line) for _, path, line in map(raised, ERROR_CASES)}
    missed = {s for s in statements if not any(path == s[0] and s[1] <= line <= s[2] for path, line in met)}
    assert not missed, "\n".join(f"{path.relative_to(ROOT)}:{line} has no case" for path, line, _ in sorted(missed))
    assert len(statements) > 50
