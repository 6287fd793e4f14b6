"""The table of a GPU: measured with wrong ways left out, stored, found again, and looked up by ranges of sizes."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from slope_compile.kernels import (
    _cusparselt,
    cache_files,
    few_self_test,
    few_tokens,
    gluon_configs,
    gluon_products,
    gluon_self_test,
    gpu_calls,
    gpu_ops,
    gpu_rules,
    gpu_tuning,
    measured,
    reference,
    self_tests,
)
from slope_compile.kernels.gpu_tuning import Entry, Problem, Table

CPU = torch.device("cpu")
HALF = torch.bfloat16
EVERY = gpu_rules.WAYS


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_files, "cache_folder", lambda: tmp_path)
    gpu_tuning.load.cache_clear()


def entry(M: int, op: str = "forward", N: int = 4096, K: int = 4096, **seconds: float) -> Entry:
    return Entry(op, "bfloat16", M, N, K, seconds)


TABLE = Table(
    "a GPU",
    (
        entry(16, triton=1.0, mma_sp=0.5, expanded=3.0),
        entry(1024, triton=3.0, cusparselt=1.0, expanded=2.0),
        entry(16384, triton=3.0, expanded=1.0),
        entry(16, N=64, triton=3.0, expanded=1.0),
    ),
)


def test_token_counts_are_looked_up_by_ranges() -> None:
    def fastest(M: int, among: tuple[str, ...] = EVERY, N: int = 4096) -> str | None:
        return TABLE.fastest("forward", M, N, 4096, HALF, among)

    assert [fastest(M) for M in (1, 16, 127, 129, 1024, 4095, 4097, 1 << 20)] == (
        ["mma_sp"] * 3 + ["cusparselt"] * 3 + ["expanded"] * 2
    )
    assert fastest(16, ("triton", "expanded")) == "triton"
    assert fastest(16, N=64) == "expanded"
    assert TABLE.fastest("grad_weight", 16, 4096, 4096, HALF, EVERY) is None
    assert TABLE.fastest("forward", 16, 4096, 4096, torch.float16, EVERY) == "mma_sp", "as bfloat16"
    assert TABLE.fastest("forward", 16, 4096, 4096, torch.float32, EVERY) is None


def test_the_kernel_wins_a_near_tie() -> None:
    table = Table("a GPU", (entry(16, triton=1.0, expanded=0.98),))
    assert table.fastest("forward", 16, 4096, 4096, HALF, EVERY) == "triton"


def test_a_table_remembers_its_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking through hundreds of entries takes longer than many a product; it does not grow without bound."""
    table, searched = Table("a GPU", TABLE.entries), []
    search = Table._fastest

    def counted(self: Table, *case: Any) -> str | None:
        searched.append(case)
        return search(self, *case)

    monkeypatch.setattr(Table, "_fastest", counted)
    monkeypatch.setattr(measured, "MOST", 4)
    for _ in range(3):
        assert table.fastest("forward", 16, 4096, 4096, HALF, EVERY) == "mma_sp"
        assert table.fastest("grad_weight", 16, 4096, 4096, HALF, EVERY) is None
    assert len(searched) == 2
    for M in range(1, 20):
        table.fastest("forward", M, 4096, 4096, HALF, EVERY)
        assert len(table._answers) <= 4
    assert table == Table("a GPU", TABLE.entries)
    assert table.digest() == Table("a GPU", TABLE.entries).digest()


def test_a_stored_table_decides_from_then_on() -> None:
    before = gpu_rules.fingerprint("a GPU")
    assert gpu_rules.way("forward", 1024, 4096, 4096, HALF, "a GPU", EVERY) == "expanded"
    path = gpu_tuning.save(TABLE)
    assert json.loads(path.read_text())["versions"]["torch"] == torch.__version__
    assert gpu_tuning.load("a GPU") == TABLE
    assert gpu_rules.way("forward", 1024, 4096, 4096, HALF, "a GPU", EVERY) == "cusparselt"
    assert gpu_rules.way("forward", 1024, 4096, 4096, HALF, "a GPU") == "expanded"
    assert gpu_rules.way("forward", 1024, 4096, 4096, HALF, "another GPU", EVERY) == "expanded"
    # What was compiled under the old decisions is not taken from a cache.
    assert gpu_rules.fingerprint("a GPU") != before
    assert gpu_rules.fingerprint("another GPU") == before


@pytest.mark.parametrize("gpu", ["NVIDIA H200", "NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB"])
def test_a_table_comes_with_the_package(gpu: str) -> None:
    table = gpu_tuning.load(gpu)
    assert table is not None
    assert table.gpu == "NVIDIA H200"
    assert {entry.op for entry in table.entries} == set(gpu_tuning.OPS)
    for entry in table.entries:
        assert set(entry.seconds) <= set(EVERY)
        assert "expanded" in entry.seconds
        assert all(0 < seconds < 1 for seconds in entry.seconds.values())
    # A table of one's own goes before.
    gpu_tuning.save(Table(gpu, TABLE.entries))
    assert gpu_tuning.load(gpu) == Table(gpu, TABLE.entries)


def test_no_table_for_other_gpus() -> None:
    assert gpu_tuning.load("NVIDIA A100-SXM4-80GB") is None
    assert gpu_tuning.load("NVIDIA H20") is None


def test_every_table_of_the_package_is_somebody_s() -> None:
    folder = Path(gpu_tuning.__file__).with_name("tuned")
    assert {path.stem for path in folder.iterdir()} == gpu_tuning.RELATIVES.keys()


def test_other_versions_measure_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_tuning.save(TABLE)
    other = gpu_tuning.versions() | {"cusparselt": "900"}
    monkeypatch.setattr(gpu_tuning, "versions", lambda: other)
    gpu_tuning.load.cache_clear()
    assert gpu_tuning.load("a GPU") is None


def test_other_kernels_are_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of one's own; the one of the package holds until the next version of the package."""
    sources = gpu_tuning.sources()
    names = {path.name for path in sources}
    assert {"triton_kernels.py", "gluon_mma_sp.py", "gluon_wgmma_sp.py", "gluon_few_tokens.py"} < names
    gpu_tuning.save(TABLE)
    changed = tmp_path / sources[0].name
    changed.write_text(sources[0].read_text() + "# changed\n")
    monkeypatch.setattr(gpu_tuning, "sources", lambda: [changed, *sources[1:]])
    gpu_tuning.load.cache_clear()
    assert gpu_tuning.load("a GPU") is None
    shipped = gpu_tuning.load("NVIDIA H200")
    assert shipped is not None
    assert shipped.gpu == "NVIDIA H200"


@pytest.mark.parametrize("text", ["{", '{"format": 0}', '{"format": 1, "gpu": "a GPU", "entries": [{"op": 1}]}'])
def test_a_table_that_cannot_be_read_is_reported(text: str, caplog: pytest.LogCaptureFixture) -> None:
    gpu_tuning.table_path("a GPU").write_text(text)
    assert gpu_tuning.load("a GPU") is None
    assert "cannot be read" in caplog.text


def test_measuring_leaves_out_what_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    definitions: dict[str, Callable[..., Tensor]] = {
        "forward": lambda x, values, pattern: reference.forward(x, values, pattern, None, 2, 4),
        "grad_input": functools.partial(reference.grad_input, keep=2, group=4),
        "grad_input_columns": functools.partial(reference.grad_input_columns, keep=2, group=4),
        "grad_weight": functools.partial(reference.grad_weight, keep=2, group=4),
    }

    def run(op: str, way: str, problem: Problem) -> Tensor:
        result = definitions[op](*problem.arguments(op))
        assert result.shape == problem.size(op)
        return {"mma_sp": result.roll(1, 0), "cusparselt": result * torch.nan}.get(way, result)

    def seconds(call: Callable[[], object]) -> float:
        call()
        return 2.0 if call.args[1] == "triton" else 1.0  # type: ignore[attr-defined]

    found = list(gpu_tuning.measure(CPU, lambda *_: EVERY, run, seconds, tokens=(5, 16), shapes=((24, 32),)))
    assert {(e.op, e.dtype, e.M) for e in found} == {
        (op, dtype, M) for op in gpu_tuning.OPS for dtype in gpu_tuning.DTYPES for M in (5, 16)
    }
    for one in found:
        assert one.seconds == {"triton": 2.0, "few": 1.0, "wgmma_sp": 1.0, "expanded": 1.0}, one
    assert "mma_sp of grad_weight is wrong" in caplog.text


def test_a_way_that_cannot_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules' first choice may not exist here or be wrong: the next best is taken, and nothing else is tested."""
    gpu_tuning.save(TABLE)
    monkeypatch.setattr(gpu_ops, "name", lambda device: "a GPU")
    asked: list[str] = []

    def can(way: str, *case: object) -> bool:
        asked.append(way)
        return way in ("triton", "expanded")

    monkeypatch.setattr(gpu_calls, "can", can)
    assert gpu_calls.chosen("forward", 1024, 4096, 4096, HALF, CPU) == "expanded"
    assert asked == ["cusparselt", "expanded"]
    asked.clear()
    assert gpu_calls.chosen("forward", 16, 4096, 4096, HALF, CPU) == "triton"
    assert asked == ["mma_sp", "triton"]


def test_the_tiles_of_a_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Gluon kernels those that are right; a product that names one takes that one."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gluon_products, "processors", lambda device: 132)
    wrong = gluon_configs.MMA_SP[1]
    monkeypatch.setattr(gluon_self_test, "passes", lambda device, dtype, config, *_: config != wrong)
    monkeypatch.setattr(few_self_test, "passes", lambda *case: True)

    def tiles(way: str, M: int, op: str = "forward") -> tuple[str, ...]:
        return gpu_calls.tiles(way, op, M, 64, 128, HALF, device)

    assert tiles("triton", 16) == tiles("cusparselt", 16) == tiles("expanded", 16) == ()
    assert tiles("few", 1) == tuple(map(str, few_tokens.configurations(1, 128)))
    few = tiles("mma_sp", 1)
    assert str(gluon_configs.MMA_SP[0]) in few
    assert str(wrong) not in few
    every = (*tiles("mma_sp", 4096, "grad_input_columns"), *tiles("wgmma_sp", 4096))
    assert set(every) == {str(c) for c in (*gluon_configs.MMA_SP, *gluon_configs.WGMMA_SP)} - {str(wrong)}
    for name in every:
        config = gpu_calls._gluon_config("", 4096, 64, 128, device, name)
        assert str(config) == name
    assert gpu_calls.can("mma_sp", "forward", 1, 64, 128, HALF, device, 0, few[0])
    assert not gpu_calls.can("mma_sp", "forward", 1, 64, 128, HALF, device, 0, str(wrong))


def test_every_tile_has_a_name_of_its_own() -> None:
    configs = (*gluon_configs.MMA_SP, *gluon_configs.WGMMA_SP)
    assert len({str(config) for config in configs}) == len(configs)
    for some in few_tokens.CONFIGS.values():
        assert len({str(config) for config in some}) == len(some)


def test_which_ways_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    right, recording, capability = True, True, (9, 0)
    monkeypatch.setattr(_cusparselt, "missing", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    monkeypatch.setattr(gluon_products, "processors", lambda device: 132)
    monkeypatch.setattr(gluon_self_test, "passes", lambda *case: right)
    monkeypatch.setattr(few_self_test, "passes", lambda *case: right)
    monkeypatch.setattr(self_tests, "_results", {})

    def ways(op: str, M: int, dtype: torch.dtype = HALF) -> tuple[str, ...]:
        return gpu_calls.possible(op, M, 64, 64, dtype, torch.device("cuda", 0))

    plain = ("triton", "expanded")
    # A kernel that was not tested yet cannot be while a graph is recorded.
    assert ways("forward", 16) == ("triton", "cusparselt", "expanded")
    recording = False
    assert ways("forward", 8) == ways("grad_input_columns", 8) == EVERY
    many = tuple(way for way in EVERY if way != "few")
    assert ways("forward", 16) == ways("grad_input_columns", 16) == many
    recording = True
    assert ways("forward", 16) == many
    assert ways("forward", 8) == EVERY
    assert ways("forward", 1) == many, "not tested yet"
    assert ways("grad_input", 16) == ways("grad_weight", 16) == ways("forward", 0) == plain
    assert ways("forward", 16, torch.float32) == ("triton", "cusparselt", "expanded")  # whose own check is faked here
    capability = (8, 0)
    assert ways("forward", 8) == ("triton", "few", "mma_sp", "cusparselt", "expanded")
    right = False
    self_tests._results.clear()
    assert ways("forward", 8) == ("triton", "cusparselt", "expanded")
