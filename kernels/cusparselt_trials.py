"""The process in which cuSPARSELt's algorithms are tried, so that one that breaks the GPU's context breaks no other's.

``cusparselt_search`` starts it and asks, a line of JSON at a time; each is answered by a line before the next is read.
It knows therefore which request ended this process.  Everything is waited for before it is answered: an illegal
instruction shows at the next synchronization only.

| request | answer |
|---|---|
| (at the start) | ``{"identity": [GPU, library, torch]}`` |
| ``{"product": ["float16", M, N, K]}`` | ``{"ready": true}``; random numbers were drawn |
| ``{"release": true}`` | ``{"ready": true}``; its memory was given back |
| ``{"suggest": true}`` | ``{"algorithm": [id, split_k, mode], "count": number of ids}``, the library's own pick |
| ``{"try": [id, split_k, mode]}`` | ``{"seconds": of the GPU, "host": of a call}`` if right, or ``{"wrong": why}`` |

Instead, any request may be answered by ``{"refused": why}`` or, for want of memory, by ``{"memory": why}``.
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
"""Draws of numbers for which an algorithm owes right results, with a bias and without, before it is timed: random ones
and then unusual ones among them."""
CALLS = 20
"""Over which the time of the host is averaged."""


class Device:
    """What a trial needs of the GPU beside the library; the tests put another in its place."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, call: Callable[[], object]) -> float:
        return gpu_tuning.gpu_seconds(call)

    def wait(self) -> None:
        """Until all is done; raises where the context is broken."""
        torch.cuda.synchronize(self.device)

    def release(self) -> None:
        """Give unused memory back."""
        torch.cuda.empty_cache()


class Trials:
    """One product's numbers, and what was asked about it."""

    def __init__(self, device: Device) -> None:
        self._gpu = device
        self._drawn: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        """Activations, packed weight, bias and the right result without it."""

    def answer(self, request: Answer) -> Answer:
        """See the module docstring.

        Raises:
            RuntimeError: the device works no more.
        """
        try:
            with torch.no_grad():
                found = self._answer(request)
        except torch.OutOfMemoryError as error:
            found = {"memory": _line(error)}
        except Exception as error:  # Whatever the library raises where it cannot.
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
            # Freed at once, and handed out again: a result that nobody writes is NaN.
            torch.full(truth.shape, torch.nan, dtype=x.dtype, device=x.device)
            result = _cusparselt.primitives.product(packed, x.t(), bias if biased else None, algorithm).float()
            error = (result - truth - bias.float() if biased else result - truth).abs()
            # Inputs have unit variance: 2^-7 of the sums' deviation is above any rounding of 16-bit results.
            near = error <= 2.0**-7 * truth.abs() + 2.0**-7 * (x.shape[1] / 2) ** 0.5
            if bool((truth.isnan() & ~result.isnan()).any()):
                return {"wrong": "a weight that is NaN is lost"}
            if not bool((near | truth.isnan()).all()):
                return {"wrong": f"off by {float(error[~truth.isnan()].max()):.3g}"}
        x, packed, _, _ = self._drawn[0]
        call = functools.partial(_cusparselt.primitives.product, packed, x.t(), None, algorithm)
        return {"seconds": self._gpu.seconds(call), "host": self._host_seconds(call)}

    def _host_seconds(self, call: Callable[[], object]) -> float:
        """What a call costs the host, descriptors and plan included; the work on the device is not waited for."""
        self._gpu.wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return (time.perf_counter() - start) / CALLS


def _unusual(values: Tensor) -> None:
    """Among random numbers: groups and rows of zeros, subnormal numbers, and one that makes its output NaN alone."""
    values[1::4] = 0
    values[2::4, :16] = 0
    values[3::4, 1::3] = torch.finfo(values.dtype).smallest_normal / 8
    values[4, 5] = torch.nan


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def serve(device: Device, requests: Iterable[str], answers: TextIO) -> None:
    """Answer line by line, until there are no more."""

    def say(answer: Answer) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    trials = Trials(device)
    device.wait()
    say({"identity": _cusparselt.identity(device.device)})
    for request in requests:
        say(trials.answer(json.loads(request)))


def main(make: Callable[[torch.device], Device] = Device) -> None:
    """Serve on standard input and output.  It ends with the input, or at once where the device is broken."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    try:
        device = torch.device(sys.argv[1])
        if device.type == "cuda":
            torch.cuda.set_device(device)
        serve(make(device), sys.stdin, answers)
    except Exception:  # Most of all a broken context, with which nothing can be cleaned up.
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    main()
