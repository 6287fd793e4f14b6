"""The compiler's output for the Gluon kernels, checked without a GPU, and the guards of a build.

Only a part of all builds is compiled here; ``python tests/gluon_offline.py`` compiles each.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gluon_offline import Build, Result, builds, compile_offline
from slope_compile.kernels import cache_files, gluon_builds, gluon_products
from slope_compile.kernels.gluon_configs import MMA_SP, WGMMA_SP
from slope_compile.kernels.launching import Launcher
from triton_offline import SHARED_MEMORY

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    "build",
    [
        Build(MMA_SP[-1], BF16, 80, aligned=True),
        Build(None, FP16, 80, aligned=False),
        Build(WGMMA_SP[0], FP16, 90, aligned=False, low_rank=True),
        Build(WGMMA_SP[1], BF16, 90, aligned=True, halves=True),
        Build(MMA_SP[-2], BF16, 120, aligned=False, low_rank=True),
        *(
            pytest.param(build, marks=pytest.mark.slow)
            for build in (
                Build(MMA_SP[-1], FP16, 90, aligned=True, split=True),
                Build(MMA_SP[0], BF16, 100, aligned=False, ones=True),
                Build(WGMMA_SP[1], BF16, 90, aligned=True, split=True),
                Build(WGMMA_SP[-1], BF16, 90, aligned=True, low_rank=True),
            )
        ),
    ],
    ids=str,
)
def test_machine_code(build: Build) -> None:
    pytest.importorskip("triton")
    assert not compile_offline(build).problems(build)


@pytest.mark.slow
@pytest.mark.parametrize("build", list(builds((90,))), ids=str)
def test_all_machine_code_for_sm_90(build: Build) -> None:
    pytest.importorskip("triton")
    assert not compile_offline(build).problems(build)


GOOD_MMA = Result(0, 64, 1024, sparse=2, dense=0, copies=8, unfilled=0, narrow=2, ldmatrix=4, in_flight=0, loop=90)
GOOD_WGMMA = Result(0, 64, 1024, sparse=8, dense=8, copies=29, unfilled=0, narrow=0, ldmatrix=8, in_flight=2, loop=260)


@pytest.mark.parametrize(
    ("build", "good", "bad"),
    [
        (
            Build(MMA_SP[0], BF16, 80, aligned=True), GOOD_MMA,
            (
                {"spills": 1}, {"shared": SHARED_MEMORY[80] + 1}, {"sparse": 1}, {"dense": 1}, {"copies": 0},
                {"unfilled": 1}, {"narrow": 1}, {"ldmatrix": 3},
            ),
        ),
        (
            Build(WGMMA_SP[1], BF16, 90, aligned=True, low_rank=True), GOOD_WGMMA,
            (
                {"spills": 1}, {"shared": SHARED_MEMORY[90] + 1}, {"sparse": 0}, {"dense": 0}, {"copies": 28},
                {"unfilled": 1}, {"ldmatrix": 7}, {"in_flight": 0}, {"build": ("serialized",)},
            ),
        ),
    ],
    ids=("mma_sp", "wgmma_sp"),
)  # fmt: skip
def test_bad_machine_code_is_noticed(build: Build, good: Result, bad: tuple[dict[str, Any], ...]) -> None:
    assert good.problems(build) == []
    for change in bad:
        assert len(dataclasses.replace(good, **change).problems(build)) == 1


PTX = """
    mov.b32 %r1, global_smem;
    add.s32 %r2, %r1, 196608;
    mbarrier.init.shared::cta.b64 [%r2], 1;
    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r7, %r8}], [%r2];
    add.s32 %r3, %r1, 49152;
    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [ %r3 + 0 ], [%rd2, {%r7, %r8}], [%r2];
    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1+8192], [%rd1, {%r7, %r8}], [%r2];
    mov.u32 %r4, %r3;
    add.s32 %r5, %r4, 8192;
    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r5], [%rd2, {%r7, %r8}], [%r2];
    shl.b32 %r9, %r8, 13;
    add.s32 %r10, %r1, %r9;
    cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r10], [%rd1, {%r7, %r8}], [%r2];
"""


def test_where_the_first_copies_go() -> None:
    assert gluon_builds.first_copies(PTX) == [0, 49152, 8192, 57344]
    assert gluon_builds.first_copies(PTX.replace("global_smem", "shared_memory")) == []


def test_a_build_that_must_not_be_used() -> None:
    config = dataclasses.replace(WGMMA_SP[1], stages=6)  # of 8192 bytes each, both
    six = [f"[%r1+{at}]" for i in range(6) for at in (i * 8192, 49152 + i * 8192)]
    ptx = "mov.b32 %r1, global_smem;\n" + "\n".join(
        f"cp.async.bulk.tensor.2d.shared::cta.global {at}, [%rd1];" for at in six
    )
    assert gluon_builds.problems(ptx, config, "ptxas info: Used 152 registers") == []
    assert (
        "begin"
        in gluon_builds.problems(ptx.replace("global_smem;", "global_smem;\nadd.s32 %r1, %r1, 1024;"), config, "")[0]
    )
    swapped = ptx.replace("[%r1+0]", "[%r1+x]").replace("[%r1+49152]", "[%r1+0]").replace("[%r1+x]", "[%r1+49152]")
    assert "begin" in gluon_builds.problems(swapped, config, "")[0]
    assert "otherwise" in gluon_builds.problems(ptx.replace("global_smem", "arena"), config, "")[0]
    for said in (
        "ptxas info    : (C7513) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...",
        "warning C7515: something about wgmma",
    ):
        assert "serializes" in gluon_builds.problems(ptx, config, said)[0]


NAIVE = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry kernel(.param .u64 out, .param .u64 descriptor)
{
    .reg .b32 %a<5>;
    .reg .f32 %c<5>;
    .reg .b64 %d<5>;
    ld.param.u64 %d1, [out];
    ld.param.u64 %d2, [descriptor];
    mov.f32 %c0, 0f00000000;
    mov.f32 %c1, 0f00000000;
    mov.f32 %c2, 0f00000000;
    mov.f32 %c3, 0f00000000;
    mov.u32 %a0, %tid.x;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%c0,%c1,%c2,%c3}, {%a0,%a0,%a0,%a0}, %d2, 1, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    add.f32 %c1, %c1, 0f3F800000;
    wgmma.wait_group.sync.aligned 0;
    st.global.f32 [%d1], %c1;
    ret;
}
"""


def test_what_ptxas_says_is_read() -> None:
    """A kernel that uses a result before it waits: ptxas must serialize it, and says so."""
    pytest.importorskip("triton")
    from slope_compile.kernels._gluon import assembler

    said = gluon_builds.assemble(NAIVE, assembler(90), "sm_90a")
    assert any("serializes" in problem for problem in gluon_builds.problems("", WGMMA_SP[0], said))


def test_ptxas_runs_once_for_a_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another process reads what it said; another kernel or another ptxas is another file."""
    monkeypatch.setattr(cache_files, "cache_folder", lambda: tmp_path)
    assembled: list[str] = []

    def assemble(ptx: str, assembler: str, arch: str) -> str:
        assembled.append(ptx)
        return f"said of {ptx}"

    monkeypatch.setattr(gluon_builds, "assemble", assemble)
    ptxas = tmp_path / "ptxas"
    ptxas.write_text("one")
    for _ in range(2):
        assert gluon_builds.messages("first", str(ptxas), "sm_90a") == "said of first"
        assert gluon_builds.messages("second", str(ptxas), "sm_90a") == "said of second"
    assert assembled == ["first", "second"]
    ptxas.write_text("another")
    assert gluon_builds.messages("first", str(ptxas), "sm_90a") == "said of first"
    next(path for path in tmp_path.iterdir() if "said of second" in path.read_text()).write_text("half")
    assert gluon_builds.messages("second", str(ptxas), "sm_90a") == "said of second"
    assert assembled == ["first", "second", "first", "second"]


class _Stop(Exception):
    pass


class _Driver:
    """Answers Triton's questions about a device as an H100 would."""

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: object = None) -> int:
        return 0


class _Kernels(SimpleNamespace):
    """The kernels, that can be compiled and not launched."""

    def __init__(self) -> None:
        from slope_compile.kernels import gluon_wgmma_sp

        super().__init__(tiles=gluon_wgmma_sp.tiles, warmup=gluon_wgmma_sp.forward.warmup)
        self.forward = Launcher(self)

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        raise _Stop


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors on the CPU are taken for those of a GPU up to the launch."""
    runtime = pytest.importorskip("triton.runtime")
    monkeypatch.setattr(runtime.driver, "_active", _Driver())
    kernels = _Kernels()
    monkeypatch.setattr(gluon_products, "_wgmma_kernels", lambda: kernels)
    monkeypatch.setattr(gluon_products, "_build_problems", {})
    monkeypatch.setattr(gluon_products, "_on_gpu", lambda tensor: True)


def _launch() -> None:
    x, values = torch.zeros(33, 144, dtype=BF16), torch.zeros(72, 72, dtype=BF16)
    pattern = torch.zeros(72, 18, dtype=torch.uint8)
    gluon_products.wgmma_sp(x, values, pattern, None, None, WGMMA_SP[1])


@pytest.mark.usefixtures("offline")
def test_a_build_is_checked_before_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a launch compiles it, from its arguments: accepted as it is, and refused when ptxas serializes."""
    with pytest.raises(_Stop):
        _launch()
    monkeypatch.setattr(gluon_products, "_build_problems", {})
    monkeypatch.setattr(gluon_builds, "messages", lambda *args: "C7513: wgmma serialized")
    for _ in range(2):  # also the second time, from memory
        with pytest.raises(RuntimeError, match=r"wgmma_sp_64x128_w4 must not be used .*C7513"):
            _launch()
