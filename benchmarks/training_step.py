"""Cases of whole training steps: forward, backward, optimizer; dense and SLoPe both compiled, in turns."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import slope_compile as slope
from benchmarks import select
from benchmarks.cases import AUTOCAST, Case, Measurement, Options, Run, compare
from benchmarks.layers import label
from benchmarks.models import Subject, adamw, prepared

DROP_IN = select.DROP_IN.removeprefix("slope_")
"""In the place of a kind of backward: a dense model that the backend makes sparse, by its own defaults."""


class Trainee:
    """One compiled model with its optimizer; calling it takes a training step."""

    def __init__(self, subject: Subject, dtype: str, backward: str | None, options: Options) -> None:
        self.model = subject.build(dtype).to(options.device)
        self.sparse_paths: list[str] = []
        if backward is not None:
            # What the backend will make sparse are the linears that preparing finds.
            self.sparse_paths = prepared(copy.deepcopy(self.model) if backward == DROP_IN else self.model, backward)
        self.optimizer = adamw(self.model, options.optimizer)
        # The loss's graph is the same for both; only the backend differs.
        self.forward: Any = torch.compile(self.model, backend="inductor" if backward is None else slope.slope)
        tokens = subject.tokens(subject.batch, subject.context + 1, options.device)
        self.tokens, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        self.autocast: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if dtype == AUTOCAST:
            self.autocast = torch.autocast(options.device.type, dtype=torch.bfloat16)
        self.loss: Tensor | None = None

    def __call__(self, _: int) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast:
            self.loss = self.forward(self.tokens, self.targets)
        assert self.loss is not None
        self.loss.backward()
        self.optimizer.step()

    def last_loss(self) -> float:
        """Of the step taken last.

        Raises:
            ArithmeticError: it is not finite.
        """
        assert self.loss is not None
        loss = float(self.loss.detach())
        if not math.isfinite(loss):
            raise ArithmeticError(f"the loss is {loss}")
        return loss


def training_case(subject: Subject, backward: str, dtype: str, threads: int, options: Options) -> Case:
    """A training step of SLoPe (a kind of backward or ``DROP_IN``) against the dense model's, and the bytes of both."""
    ours, drop_in = f"slope_{backward}", backward == DROP_IN

    def run(given: Run) -> Iterator[Measurement]:
        dense, sparse = (Trainee(subject, dtype, way, options) for way in (None, backward))
        samples = given.measure({"dense": dense, ours: sparse})
        state = {
            "dense": slope.training_state(dense.model, dense.optimizer, sparse.sparse_paths),
            ours: slope.training_state(sparse.model, sparse.optimizer, sparse.sparse_paths if drop_in else None),
        }
        facts = {
            "model": subject.name,
            "batch": subject.batch,
            "context": subject.context,
            "tokens": subject.batch * subject.context,
            "dtype": dtype,
            "optimizer": options.optimizer,
            "parameters": sum(p.numel() for p in dense.model.parameters()),
            "sparse_linears": len(sparse.sparse_paths),
            "loss": {"dense": dense.last_loss(), ours: sparse.last_loss()},
            "state": {name: dataclasses.asdict(value) for name, value in state.items()},
        }
        yield compare("train", samples, {"dense": ["dense"], ours: [ours]}, ("dense",), facts)

    name = f"model/{subject.name}/train/{backward}/{label(dtype, threads)}"
    return Case(name, run, threads, seconds=90.0, limit=1800.0)
