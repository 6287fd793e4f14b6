"""Names of dtypes."""

from __future__ import annotations

import torch

from slope_compile.dtypes import DTYPES, dtype_name


def test_names_are_those_of_torch() -> None:
    assert [getattr(torch, dtype_name(dtype)) for dtype in DTYPES] == list(DTYPES)
