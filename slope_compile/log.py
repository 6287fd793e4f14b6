"""The library's loggers: ``slope_compile`` and below.  ``TORCH_LOGS="+slope_compile"`` turns on its details."""

from __future__ import annotations

import logging

log = logging.getLogger("slope_compile")
