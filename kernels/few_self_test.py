"""Whether the kernel for few tokens can be trusted on a device: it is run there on numbers with one answer."""

from __future__ import annotations

import torch

from slope_compile.kernels import few_tokens, reference
from slope_compile.kernels.few_tokens import FewTokens
from slope_compile.kernels.gpu_self_test import _mask, _numbers, equal, unusual
from slope_compile.kernels.metadata import pack_mask
from slope_compile.log import log

N = 37
"""Outputs: no multiple of a program's."""


def passes(device: torch.device, dtype: torch.dtype, config: FewTokens, M: int) -> bool:
    """Whether the kernel is right for M tokens; where it is not, or does not build, the log says so.

    Inputs are -1, 0 and 1, so that every sum is exact: in a row of one step, and in one of two and a rest; then with
    zeros, an infinity and a NaN among the weights.
    """
    step = 4 * 32 * config.WK * config.EACH
    try:
        wrong = [K for K in (96, 2 * step + 32) if not _right(device, dtype, config, M, K)]
    except Exception as error:  # Whatever a compiler or a driver raises.
        log.warning("the kernel %s does not run on %s in %s and is not used: %s", config, device, dtype, error)
        return False
    if wrong:
        log.warning("the kernel %s is wrong on %s in %s for %d tokens of %s features and is not used",
                    config, device, dtype, M, " and ".join(map(str, wrong)))  # fmt: skip
    return not wrong


def _right(device: torch.device, dtype: torch.dtype, config: FewTokens, M: int, K: int) -> bool:
    with torch.no_grad(), torch.inference_mode(False):
        pattern = pack_mask(_mask(N, K)).to(device)
        values, x, bias = (_numbers(*size).to(device, dtype) for size in ((N, K // 2, 7), (M, K, 5), (1, N, 5)))
        for kept, given in ((values, None), (values, bias[0]), (unusual(values), None)):
            # Freed at once, so that a result that nobody writes is this rather than the one of the run before.
            torch.full((M, N), torch.nan, device=device, dtype=dtype)
            result = few_tokens.forward(x, kept, pattern, given, config)
            truth = reference.forward(x.double(), kept.double(), pattern, None, 2, 4)
            if not equal(result, truth if given is None else truth + given.double()):
                return False
    return True
