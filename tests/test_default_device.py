"""With another default device, new tensors are created on the weights' device or, where necessary, on the CPU.

The meta device stands for any: nothing there has numbers.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

import slope_compile as slope
from masked import assert_same_gradients, masked_copy, masks_of, picked_now
from recording import compiled_way, every_way
from recording import fresh_dynamo as fresh_dynamo
from tolerances import assert_same
from toy import step, token_ids, toy

CONFIG = slope.SlopeConfig(adapter_rank=2)


@every_way
def test_training(way: str) -> None:
    dense, ids = toy(), token_ids()
    with torch.device("meta"):
        model, run = compiled_way(way, dense, "eager")
        logits = step(run, ids)
    reference = masked_copy(dense, masks_of(model), picked_now)
    assert_same(logits, step(reference, ids))
    assert_same_gradients(model, reference)


def state(model: nn.Module) -> list[str]:
    return [name for name, tensor in model.state_dict().items() if tensor.is_meta]


def test_state_of_a_prepared_model() -> None:
    model, twin = toy(), toy()
    twin.load_state_dict(model.state_dict())
    slope.sparsify_(twin, CONFIG)
    with torch.device("meta"):
        slope.sparsify_(model, CONFIG)
        found = copy.deepcopy(model.state_dict())
    assert state(model) == []
    assert all(torch.equal(tensor, found[name]) for name, tensor in twin.state_dict().items())


def test_state_of_a_transformed_program() -> None:
    program = torch.export.export(toy(), (token_ids(),))
    with torch.device("meta"):
        transformed = slope.transform(program, CONFIG)
    assert [name for name, tensor in transformed.state_dict.items() if tensor.is_meta] == []
