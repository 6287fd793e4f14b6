"""``torch.compile(model, backend="slope")`` of several models in a process, and of one again after a reset."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from masked import assert_same_gradients, masked_copy, masks_of, picked_now
from recording import compiled, compiled_way, record
from recording import fresh_dynamo as fresh_dynamo
from tolerances import assert_same
from toy import SPARSE, step, token_ids, toy


def test_models_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Different ways, patterns and backwards in one process, trained in turns."""
    recording = record(monkeypatch)
    settings: list[tuple[str, dict[str, Any]]] = [
        ("A", {"seed": 1}),
        ("B", {"backward": "exact"}),
        ("A", {"backward": "exact", "mask": "magnitude"}),
        ("B", {"seed": 2}),
    ]
    runs = []
    for way, fields in settings:
        dense = toy()
        model, run = compiled_way(way, dense, "eager", fields)
        runs.append((dense, model, run, fields))
    ids = token_ids()
    references = []
    for dense, model, run, fields in runs:
        run(ids)
        columns = {} if fields.get("backward") == "exact" else {"columns": picked_now}
        references.append(masked_copy(dense, masks_of(model), **columns))
    for _ in range(2):
        for (_, model, run, _), reference in zip(runs, references, strict=True):
            model.zero_grad()
            reference.zero_grad()
            assert_same(step(run, ids), step(reference, ids))
            assert_same_gradients(model, reference)
    assert [one.sparse for one in recording] == [len(SPARSE)] * len(runs)


@pytest.mark.slow
def test_compiling_again_after_a_reset() -> None:
    """Recompiled from nothing, a model keeps its masks and its values."""
    dense, ids = toy(), token_ids()
    for way in "AB":
        model, run = compiled_way(way, dense)
        first = step(run, ids)
        masks = masks_of(model)
        torch._dynamo.reset()
        assert torch.equal(step(compiled(model), ids), first)
        assert all(torch.equal(mask, masks[path]) for path, mask in masks_of(model).items())
