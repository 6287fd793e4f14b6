"""The search for cuSPARSELt's algorithms on a GPU: it has a result for each product, and this process still works."""

from __future__ import annotations

import pytest
import torch

from slope_compile.kernels import _cusparselt

pytestmark = pytest.mark.gpu


def test_cusparselt_was_searched(searched_products: list[_cusparselt.Product]) -> None:
    if not searched_products:
        pytest.skip("cuSPARSELt does not exist here")
    device = torch.device("cuda", 0)
    assert set(searched_products) <= _cusparselt.known(device).keys()
    assert any(_cusparselt.known(device)[product] for product in searched_products)
    assert torch.ones(3, device=device).sum().item() == 3
