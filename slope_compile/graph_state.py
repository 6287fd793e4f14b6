"""Way in C: what a transformed graph holds for each weight, and under which names.

A weight ``layers.0.weight`` is replaced by tensors beside it, which are the graph's parameters and buffers:

| name | what |
|---|---|
| ``layers.0.weight_values`` | Parameter ``[N, K keep/group]`` |
| ``layers.0.weight_pattern`` | buffer uint8 ``[N, ceil(K/8)]`` |
| ``layers.0.weight_column_mask`` | buffer uint8 ``[N, ceil(K keep/group / 8)]``, if stored |
| ``layers.0.weight_adapter_A``, ``_B`` | Parameters ``[R, K]``, ``[N, R]``, if the rank is above 0 |
| ``layers.0.weight_adapter_scale`` | buffer int64 ``[1]``: the bits of the scale as a float64 |

The names are all that later steps (adapters on and off, refreshing columns) need, so they survive saving and loading.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slope_compile.config import LayerConfig
from slope_compile.kernels import ops
from slope_compile.parametrizations import choose_pattern, draw_adapter

VALUES, PATTERN, COLUMN_MASK = "_values", "_pattern", "_column_mask"
ADAPTER_A, ADAPTER_B, ADAPTER_SCALE = "_adapter_A", "_adapter_B", "_adapter_scale"


@torch.inference_mode(False)  # what is made in inference mode cannot be trained
@torch.no_grad()
def compressed_state(
    weight: Tensor, layer: LayerConfig, transposed: bool, path: str
) -> dict[str, nn.Parameter | Tensor]:
    """The tensors that replace a dense weight (``[N, K]``, or ``[K, N]`` if transposed), by suffix."""
    dense = weight.detach()
    dense = (dense.t() if transposed else dense).contiguous()
    N, K = dense.shape
    nm = layer.pattern
    pattern = choose_pattern(weight, layer, transposed, path)
    values = ops.compress(dense, pattern, nm.keep, nm.group)
    state: dict[str, nn.Parameter | Tensor] = {
        VALUES: nn.Parameter(values, requires_grad=weight.requires_grad),
        PATTERN: pattern,
    }
    if layer.stores_columns_for(N):
        state[COLUMN_MASK] = ops.pick_columns(values, pattern, nm.keep, nm.group)
    if layer.adapter_rank:
        A, B = draw_adapter((N, K), layer, path, values)
        # As bits: a floating buffer would be rounded by module.half() and the like.
        scale = torch.tensor([layer.adapter_scale], dtype=torch.float64, device="cpu").view(torch.int64)
        state |= {ADAPTER_A: nn.Parameter(A), ADAPTER_B: nn.Parameter(B), ADAPTER_SCALE: scale}
    return state


def adapter_scale(stored: Tensor) -> float:
    """The number behind ``*_adapter_scale``."""
    return float(stored.cpu().view(torch.float64).item())
