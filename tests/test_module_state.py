"""The parameters that a module itself holds."""

from __future__ import annotations

import torch
from torch import nn

from slope_compile._module_state import holds_parameter, put_first


def test_only_parameters_of_the_module_itself_count() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False))
    module.register_parameter("missing", None)
    module.register_buffer("buffer", torch.ones(1))
    assert holds_parameter(module[0], "weight")
    assert not any(holds_parameter(module, name) for name in ("0.weight", "missing", "buffer", "other"))
    assert not holds_parameter(module[0], "bias")


def test_parameters_are_put_first_in_the_order_given() -> None:
    module = nn.Module()
    for name in "abcd":
        module.register_parameter(name, nn.Parameter(torch.ones(1)))
    before = dict(module.named_parameters())
    put_first(module, ("d", "other", "b"))
    assert [name for name, _ in module.named_parameters()] == ["d", "b", "a", "c"]
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
