"""How graphs reach a compiler: Inductor (the default), AOTAutograd without a compiler, or plain eager execution.

Private names used, tested on torch 2.11 and 2.13: ``torch._inductor.compile_fx.compile_fx``,
``torch._inductor.list_mode_options`` and ``list_options``, ``torch._dynamo.backends.debugging.aot_eager``.  Imported
when a graph is compiled, not before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from torch.fx import GraphModule

Compiled = Callable[..., Any]
COMPILERS = ("inductor", "aot_eager", "eager")


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's options for a ``mode`` of ``torch.compile``; raises ValueError naming the valid modes."""
    from torch._inductor import list_mode_options

    modes = list_mode_options()
    if mode not in modes:
        raise ValueError(", ".join(sorted(modes)))
    return dict(modes[mode])


def option_names() -> list[str]:
    """Names of Inductor's options."""
    from torch._inductor import list_options

    return list(list_options())


def compile_graph(
    module: GraphModule, inputs: Sequence[Any], compiler: str, patches: dict[str, Any]
) -> Compiled:
    """Compile a graph with the compiler of that name (one of ``COMPILERS``)."""
    if compiler == "inductor":
        from torch._inductor.compile_fx import compile_fx

        from slope_compile._inductor_lowerings import marked

        compiled: Any = compile_fx(module, list(inputs), config_patches=marked(patches))
        return cast(Compiled, compiled)
    if compiler == "aot_eager":
        from torch._dynamo.backends.debugging import aot_eager

        return aot_eager(module, list(inputs))
    _ = module.code  # generates the code of a lazy graph, and with it the forward that runs at every call
    return module.forward
