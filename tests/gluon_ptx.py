"""The tensor-core instructions in the assembly of Gluon kernels, computed as in the PTX manual, for ``gluon_cpu``.

The text of the assembly is interpreted: operands are looked up by number in the registers of each lane, and the
address of an operand in shared memory is decoded from its descriptor.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

import torch
from torch import Tensor

from gluon_memory import Program, Stage
from gluon_values import Hazard, Value

LANES = 32


@dataclasses.dataclass(frozen=True)
class LinearLayout:
    """``gl.DistributedLinearLayout``."""

    reg_bases: list[list[int]]
    lane_bases: list[list[int]]
    warp_bases: list[list[int]]
    block_bases: list[list[int]]
    shape: list[int]

    def registers(self) -> Tensor:
        """int64 ``[warps, lanes, registers]``: which element of the flattened tensor each holds."""
        counts = [1 << len(bases) for bases in (self.warp_bases, self.lane_bases, self.reg_bases)]
        at = torch.zeros(*counts, len(self.shape), dtype=torch.int64)
        for axis, bases in enumerate((self.warp_bases, self.lane_bases, self.reg_bases)):
            for bit, basis in enumerate(bases):
                chosen = (torch.arange(counts[axis]) >> bit & 1).view([-1 if d == axis else 1 for d in range(4)])
                at ^= chosen * torch.tensor(basis)
        flat = torch.zeros(counts, dtype=torch.int64)
        for d, size in enumerate(self.shape):
            flat = flat * size + at[..., d]
        return flat


def mma_sp(a: Tensor, b: Tensor, e: Tensor, c: Tensor, selector: int, dtype: torch.dtype) -> Tensor:
    """``mma.sp::ordered_metadata.m16n8k32`` as the PTX manual defines it, from and to the registers of each lane.

    Args:
        a: int32 ``[instructions, 32 lanes, 4]``, two 16-bit elements each; b: likewise.
        e: int32 ``[instructions, 32]``; c: float32 ``[instructions, 32, 4]``.
        selector: the lanes that supply the metadata: 0 for lanes 0 and 1 of each four, 1 for lanes 2 and 3.

    Returns:
        float32 ``[instructions, 32, 4]``.
    """
    count = a.shape[0]
    lane, i = torch.arange(LANES)[:, None], torch.arange(8)
    group, thread = lane >> 2, lane & 3
    # Multiplicand A: a0 to a7.  It names the row and the first of four columns; metadata name the column.
    row = torch.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)  # [32, 8]
    first = thread * 4 + torch.where(i < 4, 0, 16)
    elements = a.contiguous().view(dtype).view(count, LANES, 8)
    # The 16 bits of a row of 16 columns: the lower half of a lane's word for the rows of a group, the upper for + 8.
    source = 4 * group + 2 * selector + (first >= 16)
    word = (e.long() & 0xFFFFFFFF)[:, source] >> torch.where(row >= 8, 16, 0)
    nibble = word >> (4 * (first % 16 // 4)) & 15
    low, high = nibble & 3, nibble >> 2
    if not bool((low < high).all()):
        raise Hazard("metadata are not in ascending order")
    column = first + torch.where(i % 2 == 0, low, high)  # [count, 32, 8]
    # Multiplicand B: b0 to b7.
    depth = thread * 2 + (i & 1) + i // 2 * 8
    right = torch.zeros(count, 32, 8, dtype=torch.float64)
    right[:, depth, group.expand_as(depth)] = b.contiguous().view(dtype).view(count, LANES, 8).double()
    if bool(right.isfinite().all()):
        left = torch.zeros(count, 16 * 32, dtype=torch.float64)
        left.scatter_(1, (row * 32 + column).view(count, -1), elements.double().view(count, -1))
        sums = left.view(count, 16, 32) @ right
    else:  # what meets only pruned elements takes no part
        chosen = right[torch.arange(count)[:, None, None], column]  # [count, 32, 8, n]
        products = elements.double().unsqueeze(-1) * chosen
        sums = torch.zeros(count, 16, 8, dtype=torch.float64)
        sums.index_add_(1, row.reshape(-1), products.view(count, LANES * 8, 8))
    # Accumulator C and D: c0 to c3.
    j = torch.arange(4)
    return (c.double() + sums[:, group + j // 2 * 8, thread * 2 + (j & 1)]).float()


def mma(a: Tensor, b: Tensor, c: Tensor, dtype: torch.dtype) -> Tensor:
    """``mma.m16n8k16`` likewise: a int32 ``[instructions, 32, 4]``, b ``[instructions, 32, 2]``."""
    count = a.shape[0]
    lane, i, k = torch.arange(LANES)[:, None], torch.arange(8), torch.arange(4)
    group, thread = lane >> 2, lane & 3
    left = torch.zeros(count, 16, 16, dtype=torch.float64)
    row = torch.where((i < 2) | ((i >= 4) & (i < 6)), group, group + 8)
    left[:, row, thread * 2 + (i & 1) + torch.where(i >= 4, 8, 0)] = a.contiguous().view(dtype).double()
    right = torch.zeros(count, 16, 8, dtype=torch.float64)
    depth = thread * 2 + (k & 1) + torch.where(k >= 2, 8, 0)
    right[:, depth, group.expand_as(depth)] = b.contiguous().view(dtype).double()
    sums = left @ right
    return (c.double() + sums[:, group + k // 2 * 8, thread * 2 + (k & 1)]).float()


class Registers:
    """Operands of an assembly block by number, each int32 or float32 ``[packs, 32]``: first results, then inputs."""

    def __init__(self, layout: LinearLayout, pack: int, constraints: str, args: list[Value]) -> None:
        self.where = layout.registers()
        warps, lanes, count = self.where.shape
        self.shape, self.pack = (warps, count // pack, lanes, pack), pack
        self.tied = constraints.split(",")[-pack:] == [str(i) for i in range(pack)]
        self.inputs = [self._held(arg.data.expand(layout.shape)) for arg in (args[:-1] if self.tied else args)]
        self.results = torch.full((warps * count // pack, lanes, pack), torch.nan)

    def _held(self, tensor: Tensor) -> Tensor:
        """``[packs, 32, pack]``: every ``pack`` consecutive registers of a lane belong to one block."""
        warps, packs, lanes, pack = self.shape
        held = tensor.flatten()[self.where].view(warps, lanes, packs, pack)
        return held.transpose(1, 2).reshape(-1, lanes, pack)

    def start(self, sums: Value) -> None:
        """Whether the results are tied to an input."""
        self.results = self._held(sums.data).clone()

    def read(self, text: str) -> Tensor:
        """``$1,$2``: [packs, 32, 2]."""
        numbers = [int(number) for number in re.findall(r"\$(\d+)", text)]
        sources = [self.results, *self.inputs]
        return torch.stack([sources[n // self.pack][..., n % self.pack] for n in numbers], dim=-1)

    def write(self, text: str, data: Tensor) -> None:
        numbers = [int(number) for number in re.findall(r"\$(\d+)", text)]
        assert max(numbers) < self.pack, text
        self.results[..., numbers] = data

    def tensor(self, layout: LinearLayout) -> Tensor:
        """The results as the tensor of the layout."""
        warps, packs, lanes, pack = self.shape
        flat = torch.empty(self.where.numel())
        by_register = self.results.view(warps, packs, lanes, pack).transpose(1, 2)
        flat[self.where.flatten()] = by_register.flatten()
        return flat.view(layout.shape)


_SPARSE = re.compile(
    r"mma\.sp::ordered_metadata\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(b?f16)\.\1\.f32 "
    r"\{(.*?)\}, \{(.*?)\}, \{(.*?)\}, \{(.*?)\}, (\$\d+), 0x([01]);"
)
_DENSE = re.compile(
    r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(b?f16)\.\1\.f32 \{(.*?)\}, \{(.*?)\}, \{(.*?)\}, \{(.*?)\};"
)
_GROUP = re.compile(
    r"wgmma\.mma_async(\.sp)?\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(b?f16)\.\4 \{(.*?)\}, \{(.*?)\}, tile, "
    r"(?:(\$\d+), ([01]), )?1, 1, 1, 0;"
)
_NUMBER = {"f16": torch.float16, "bf16": torch.bfloat16}


def single(text: str, registers: Registers) -> None:
    """Compute one instruction that finishes before the next one starts."""
    sparse, dense = _SPARSE.fullmatch(text), _DENSE.fullmatch(text)
    if sparse:
        kind, d, a, b, c, e, selector = sparse.groups()
        a_, b_, c_, e_ = (registers.read(operand) for operand in (a, b, c, e))
        registers.write(d, mma_sp(a_, b_, e_[..., 0], c_, int(selector), _NUMBER[kind]))
    elif dense:
        kind, d, a, b, c = dense.groups()
        registers.write(d, mma(registers.read(a), registers.read(b), registers.read(c), _NUMBER[kind]))
    else:
        raise NotImplementedError(text)


def group(text: str, registers: Registers, program: Program, sums: Value) -> Value:
    """Run a block of ``wgmma``; the instructions that it issues are computed when they are waited for."""
    scalars = {"at": 0, "low": 0, "high": 0}
    work: list[Callable[[], None]] = []
    stages: list[Stage] = []
    fenced = committed = False
    result = Value.pending()

    def number(operand: str) -> int:
        if operand.startswith("$"):
            values = registers.read(operand).unique()
            assert values.numel() == 1, "the lanes disagree"
            return int(values)
        return scalars[operand] if operand in scalars else int(operand, 0)

    def compute() -> None:
        registers.start(sums)
        for step in work:
            step()
        assert layout is not None
        result.resolve(registers.tensor(layout))

    layout = program.layout
    operations = {"add.u32": int.__add__, "shr.u32": int.__rshift__, "and.b32": int.__and__}
    for line in text.splitlines():
        instruction, _, rest = line.rstrip(";").partition(" ")
        operands = [operand.strip(" {}") for operand in rest.split(",")]
        multiplication = _GROUP.fullmatch(line)
        if line in ("{", "}") or instruction == ".reg":
            continue
        if instruction == "mov.u32":
            scalars[operands[0]] = 0 if operands[1] == "global_smem" else number(operands[1])
        elif instruction in operations:
            scalars[operands[0]] = operations[instruction](number(operands[1]), number(operands[2])) & 0xFFFFFFFF
        elif instruction == "mov.b64":
            assert operands == ["tile", "low", "high"], line
        elif instruction == "wgmma.fence.sync.aligned":
            fenced = True
        elif multiplication:
            if not fenced:
                raise Hazard("registers are used without a fence")
            work.append(_multiplication(multiplication, registers, program, stages, scalars["low"], scalars["high"]))
        elif instruction == "wgmma.commit_group.sync.aligned":
            program.issue(stages, compute)
            committed = True
        elif instruction == "wgmma.wait_group.sync.aligned":
            program.wait_for_multiplications(int(rest.rstrip(";")))
        else:
            raise NotImplementedError(line)
    if not committed:
        raise Hazard("instructions belong to no group")
    return result


def _multiplication(
    match: re.Match[str], registers: Registers, program: Program, stages: list[Stage], low: int, high: int
) -> Callable[[], None]:
    """The function that computes one ``wgmma``: 16 rows in each warp, eight tokens at a time."""
    sparse, tokens, depth, kind, d, a, e, selector = match.groups()
    assert bool(sparse) == bool(e), match[0]
    assert int(depth) == (32 if sparse else 16), match[0]
    count = int(tokens)
    # The descriptor of a tile by K: address and stride from eight rows to the next in 16 bytes; swizzle of 128 bytes.
    begin, stride, swizzle = (low & 0x3FFF) << 4, (high & 0x3FFF) << 4, high >> 30
    assert swizzle == 1, "only the swizzle of 128 bytes is known"
    row, word = torch.arange(count)[:, None], torch.arange(int(depth) // 2)
    linear = begin + row // 8 * stride + row % 8 * 128 + word * 4
    stage, words = program.bytes_at(linear ^ (linear >> 7 & 7) << 4)
    stages.append(stage)
    lane, i = torch.arange(LANES)[:, None], torch.arange(4 if sparse else 2)
    eights = torch.arange(count // 8)[:, None, None]

    def compute() -> None:
        a_, d_ = registers.read(a), registers.read(d)
        warps = a_.shape[0]
        b_ = words()[8 * eights + (lane >> 2), 4 * i + (lane & 3)]  # [eights, 32, registers]
        a_ = a_.repeat_interleave(count // 8, 0)
        b_ = b_.repeat(warps, 1, 1)
        c_ = d_.view(warps, LANES, count // 8, 4).transpose(1, 2).reshape(-1, LANES, 4)
        if sparse:
            e_ = registers.read(e)[..., 0].repeat_interleave(count // 8, 0)
            sums = mma_sp(a_, b_, e_, c_, int(selector), _NUMBER[kind])
        else:
            sums = mma(a_, b_, c_, _NUMBER[kind])
        registers.write(d, sums.view(warps, count // 8, LANES, 4).transpose(1, 2).reshape(warps, LANES, -1))

    return compute
