"""Which Gluon kernel may compute what, which may be chosen, and that a wrong one never is."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from gluon_cpu import Executor
from problems import Shape, draw
from slope_compile.kernels import (
    gluon_choices,
    gluon_configs,
    gluon_products,
    gluon_self_test,
    gpu_calls,
    gpu_ops,
    gpu_self_test,
    self_tests,
)
from slope_compile.kernels.gluon_configs import MMA_SP, WGMMA_SP, Config, WgmmaSp
from slope_compile.pattern import Pattern

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("kernel", "capability", "dtype", "sizes", "reason"),
    [
        ("mma_sp", (8, 0), BF16, (1, 7, 20), None),
        ("mma_sp", (12, 0), FP16, (1, 7, 20, 5), None),
        ("mma_sp", (7, 5), FP16, (1, 8, 16), "7, 5"),
        ("mma_sp", (8, 0), torch.float32, (1, 8, 16), "float32"),
        ("mma_sp", (8, 0), BF16, (1, 8, 18), "K = 18"),
        ("wgmma_sp", (9, 0), BF16, (1, 7, 16), None),
        ("wgmma_sp", (9, 0), FP16, (1, 7, 16, 512), None),
        ("wgmma_sp", (9, 0), FP16, (1, 7, 16, 513), "513"),
        ("wgmma_sp", (9, 0), BF16, (1, 8, 24), "K = 24"),
        ("wgmma_sp", (8, 0), BF16, (1, 8, 16), "8, 0"),
        ("wgmma_sp", (10, 0), BF16, (1, 8, 16), "10, 0"),
        ("wgmma_sp", (9, 0), torch.float32, (1, 8, 16), "float32"),
    ],
)
def test_what_is_supported(
    kernel: str, capability: tuple[int, int], dtype: torch.dtype, sizes: tuple[int, ...], reason: str | None
) -> None:
    found = gluon_products.unsupported(kernel, capability, dtype, *sizes)
    assert found is None if reason is None else reason in str(found)


def test_what_may_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(self_tests, "_results", {})
    asked: list[tuple[Config, bool, bool, bool]] = []

    def passes(
        device: torch.device, dtype: torch.dtype, config: Config, bias: bool, low_rank: bool, in_eights: bool
    ) -> bool:
        asked.append((config, bias, low_rank, in_eights))
        return config not in (MMA_SP[0], WGMMA_SP[0])

    monkeypatch.setattr(gluon_self_test, "passes", passes)
    assert gluon_choices.choices(1, 64, 64, 0, CUDA, BF16) == MMA_SP[1:4]
    assert asked == [(config, True, True, True) for config in MMA_SP[:4]]
    assert gluon_choices.choices(4096, 68, 64, 8, CUDA, FP16, bias=False) == (*MMA_SP[1:], *WGMMA_SP[1:])
    assert asked[-1] == (WGMMA_SP[-1], False, True, False)
    assert gluon_choices.choices(4096, 64, 68, 0, CUDA, FP16) == MMA_SP[1:]
    assert gluon_choices.choices(64, 64, 64, 0, CUDA, FP16) == (*MMA_SP[1:], *WGMMA_SP[1:3])
    assert gluon_choices.choices(4096, 64, 64, 300, CUDA, FP16) == (*MMA_SP[1:], WGMMA_SP[1])
    assert gluon_choices.choices(4096, 64, 64, 0, CUDA, torch.float32) == ()
    assert gluon_choices.choices(4096, 64, 64, 0, CPU, BF16) == ()


def test_products_that_are_tested_alike_are_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts for ``wgmma.sp`` is whether the outputs come in eights, and for ``mma.sp`` not even that."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gluon_products, "processors", lambda device: 132)
    monkeypatch.setattr(self_tests, "_results", {})
    tested: list[tuple[object, ...]] = []

    def passes(*case: object) -> bool:
        tested.append(case)
        return True

    monkeypatch.setattr(gluon_self_test, "passes", passes)
    for N in range(64, 80):
        for R in (0, 8):
            gluon_choices.choices(4096, N, 64, R, CUDA, BF16)
            for config in (*MMA_SP, *WGMMA_SP):
                way = "wgmma_sp" if isinstance(config, WgmmaSp) else "mma_sp"
                assert gpu_calls.can(way, "forward", 4096, N, 64, BF16, CUDA, R, str(config))
    assert len(tested) == len(set(tested)) == 2 * len(MMA_SP) + 8 * len(WGMMA_SP)


FAULTS = (
    ("gluon_mma_sp", MMA_SP[0], ('MMA + "0x1;"', 'MMA + "0x0;"'), "is wrong"),
    ("gluon_mma_sp", MMA_SP[0], ("wait_for_copies(STAGES - 2)", "pass"), "does not run"),
    ("gluon_wgmma_sp", WGMMA_SP[0], ("tile, {e}, {step}, 1", "tile, {e}, 0, 1"), "is wrong"),
    ("gluon_wgmma_sp", WGMMA_SP[0], ("[b0, b1, b2, b3", "[b0, b1, b1, b3"), "is wrong"),
    (
        "gluon_wgmma_sp",
        WGMMA_SP[0],
        ("        barrier()\n        before", "        before"),
        "not run",
    ),
)


@pytest.mark.parametrize(("module", "config", "fault", "said"), FAULTS)
def test_a_wrong_kernel_is_not_used_and_the_log_says_so(
    module: str, config: Config, fault: tuple[str, str], said: str,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    executor = Executor(module, (fault,))
    for other in ("mma_sp", "wgmma_sp"):
        whole = executor if module == f"gluon_{other}" else Executor(f"gluon_{other}")
        monkeypatch.setattr(gluon_products, "_kernels" if other == "mma_sp" else "_wgmma_kernels", lambda w=whole: w)
    with caplog.at_level(logging.WARNING):
        assert not gluon_self_test.passes(CPU, BF16, config)
    assert said in caplog.text
    assert "is not used" in caplog.text
    assert str(config) in caplog.text


def test_results_that_nobody_wrote_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that does nothing meets the right numbers of the run before in memory that is used again."""
    executor = Executor("gluon_mma_sp")
    monkeypatch.setattr(gluon_products, "_kernels", lambda: executor)
    assert gluon_self_test.passes(CPU, BF16, MMA_SP[0])
    nothing = SimpleNamespace(forward=_Nothing(), add_up=_Nothing())
    monkeypatch.setattr(gluon_products, "_kernels", lambda: nothing)
    assert not gluon_self_test.passes(CPU, BF16, MMA_SP[0])


def test_a_kernel_that_hides_what_is_not_finite_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    executor = Executor("gluon_mma_sp")
    monkeypatch.setattr(gluon_products, "_kernels", lambda: executor)
    right = gluon_products.mma_sp
    monkeypatch.setattr(gluon_products, "mma_sp", lambda *given: right(*given).nan_to_num(0.0))
    assert not gluon_self_test.passes(CPU, BF16, MMA_SP[0])
    assert "is wrong" in caplog.text


def places(rows: int, columns: int) -> set[tuple[int, int, int]]:
    """Row of 16, group of 16 and pattern, as they meet in a self-test's mask."""
    codes = gpu_self_test._mask(rows, columns).view(rows, columns // 4, 4).long() @ torch.tensor([1, 2, 4, 8])
    return {(r % 16, g % 16, int(code)) for r, groups in enumerate(codes) for g, code in enumerate(groups)}


def test_the_self_test_meets_every_pattern_in_every_lane_position() -> None:
    sizes = (*gluon_self_test.MMA_SP_SIZES, *gluon_self_test._wgmma_sp_sizes(WGMMA_SP[0], True, True))
    for split in (False, True):
        seen = set().union(*(places(N, K) for _, N, K, _, splits in sizes if (splits > 1) == split))
        assert len(seen) == 16 * 16 * 6


def test_so_does_that_of_the_triton_kernels() -> None:
    assert len(places(gpu_self_test.N, gpu_self_test.K)) == 16 * 16 * 6
    assert len(places(gpu_self_test.K, gpu_self_test.N)) == 16 * 16 * 6, "of columns"


class _Nothing:
    def __getitem__(self, grid: tuple[int, ...]) -> object:
        return lambda *args, **options: None


def test_nothing_takes_it_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Tensor, **named: object) -> Tensor:
        raise AssertionError

    taken = SimpleNamespace(forward=lambda x, *rest, **named: x)
    monkeypatch.setattr(gluon_products, "mma_sp", refused)
    monkeypatch.setattr(gluon_products, "wgmma_sp", refused)
    monkeypatch.setattr(gpu_ops, "triton_products", taken)
    monkeypatch.setattr(gpu_ops, "usable", lambda *args: True)
    monkeypatch.setattr(gpu_ops, "_takes_triton", lambda *args: True)
    p = draw(Pattern(2, 4), Shape((1,), 64, 16), BF16)
    assert gpu_ops.linear(p.x, p.values, p.pattern, p.bias, 2, 4) is p.x


@pytest.mark.parametrize(("M", "config"), [(1, 0), (8, 0), (9, 2), (16, 2), (17, 4), (33, 5), (65, 7), (9999, 7)])
def test_the_default_configuration(M: int, config: int) -> None:
    assert gluon_configs.default(M) is MMA_SP[config]


@pytest.mark.parametrize(
    ("M", "N", "K", "config"),
    [
        (1, 4096, 4096, 1), (64, 4096, 4096, 1), (64, 14336, 4096, 1), (64, 64, 1024, 0), (128, 4096, 4096, 0),
        (256, 14336, 4096, 3), (512, 4096, 4096, 2), (2048, 4096, 4096, 3), (16384, 1024, 4096, 3),
        (4096, 768, 3072, 3),
    ],
)  # fmt: skip
def test_the_default_configuration_of_wgmma(M: int, N: int, K: int, config: int) -> None:
    assert gluon_configs.default_wgmma(M, N, K, 132) is WGMMA_SP[config]


def test_how_many_programs_share_a_sum() -> None:
    assert gluon_configs.splits(1, 4096, 4096, MMA_SP[0], 132) == 4  # 64 programs for 132 processors
    assert gluon_configs.splits(16, 64, 8192, MMA_SP[2], 132) == 16  # 8 blocks each
    assert gluon_configs.splits(16, 64, 64, MMA_SP[2], 132) == 1
    assert gluon_configs.splits(16, 1 << 20, 4096, MMA_SP[2], 132) == 1
    assert gluon_configs.splits(64, 4096, 4096, MMA_SP[6], 132) == 8
    assert gluon_configs.splits(65, 64, 8192, MMA_SP[6], 132) == 1


def test_how_many_programs_of_wgmma_share_a_sum() -> None:
    assert gluon_configs.splits(64, 4096, 4096, WGMMA_SP[0], 132) == 2
    assert gluon_configs.splits(64, 14336, 4096, WGMMA_SP[0], 132) == 1
    assert gluon_configs.splits(64, 4096, 14336, WGMMA_SP[1], 132) == 4
    assert gluon_configs.splits(16, 128, 8192, WGMMA_SP[1], 132) == 16  # 8 blocks each
    assert gluon_configs.splits(64, 64, 64, WGMMA_SP[0], 132) == 1
    assert gluon_configs.splits(16384, 4096, 4096, WGMMA_SP[3], 132) == 1


def test_configurations_have_names_of_their_own() -> None:
    configs: tuple[Config, ...] = (*MMA_SP, *WGMMA_SP)
    assert len({str(config) for config in configs}) == len(configs)
    assert all(config.stages >= 3 for config in configs)


@pytest.mark.parametrize(("K", "R"), [(20, 0), (32, 200)])
def test_sizes_that_wgmma_does_not_take(K: int, R: int) -> None:
    p = draw(Pattern(2, 4), Shape((3,), 8, K // 4), BF16)
    low_rank = (torch.zeros(3, R, dtype=BF16), torch.zeros(8, R, dtype=BF16)) if R else None
    with pytest.raises(ValueError, match=f"K = {K} must .* R = {R} at most 192"):
        gluon_products.wgmma_sp(p.x, p.values, p.pattern, None, low_rank, WgmmaSp(1, 4, 4, 3))


def test_a_tile_with_too_few_tokens_for_its_outputs() -> None:
    p = draw(Pattern(2, 4), Shape((3,), 8, 16), BF16)
    with pytest.raises(ValueError, match="16 tokens is less than half of its 64 outputs"):
        gluon_products.wgmma_sp(p.x, p.values, p.pattern, None, None, WgmmaSp(1, 4, 2, 3))
    for config in gluon_configs.WGMMA_SP:
        assert 2 * config.BM >= config.BN
