"""Results of more than 2^31 entries: the last program of a launch writes to their end and nowhere before.

They run on the executor of ``gluon_cpu``, whose integers wrap as on a GPU.  The large tensors are sparse files.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import gluon_cpu
from gluon_cpu import Executor, Hazard
from problems import draw_mask, kept, packed
from slope_compile.kernels import gluon_products
from slope_compile.kernels.gluon_configs import MMA_SP, WGMMA_SP, Config, MmaSp
from slope_compile.pattern import Pattern

M, N, K = (1 << 20) + 5, 2052, 64
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def the_last_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def last(grid: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        yield grid[0] - 1, (grid[1] if len(grid) > 1 else 1) - 1

    monkeypatch.setattr(gluon_cpu, "_programs", last)
    mma, wgmma = Executor("gluon_mma_sp"), Executor("gluon_wgmma_sp")
    monkeypatch.setattr(gluon_products, "_kernels", lambda: mma)
    monkeypatch.setattr(gluon_products, "_wgmma_kernels", lambda: wgmma)


def hollow(folder: Path, *sizes: int, dtype: torch.dtype = BF16) -> Tensor:
    """Zeros that take no memory until they are written to."""
    count = torch.Size(sizes).numel()
    path = str(folder / f"{len(list(folder.iterdir()))}.bin")
    return torch.from_file(path, shared=True, size=count, dtype=dtype).view(sizes)


@pytest.mark.parametrize("config", [MMA_SP[0], MMA_SP[-1], WGMMA_SP[0], WGMMA_SP[-1]], ids=str)
def test_the_last_tile(config: Config, tmp_path: Path) -> None:
    assert M * N > 1 << 31
    mask = draw_mask(N, K, Pattern(2, 4))
    weight = torch.randn(N, K).to(BF16) * mask
    x, y = hollow(tmp_path, M, K), hollow(tmp_path, M, N)
    rows, columns = M % config.BM, N % config.BN
    x[-rows:] = torch.randn(rows, K).to(BF16)
    given = (x, kept(weight, mask), packed(mask), None, None)
    if isinstance(config, MmaSp):
        gluon_products.mma_sp(*given, config, 1, out=y)
    else:
        gluon_products.wgmma_sp(*given, config, 1, out=y)
    expected = (x[-rows:].double() @ weight[-columns:].double().t()).to(BF16)
    torch.testing.assert_close(y[-rows:, -columns:], expected)
    assert not bool(y[-2 * config.BM : -rows].any())
    assert not bool(y[-rows:, :-columns].any())
    assert not bool(y[: 2 * config.BM].any())


def test_rows_in_32_bits_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short = Executor("gluon_mma_sp", (("(first + row.to(gl.int64))", "row"),))
    monkeypatch.setattr(gluon_products, "_kernels", lambda: short)
    with pytest.raises(Hazard, match=r"element -\d+ of"):
        test_the_last_tile(MMA_SP[0], tmp_path)


def test_the_last_parts(tmp_path: Path) -> None:
    """What several programs have summed up, and the bias, at the end of the result."""
    parts, y = hollow(tmp_path, 1, M, N, dtype=torch.float32), hollow(tmp_path, M, N)
    bias = torch.randn(N).to(BF16)
    rest = M * N % 512
    parts.view(-1)[-rest:] = torch.arange(rest) % 7
    gluon_products._add_up(parts, bias, y)
    column = torch.arange(M * N - rest, M * N) % N
    expected = (parts.view(-1)[-rest:] + bias[column].float()).to(BF16)
    assert torch.equal(y.view(-1)[-rest:], expected)
    assert not bool(y.view(-1)[-4096:-rest].any())
    assert not bool(y.view(-1)[:4096].any())
