"""The C++ compiler that Inductor is set to use.

Private name used: ``torch._inductor.config`` (``cpp.cxx``; 2.11-2.13), and only once something else has loaded it.
Asking ``torch._inductor.cpp_builder.get_cpp_compiler`` would import Inductor, Dynamo and Triton: seconds, and in a
background thread a risk, because a fork in the middle leaves the child with import locks that nobody holds.  Until
Inductor is loaded its setting has its default value: ``$CXX``, else g++ (clang++ on macOS).
"""

from __future__ import annotations

import sys


def inductor_compilers() -> list[str]:
    """What Inductor would try, in its order; empty if it is not loaded."""
    config = sys.modules.get("torch._inductor.config")
    setting = getattr(getattr(config, "cpp", None), "cxx", None)
    named = setting if isinstance(setting, (list, tuple)) else [setting]
    return [name for name in named if isinstance(name, str) and name]  # None stands for a compiler from conda
