"""Averages of the weights of a prepared model, as ``torch.optim.swa_utils`` makes them."""

from __future__ import annotations

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from prepared import net
from slope_compile.config import SlopeConfig
from slope_compile.errors import PatternError
from slope_compile.schedule import set_adapters
from slope_compile.sparsify import sparsify_


def test_averaged_buffers_are_refused() -> None:
    """Averages of bits are other bits; parameters alone are to be averaged."""
    model, x = net(), torch.randn(3, 8, dtype=torch.float64)
    sparsify_(model)
    right = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    wrong = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(2):
        right.update_parameters(model)
        wrong.update_parameters(model)
    torch.testing.assert_close(right(x), model(x))
    with pytest.raises(PatternError, match=r"blocks\.\d\.\w+: \d+ of .* do not keep exactly 2 of 4"):
        wrong(x)


def test_an_average_has_a_switch_of_its_own() -> None:
    """Decay 0 makes the average the model, as soon as its adapters are on too."""
    model, x = net(), torch.randn(3, 8, dtype=torch.float64)
    sparsify_(model, SlopeConfig(adapter_rank=2))
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0))
    set_adapters(model, True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_()
    averaged.update_parameters(model)
    assert not torch.allclose(averaged(x), model(x))
    set_adapters(averaged, True)
    torch.testing.assert_close(averaged(x), model(x))
