"""Before a GPU test that takes the way "cusparselt": algorithms for the sizes of all of them, by one child process."""

from __future__ import annotations

import pytest
import torch
from filelock import FileLock

from slope_compile.kernels import _cusparselt, cusparselt_search

SIZES = ((48, 64, 96), (96, 256, 128), (96, 128, 256))
"""M, N, K, of those that are multiples of 16."""


SECONDS = 60.0
"""Limit of the search."""


@pytest.fixture(scope="session")
def searched_products(tmp_path_factory: pytest.TempPathFactory) -> list[_cusparselt.Product]:
    """Those that the library might compute, after the search; none where there is no GPU.

    Of several worker processes the first one searches, and the others wait for what it finds.
    """
    if not torch.cuda.is_available():
        return []
    device = torch.device("cuda", 0)
    products = [p for size in SIZES for dtype in _cusparselt.DTYPES for p in cusparselt_search.layer(dtype, *size)]
    shared = tmp_path_factory.getbasetemp().parent
    with FileLock(shared / "cusparselt.lock"), cusparselt_search.Search(device) as search:
        if not (shared / "cusparselt.searched").exists():
            search.run(products, seconds=SECONDS)
            (shared / "cusparselt.searched").touch()
    _cusparselt.known.cache_clear()
    return [p for p in products if _cusparselt.unfit(device, *p) is None]


@pytest.fixture(autouse=True)
def search_first(request: pytest.FixtureRequest) -> None:
    """Nothing is tried in this process."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is not None and callspec.params.get("way") == "cusparselt":
        request.getfixturevalue("searched_products")
