"""The table of measured times of a GPU: written by ``slope-compile tune --device cuda``, read by ``gpu_rules``.

There is one JSON file for each GPU, beside the CPU's tables, under a name made of the GPU's name, the sources of the
kernels and the versions of torch, CUDA, Triton and cuSPARSELt; any other of these is measured anew::

    {"format": 1, "gpu": "NVIDIA H200", "versions": {"torch": "...", ...},
     "entries": [{"op": "forward", "dtype": "bfloat16", "M": 512, "N": 4096, "K": 4096,
                  "seconds": {"triton": 3.1e-05, "expanded": 4.4e-05}}, ...]}

A product is looked up at the entry nearest to it (by the ratios of its sizes).  Between two entries the choice switches
at their geometric mean, which defines the token ranges.  float16 takes the entries of bfloat16 if it has none of its
own, because it has the same instructions at the same rates.

The package comes with tables that the project measured (``tuned/``).  They apply to the GPU they were measured on and
to its relatives of the same architecture, with any versions, until this machine has a table of its own.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slope_compile.kernels import cache_files, measured
from slope_compile.kernels.measured import Memo, nearest
from slope_compile.log import log

FORMAT = 1
OPS = ("forward", "grad_input", "grad_input_columns", "grad_weight")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
SHAPES = (
    (768, 768), (3072, 768), (768, 3072), (1024, 4096), (4096, 4096), (14336, 4096), (4096, 14336),
)  # fmt: skip
"""(N, K)"""

RELATIVES = {"nvidia-h200": ("H200", "H100", "H800", "GH200")}
"""A table that comes with the package -> words in the names of the GPUs that use it.

In the H200's table, the time of "expanded" for up to 256 tokens is the sum of the measured times of its two parts.
"""

MARGIN = 0.97
"""A way that keeps the weight compressed also wins a near tie, because the expanded weight needs memory."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One measured case."""

    op: str
    dtype: str
    M: int
    N: int
    K: int
    seconds: dict[str, float]
    """Way -> median time in seconds, without the ways that cannot compute the product or were wrong."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.M, self.N, self.K


@dataclasses.dataclass(frozen=True)
class Table:
    """The measurements of one GPU."""

    gpu: str
    entries: tuple[Entry, ...]
    _answers: Memo = dataclasses.field(default_factory=Memo, compare=False, repr=False)

    def fastest(
        self, op: str, M: int, N: int, K: int, dtype: torch.dtype, among: Iterable[str]
    ) -> str | None:
        """The fastest way out of ``among`` at the nearest entry; None if the product or the dtype was not measured.

        Compiled code with a symbolic token count asks at every call, so answers are remembered.
        """
        return self._answers.ask(self._fastest, op, M, N, K, dtype, tuple(among))

    def _fastest(self, op: str, M: int, N: int, K: int, dtype: torch.dtype, among: tuple[str, ...]) -> str | None:
        near = nearest(self.entries, op, M, N, K, dtype)
        if near is None and dtype is torch.float16:
            near = nearest(self.entries, op, M, N, K, torch.bfloat16)
        if near is None:
            return None
        allowed = {way: t * (1.0 if way == "expanded" else MARGIN) for way, t in near.seconds.items() if way in among}
        return min(allowed, key=allowed.__getitem__, default=None)

    def digest(self) -> str:
        """A digest of its content."""
        return hashlib.sha256(self.json().encode()).hexdigest()[:16]

    def json(self) -> str:
        """Its text as it is stored."""
        entries = [dataclasses.asdict(entry) for entry in self.entries]
        return json.dumps({"format": FORMAT, "gpu": self.gpu, "versions": versions(), "entries": entries}, indent=1)


def versions() -> dict[str, str]:
    """The software versions that a measurement depends on."""
    lt = torch.backends.cusparselt
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = "none"
    found = str(lt.version()) if lt.is_available() else "none"
    return {"torch": torch.__version__, "cuda": str(torch.version.cuda), "triton": triton, "cusparselt": found}


def table_path(gpu: str) -> Path:
    """The file with the table that was measured here, on a GPU of this name with these kernels."""
    key = cache_files.key(gpu, *versions().values(), cache_files.digest(sources()))
    return cache_files.cache_folder() / f"tuned-cuda-{key}.json"


def sources() -> list[Path]:
    """The files with the kernels that are measured, and with their calls."""
    folder = Path(__file__).parent
    kernels = [path for kind in ("triton", "gluon", "few") for path in folder.glob(f"{kind}_*.py")]
    return [*kernels, folder / "_cusparselt.py", folder / "gpu_calls.py"]


def save(table: Table) -> Path:
    """Write a table; the running process uses it from now on."""
    path = table_path(table.gpu)
    cache_files.write(path, table.json())
    load.cache_clear()
    return path


@functools.lru_cache(maxsize=16)
def load(gpu: str) -> Table | None:
    """The table of a GPU under these versions, else one that comes with the package, if there is one."""
    path = table_path(gpu)
    try:
        return _read(path.read_text())
    except FileNotFoundError:
        return _shipped(gpu)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s); what comes with the package decides, or tune again", path, error)
        return _shipped(gpu)


def _shipped(gpu: str) -> Table | None:
    words = gpu.replace("-", " ").split()
    for name, relatives in RELATIVES.items():
        if any(word in relatives for word in words):
            return _read(Path(__file__).with_name("tuned").joinpath(f"{name}.json").read_text())
    return None


def _read(text: str) -> Table:
    data = json.loads(text)
    if data["format"] != FORMAT:
        raise ValueError(f"format {data['format']}, expected {FORMAT}")
    return Table(data["gpu"], tuple(Entry(**entry) for entry in data["entries"]))


Ways = Callable[[str, int, int, int, torch.dtype, torch.device], Iterable[str]]
"""Product, M, N, K, dtype, device -> the ways that are possible."""
Run = Callable[[str, str, "Problem"], Tensor]
"""Product, way -> its result."""


def measure(
    device: torch.device,
    ways: Ways,
    run: Run,
    seconds: Callable[[Callable[[], object]], float],
    tokens: Iterable[int] = TOKENS,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    dtypes: Mapping[str, torch.dtype] = DTYPES,
) -> Iterator[Entry]:
    """Measure every case; a way with a wrong result is logged and left out.

    Args:
        ways, run: see ``gpu_calls.possible`` and the calls there.
        seconds: times a call on the device.
    """
    for (N, K), (name, dtype) in ((s, d) for s in shapes for d in dtypes.items()):
        problem = Problem(N, K, dtype, device)
        for M in tokens:
            problem.draw(M)
            for op in OPS:
                times = {}
                dense = run(op, "expanded", problem)
                for way in ways(op, M, N, K, dtype, device):
                    if way != "expanded" and not problem.agrees(op, run(op, way, problem), dense):
                        log.warning("%s of %s is wrong at M, N, K = %d, %d, %d in %s on %s and is left out",
                                    way, op, M, N, K, name, device)  # fmt: skip
                        continue
                    times[way] = seconds(functools.partial(run, op, way, problem))
                yield Entry(op, name, M, N, K, times)


class Problem(measured.Problem):
    """One weight and its activations on a device."""

    def __init__(self, N: int, K: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(N, K, dtype, device)
        self.x = self.grad = self.values

    def draw(self, M: int) -> None:
        """Fresh activations of M tokens."""
        self.x, self.grad = self.numbers(M, self.K), self.numbers(M, self.N)

    def arguments(self, op: str) -> tuple[Tensor, ...]:
        """The arguments of a product, in the order of ``gpu_calls``."""
        weight = (self.values, self.pattern)
        return {
            "forward": (self.x, *weight),
            "grad_input": (self.grad, *weight),
            "grad_input_columns": (self.grad, *weight, self.column_mask),
            "grad_weight": (self.grad, self.x, self.pattern),
        }[op]

    def size(self, op: str) -> tuple[int, int]:
        """The shape of a product's result."""
        M = self.x.shape[0]
        return {"forward": (M, self.N), "grad_weight": (self.N, self.K // 2)}.get(op, (M, self.K))

    def agrees(self, op: str, result: Tensor, dense: Tensor) -> bool:
        """Whether two ways agree to what their orders of summation explain; numbers are of unit variance."""
        reduced = {"forward": self.K / 2, "grad_weight": self.x.shape[0]}.get(op, self.N / 2)
        unit = {torch.float32: 2.0**-10, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[self.dtype]  # TF32: 2^-11
        allowed = 16 * unit * math.sqrt(reduced)
        return bool(torch.isfinite(result).all()) and float((result.float() - dense.float()).abs().max()) <= allowed


def gpu_seconds(call: Callable[[], Any], rounds: int = 9) -> float:
    """Median time of a call by CUDA events, after a warm-up, the L2 cache flushed before each.

    The call is replayed from a CUDA graph where it can be recorded, so that the time of the host is not included.
    """
    call()
    torch.cuda.synchronize()
    replay = _recorded(call)
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times: list[float] = []
    for _ in range(rounds):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[rounds // 2]


def _recorded(call: Callable[[], Any]) -> Callable[[], Any]:
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:  # What PyTorch raises for an operation that a capture does not permit.
        log.debug("launched, not replayed: %s", error)
        torch.cuda.synchronize()
        return call
    return graph.replay
