"""The process that tries cuSPARSELt's algorithms, so that an algorithm that breaks the GPU context breaks no other.

``cusparselt_search`` starts this process and sends requests, each a line of JSON.  Each request is answered by one line
before the next is read, so the sender can tell which request ended this process.  The device is synchronized before
each answer, because an illegal instruction only shows then.

| request | answer |
|---|---|
| (at the start) | ``{"identity": [GPU, library, torch]}`` |
| ``{"product": ["float16", M, N, K]}`` | ``{"ready": true}``; random numbers were drawn |
| ``{"release": true}`` | ``{"ready": true}``; its memory was given back |
| ``{"suggest": true}`` | ``{"algorithm": [id, split_k, mode], "count": number of ids}``, the library's own choice |
| ``{"try": [id, split_k, mode]}`` | ``{"seconds": GPU time, "host": host time}`` if right, or ``{"wrong": why}`` |

Any request may instead be answered by ``{"refused": why}`` or, if memory runs out, by ``{"memory": why}``.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, TextIO

import torch
from torch import Tensor

from slope_compile.kernels import _cusparselt, gpu_tuning, reference
from slope_compile.kernels._cusparselt import Algorithm
from slope_compile.kernels.masks import random_mask
from slope_compile.kernels.metadata import pack_mask
from slope_compile.pattern import Pattern

Answer = dict[str, Any]
TRIALS = 2
"""Number of random draws on which an algorithm must be correct, with and without a bias, before it is timed.  All but
the first include unusual numbers."""
CALLS = 20
"""Number of calls over which host time is averaged."""


class Device:
    """GPU functions that a trial needs beside the library; the tests replace them."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, call: Callable[[], object]) -> float:
        return gpu_tuning.gpu_seconds(call)

    def wait(self) -> None:
        """Wait until the device has finished; raises if its context is broken."""
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Free unused memory."""
        torch.cuda.empty_cache()


class Trials:
    """Answers requests; holds the numbers of one product."""

    def __init__(self, device: Device) -> None:
        self._gpu = device
        self._drawn: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        """Activations, packed weight, bias and the right result without it."""

    def answer(self, request: Answer) -> Answer:
        """The answer to a request, see the module docstring.

        Raises:
            RuntimeError: the device no longer works.
        """
        try:
            with torch.no_grad():
                found = self._answer(request)
        except torch.OutOfMemoryError as error:
            found = {"memory": _line(error)}
        except Exception as error:  # the library raises many types
            found = {"refused": _line(error)}
        self._gpu.wait()
        return found

    def _answer(self, request: Answer) -> Answer:
        if "product" in request or "release" in request:
            self._drawn.clear()
            self._gpu.release()
            if "product" in request:
                self._draw(*request["product"])
            return {"ready": True}
        x, packed, _, _ = self._drawn[0]
        if "suggest" in request:
            *algorithm, count = _cusparselt.primitives.suggestion(packed, x.t())
            return {"algorithm": algorithm, "count": count}
        return self._tried(Algorithm(*request["try"]))

    def _draw(self, dtype: str, M: int, N: int, K: int) -> None:
        device = self._gpu.device
        pattern = pack_mask(random_mask(N, K, Pattern(2, 4), seed=0, path="cusparselt")).to(device)
        for trial in range(TRIALS):
            sizes = ((N, K // 2), (M, K), (N,))
            values, x, bias = (torch.randn(*size, device=device).to(getattr(torch, dtype)) for size in sizes)
            if trial:
                _unusual(values)
            dense = reference.expand(values, pattern, 2, 4).contiguous()
            self._drawn.append((x, _cusparselt.primitives.compress(dense), bias, x.float() @ dense.float().t()))

    def _tried(self, algorithm: Algorithm) -> Answer:
        for (x, packed, bias, truth), biased in itertools.product(self._drawn, (False, True)):
            # Freed at once: the result reuses this memory, so that entries left unwritten are NaN.
            torch.full(truth.shape, torch.nan, dtype=x.dtype, device=x.device)
            result = _cusparselt.primitives.product(packed, x.t(), bias if biased else None, algorithm).float()
            error = (result - truth - bias.float() if biased else result - truth).abs()
            # Inputs have unit variance.  2^-7 of the sums' standard deviation exceeds any rounding of 16-bit results.
            near = error <= 2.0**-7 * truth.abs() + 2.0**-7 * (x.shape[1] / 2) ** 0.5
            if bool((truth.isnan() & ~result.isnan()).any()):
                return {"wrong": "a weight that is NaN is lost"}
            if not bool((near | truth.isnan()).all()):
                return {"wrong": f"off by {float(error[~truth.isnan()].max()):.3g}"}
        x, packed, _, _ = self._drawn[0]
        call = functools.partial(_cusparselt.primitives.product, packed, x.t(), None, algorithm)
        return {"seconds": self._gpu.seconds(call), "host": self._host_seconds(call)}

    def _host_seconds(self, call: Callable[[], object]) -> float:
        """Host time of a call, including descriptors and plan but not the wait for the device."""
        self._gpu.wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - start) / CALLS


def _unusual(values: Tensor) -> None:
    """Put unusual numbers among random ones: groups and rows of zeros, subnormal numbers, and one NaN."""
    values[1::4] = 0
    values[2::4, :16] = 0
    values[3::4, 1::3] = torch.finfo(values.dtype).smallest_normal / 8
    values[4, 5] = torch.nan


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def serve(device: Device, requests: Iterable[str], answers: TextIO) -> None:
    """Answer requests line by line until the input ends."""

    def say(answer: Answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    trials = Trials(device)
    device.wait()
    say({"identity": _cusparselt.identity(device.device)})
    for request in requests:
        say(trials.answer(json.loads(request)))


def main(make: Callable[[torch.device], Device] = Device) -> None:
    """Serve on standard input and output until the input ends, or exit at once if the device is broken."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of libraries out of the answers
    try:
        device = torch.device(sys.argv[1])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        serve(make(device), sys.stdin, answers)
    except Exception:  # usually a broken context, after which a clean exit is impossible
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
