"""The Gluon kernels that give right results on a device: the candidates for measurements and tuning.

Nothing uses them automatically.  The first call for a device compiles the kernels and compares their results, see
``self_tests``.
"""

from __future__ import annotations

import torch

from slope_compile.kernels import gluon_configs, gluon_self_test
from slope_compile.kernels.gluon_configs import Config
from slope_compile.kernels.gluon_products import unsupported
from slope_compile.kernels.self_tests import trusted


def choices(
    M: int, N: int, K: int, R: int, device: torch.device, dtype: torch.dtype, bias: bool = True
) -> tuple[Config, ...]:
    """Configurations that compute ``[M, K] x [N, K]^T`` with a low-rank update of rank R on a CUDA device.

    Configurations that would compute more than twice as many tokens are left out.  The caller must have checked that
    Triton works on the device (``gpu_ops.available``).
    """
    if device.type != "cuda":
        return ()
    capability = torch.cuda.get_device_capability(device)
    fitting: list[Config] = []
    if unsupported("mma_sp", capability, dtype, M, N, K, R) is None:
        most = max(2 * M, gluon_configs.FEW_TOKENS)
        fitting += [config for config in gluon_configs.MMA_SP if most >= config.BM]
    if unsupported("wgmma_sp", capability, dtype, M, N, K, R) is None:
        fitting += [c for c in gluon_configs.WGMMA_SP if 2 * M >= c.BM and c.largest_rank >= R]
    cases = (gluon_self_test.case(config, bias, R > 0, N) for config in fitting)
    return tuple(case[0] for case in cases if trusted(gluon_self_test.passes, device, dtype, *case))
