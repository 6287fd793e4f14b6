"""The tensor-core instructions of ``gluon_ptx`` against operands placed by hand, where the PTX manual says."""

from __future__ import annotations

import itertools

import pytest
import torch

from gluon_cpu import Hazard
from gluon_memory import Program, Tiles
from gluon_ptx import mma, mma_sp


def test_the_sparse_instruction() -> None:
    """One row of W with the patterns in turn, one token."""
    pairs = list(itertools.combinations(range(4), 2))
    for row, token in ((0, 0), (5, 3), (13, 7)):
        dense = torch.zeros(16, 32, dtype=torch.float64)
        a = torch.zeros(1, 32, 8, dtype=torch.bfloat16)
        b = torch.zeros(1, 32, 8, dtype=torch.bfloat16)
        words = [0x44444444] * 32  # 0 and 1 in every group
        group, upper = row % 8, row // 8
        for j in range(8):  # groups of four columns
            low, high = pairs[(j + row) % 6]
            lane = 4 * group + j % 4
            for position, column in enumerate((low, high)):
                dense[row, 4 * j + column] = 10 * j + position + 1
                a[0, lane, 4 * (j // 4) + 2 * upper + position] = 10 * j + position + 1
            shift = 4 * (j % 4) + 16 * upper
            holder = 4 * group + j // 4
            words[holder] = words[holder] & ~(15 << shift) | (low | high << 2) << shift
        x = torch.arange(32, dtype=torch.float64) % 7 - 3
        for k in range(32):
            b[0, 4 * token + k % 8 // 2, 2 * (k // 8) + k % 2] = float(x[k])
        c = torch.ones(1, 32, 4)
        e = torch.tensor([words], dtype=torch.uint32).view(torch.int32)
        d = mma_sp(a.view(torch.int32), b.view(torch.int32), e, c, 0, torch.bfloat16)
        expected = torch.ones(1, 32, 4)
        expected[0, 4 * group + token // 2, 2 * upper + token % 2] += float(dense[row] @ x)
        assert torch.equal(d, expected)


def test_metadata_that_are_not_ascending_are_refused() -> None:
    words = torch.zeros(1, 32, 4, dtype=torch.int32)
    with pytest.raises(Hazard):
        mma_sp(words, words, words[..., 0], words.float(), 0, torch.float16)


def test_the_dense_instruction() -> None:
    for row, token in ((0, 0), (5, 3), (13, 7)):
        w, x = torch.arange(16.0) - 5, torch.arange(16.0) % 7 - 3
        a = torch.zeros(1, 32, 8, dtype=torch.float16)
        b = torch.zeros(1, 32, 4, dtype=torch.float16)
        for k in range(16):
            a[0, 4 * (row % 8) + k % 8 // 2, 4 * (k // 8) + 2 * (row // 8) + k % 2] = w[k]
            b[0, 4 * token + k % 8 // 2, 2 * (k // 8) + k % 2] = x[k]
        d = mma(a.view(torch.int32), b.view(torch.int32), torch.ones(1, 32, 4), torch.float16)
        expected = torch.ones(1, 32, 4)
        expected[0, 4 * (row % 8) + token // 2, 2 * (row // 8) + token % 2] += float(w @ x)
        assert torch.equal(d, expected)


def test_rows_of_128_bytes_are_swizzled() -> None:
    """Byte 16 of row 3 lies where the manual's picture of the 128-byte swizzle has it: piece 1 exclusive-or 3."""
    program = Program((0, 0))
    words = torch.arange(16 * 32, dtype=torch.int32).view(16, 32)
    ring = program.allocate([2, 16, 32], Tiles(words, 16, 32).layout)
    ring.stages[1].filled(words)
    stage, at = program.bytes_at(torch.tensor([16 * 128 + 3 * 128 + 16 * (1 ^ 3), 16 * 128 + 11 * 128 + 16 * 3 + 4]))
    assert stage is ring.stages[1]
    assert at().tolist() == [int(words[3, 4]), int(words[11, 1])]
    for outside in (-4, 2 * 16 * 128):
        with pytest.raises(Hazard):
            program.bytes_at(torch.tensor([outside]))
