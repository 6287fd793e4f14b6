"""Search for cuSPARSELt algorithms that give right results, in a child process that they may break.

Some algorithm ids end in an illegal instruction, after which every CUDA call of the process fails, or might hang.  A
child process (``cusparselt_trials``) therefore tries each algorithm.  If the child dies or does not answer in time, its
id is not tried again in this dtype, and a new child continues with the next id.  A child takes seconds to start, so it
serves many products.  The number of ids, the time, and the number of children per product are limited.

Do not use this on GPUs that are shared through MPS, where an illegal instruction of one process ends other processes.
"""

from __future__ import annotations

import collections
import contextlib
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from slope_compile.dtypes import dtype_name
from slope_compile.kernels import _cusparselt, gpu_tuning
from slope_compile.kernels._cusparselt import Algorithm, Product
from slope_compile.log import log

SECONDS = 900.0
"""Default time limit of a search."""
CODE = """
import sys
sys.path.append(sys.argv.pop(1))  # the package may not be installed
from slope_compile.kernels import cusparselt_trials
cusparselt_trials.main()
"""
"""Program of a child."""
START_SECONDS, STEP_SECONDS = 180.0, 60.0
"""Timeouts in seconds for a child's first message and for each request."""
IDS = 64
"""Most ids to try; the library may report that there are fewer."""
DEATHS = 8
"""Most children that may die over one product; after that its other ids are not tried."""
USELESS = 2
"""The search stops after this many children in a row that end before they try anything."""

Report = Callable[[Product, Sequence[Algorithm]], None]
"""Called with each searched product and its verified algorithms, the fastest first."""


def layer(dtype: torch.dtype, M: int, N: int, K: int) -> tuple[Product, Product]:
    """The two products of a layer with a weight ``[N, K]`` that the library can compute: the forward product and the
    double-pruned input gradient."""
    return (dtype, M, N, K), (dtype, M, K, N)


def tuned() -> Iterator[Product]:
    """The products that tuning measures, those with many tokens first, for which the library is most likely to win."""
    for M in sorted(gpu_tuning.TOKENS, reverse=True):
        for dtype in _cusparselt.DTYPES:
            for shape in gpu_tuning.SHAPES:
                yield from layer(dtype, M, *shape)


class Gone(Exception):
    """A child died, or did not answer in time and was ended."""


class Child:
    """A process that tries algorithms.

    Raises:
        Gone: the process does not start.
    """

    def __init__(self, command: Sequence[str], limit: float) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (closed in end)
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, errors="replace"
            )
        except OSError as error:
            self._errors.close()
            raise Gone(str(error)) from error
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()
        self.hello = self._answer(limit)

    def ask(self, request: dict[str, Any], limit: float) -> dict[str, Any]:
        """The child's answer to a request.

        Raises:
            Gone: the child did not answer within ``limit`` seconds; it was ended.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # If the child is dead, _answer reports its last output.
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._answer(limit)

    def end(self) -> None:
        """End the child at once."""
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._errors.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put(None)

    def _answer(self, limit: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=max(0.0, limit))
            if line is not None:
                answer: dict[str, Any] = json.loads(line)
                return answer
            why = self._last_words()
        except queue.Empty:
            why = f"no answer within {limit:.0f} s"
        except ValueError as error:
            why = f"not an answer: {error}"
        except BaseException:
            self.end()
            raise
        self.end()
        raise Gone(why)

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=10)
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"it ended with status {self._process.returncode}" + (f": {lines[-1][:200]}" if lines else "")


class Search:
    """Searches on one device.  The child is kept for the next search until ``close`` or the end of this process."""

    def __init__(self, device: torch.device, command: Sequence[str] = ()) -> None:
        self.host: list[float] = []
        """Host time in seconds of a call with the fastest algorithm of each product."""
        self._device = device
        self._command = command or (sys.executable, "-P", "-c", CODE, str(Path(__file__).parents[2]), str(device))
        self._child: Child | None = None
        self._drawn: Product | None = None
        self._useless = 0
        """Number of children in a row that ended before they tried anything."""
        self._deadly: set[tuple[torch.dtype, Algorithm | None]] = set()
        """Steps of :meth:`_search` over which children died."""

    def __enter__(self) -> Search:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        if self._child is not None:
            self._child.end()
        self._child = self._drawn = None

    def run(self, products: Iterable[Product], seconds: float = SECONDS, report: Report | None = None) -> None:
        """Search the products without stored results and store what is found; see ``_cusparselt.known``.

        If no child can be started, or memory or time do not suffice, a warning is logged and products stay unknown.
        """
        try:
            self._run(products, seconds, report)
            self._release()
        except BaseException:  # such as a caller's time limit: a late answer would be taken for that of another request
            self.close()
            raise

    def _run(self, products: Iterable[Product], seconds: float, report: Report | None) -> None:
        ends = time.monotonic() + seconds
        fitting = [p for p in dict.fromkeys(products) if _cusparselt.unfit(self._device, *p) is None]
        left = collections.deque(p for p in fitting if p not in _cusparselt.known(self._device))
        while left and self._useless < USELESS:
            if time.monotonic() >= ends:
                log.warning("cuSPARSELt: %.0f s are over; %d products were not searched", seconds, len(left))
                return
            product = left.popleft()
            verified = self._search(product, ends)
            if verified is not None:
                _cusparselt.store(self._device, product, verified)
                if report is not None:
                    report(product, verified)

    def _search(self, product: Product, ends: float) -> list[Algorithm] | None:
        """The verified algorithms of a product, the fastest first; None if it could not be searched."""
        dtype = product[0]
        found: dict[Algorithm, dict[str, float]] = {}
        # None asks the library for its own choice, which runs algorithms too.
        left: collections.deque[Algorithm | None] = collections.deque([None, *map(Algorithm, range(IDS))])
        tried: set[Algorithm | None] = set()
        deaths, cut_off = 0, False
        while left and deaths < DEATHS and time.monotonic() < ends:
            step = left.popleft()
            if step in tried or (dtype, step) in self._deadly:
                continue
            tried.add(step)
            child = self._ready(product, ends)
            if child is None:
                cut_off = True
                break
            try:
                answer = child.ask(_request(step), min(STEP_SECONDS, ends - time.monotonic()))
            except Gone as error:
                self._child = None
                if time.monotonic() < ends:
                    log.warning("cuSPARSELt: %s of %s ended its process: %s", _named(step), _text(product), error)
                    self._deadly.add((dtype, step))
                    deaths += 1
                continue
            cut_off |= "memory" in answer
            if step is None and "algorithm" in answer:
                left = collections.deque(one for one in left if one is None or one.alg_id < answer["count"])
                left.appendleft(Algorithm(*answer["algorithm"]))
            elif step is not None and "seconds" in answer:
                found[step] = answer
            else:
                log.debug("cuSPARSELt: %s of %s: %s", _named(step), _text(product), answer)
        cut_off |= time.monotonic() >= ends
        if cut_off and not found:
            return None
        verified = sorted(found, key=lambda algorithm: found[algorithm]["seconds"])
        self.host += [found[one]["host"] for one in verified[:1]]
        return verified

    def _ready(self, product: Product, ends: float) -> Child | None:
        """A child that has drawn the product's numbers; None, with a warning in the log, if there can be none."""
        if self._child is not None and self._drawn == product:
            return self._child
        self._drawn = None
        try:
            if self._child is None:
                self._child = self._started(min(START_SECONDS, ends - time.monotonic()))
            dtype, *sizes = product
            request = {"product": [dtype_name(dtype), *sizes]}
            answer = self._child.ask(request, min(STEP_SECONDS, ends - time.monotonic()))
        except Gone as error:
            self._useless += time.monotonic() < ends
            self._child = None
            log.warning("cuSPARSELt: %s cannot be tried: %s", _text(product), error)
            return None
        if "ready" not in answer:
            log.warning("cuSPARSELt: %s cannot be tried: %s", _text(product), answer)
            return None
        self._drawn, self._useless = product, 0
        return self._child

    def _release(self) -> None:
        """Let the child free its GPU memory, for the caller to use until the next run."""
        self._drawn = None
        try:
            if self._child is not None:
                self._child.ask({"release": True}, STEP_SECONDS)
        except Gone as error:
            self._child = None
            log.info("cuSPARSELt: the process that tried algorithms ended: %s", error)

    def _started(self, limit: float) -> Child:
        child = Child(self._command, limit)
        expected = list(_cusparselt.identity(self._device))
        if child.hello.get("identity") != expected:
            child.end()
            raise Gone(f"the process sees {child.hello}, this one {expected}")
        return child


def _request(step: Algorithm | None) -> dict[str, Any]:
    return {"suggest": True} if step is None else {"try": [step.alg_id, step.split_k, step.split_k_mode]}


def _named(step: Algorithm | None) -> str:
    return "the library's own search" if step is None else str(step)


def _text(product: Product) -> str:
    dtype, M, N, K = product
    return f"M, N, K = {M}, {N}, {K} in {dtype_name(dtype)}"
