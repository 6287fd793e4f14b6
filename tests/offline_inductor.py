"""Inductor's code for a GPU that is not there: Inductor only asks for a device's properties, and they are answered.

Nothing is run and nothing is timed.  Tensors are fake; the kernels that Inductor generates are kept as text, which
``compile_kernel`` makes machine code of and ``interpret`` runs on CPU tensors in Triton's interpreter.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import re
import tempfile
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule

from triton_offline import Result, compiled_with_log, result_of

CHIPS = {(8, 0): ("NVIDIA A100", 108, 166912), (9, 0): ("a Hopper GPU", 132, 232448)}
"""Compute capability -> name, multiprocessors, shared memory of a block."""


@contextlib.contextmanager
def offline_gpu(capability: tuple[int, int] = (9, 0)) -> Iterator[None]:
    """What Inductor and Triton ask about ``cuda:0`` is answered as for a chip; our kernels count as tested there."""
    import torch._dynamo.device_interface as interface
    import triton
    from torch._inductor.runtime.hints import DeviceProperties
    from torch._subclasses import fake_tensor
    from torch.utils import _triton as triton_support
    from triton.backends.compiler import GPUTarget

    from slope_compile.kernels import gpu_ops, triton_products

    name, processors, shared = CHIPS[capability]
    arch = 10 * capability[0] + capability[1]
    properties = types.SimpleNamespace(
        name=name, major=capability[0], minor=capability[1], multi_processor_count=processors, warp_size=32,
        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
        total_memory=80 << 30, shared_memory_per_block_optin=shared, shared_memory_per_multiprocessor=shared,
        L2_cache_size=50 << 20, gcnArchName="",
    )  # fmt: skip
    target = GPUTarget("cuda", arch, 32)
    driver = types.SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
        get_device_interface=lambda: torch.cuda,
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    answers: dict[str, Callable[..., Any]] = {
        "get_device_properties": lambda device=None: properties,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_available": lambda: True,
        "get_compute_capability": lambda device=None: arch,
        "synchronize": lambda device=None: None,
        "get_raw_stream": lambda index=0: 0,
        "is_triton_capable": lambda device=None: True,
        "raise_if_triton_unavailable": lambda device=None: None,
        "is_bf16_supported": lambda including_emulation=False: True,
    }
    cuda: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: capability,
        "get_device_properties": lambda device=None: properties,
        "get_device_name": lambda device=None: name,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "_lazy_init": lambda: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "synchronize": lambda device=None: None,
        "_exchange_device": lambda index: 0,
        "_maybe_exchange_device": lambda index: 0,
    }
    worker = {key: answers[key] for key in ("get_device_properties", "current_device")}
    with contextlib.ExitStack() as stack:
        for owner, table in ((interface.CudaInterface, answers), (interface.CudaInterface.Worker, worker)):
            for key, answer in table.items():
                stack.enter_context(mock.patch.object(owner, key, staticmethod(answer)))
        for key, answer in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, key, answer))
        stack.enter_context(mock.patch.object(fake_tensor, "init_gpu_context"))
        stack.enter_context(mock.patch.object(gpu_ops, "ready", lambda device, dtype: device.type == "cuda"))
        stack.enter_context(mock.patch.object(triton.runtime.driver, "_active", driver))
        caches: list[Any] = [DeviceProperties.create, gpu_ops.name, triton_products.arch, gpu_ops.available]
        caches += [each for each in vars(triton_support).values() if hasattr(each, "cache_clear")]
        for cache in caches:
            cache.cache_clear()
        try:
            yield
        finally:
            for cache in caches:
                cache.cache_clear()


@dataclasses.dataclass
class Program:
    """What Inductor wrote for one graph."""

    source: str
    devices: frozenset[str] = frozenset()
    """Types of the devices on which anything is computed."""
    no_graph: str | None = None
    """Why Inductor would not record it as a CUDA graph."""

    @property
    def kernels(self) -> dict[str, str]:
        """Name -> source of each Triton kernel."""
        found = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str", self.source, re.S)
        return dict(found)

    @property
    def products(self) -> Counter[str]:
        """How often each kernel with a product of ours is launched: by "forward", "grad_input", "grad_weight"."""
        found: Counter[str] = Counter()
        for name, text in self.kernels.items():
            for product in ("forward_step", "grad_input_sums", "grad_weight_kept"):
                if f"def {product}(" in text:
                    found[product.rpartition("_")[0]] += len(re.findall(rf"\b{name}\.run\(", self.source))
        return found

    @property
    def calls(self) -> list[str]:
        """Of our functions."""
        return re.findall(r"extern_kernels\.slope_gpu_(\w+)\(", self.source)

    @property
    def dense(self) -> int:
        """Products with dense weights: PyTorch is called for them (batched ones are attention)."""
        return len(re.findall(r"extern_kernels\.(?:mm|addmm)\(", self.source))


def generated(module: GraphModule, inputs: Sequence[Any], **patches: Any) -> list[Program]:
    """Compile a graph of the backend with Inductor up to its code: a program for each graph, forward before backward.

    The graph is captured and differentiated on the CPU, for which PyTorch has autograd everywhere; each of Inductor's
    graphs is moved to the GPU then.  Call inside :func:`offline_gpu`.
    """
    from torch import _functorch as functorch
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner
    from torch._inductor.cudagraph_utils import check_multiple_devices_or_any_cpu_nodes
    from torch._inductor.graph import GraphLowering

    from slope_compile._inductor_lowerings import marked

    programs: list[Program] = []

    def stopped(self: Any) -> Any:
        written, *_ = self.codegen()
        text = getattr(written, "value", written)
        mixed = check_multiple_devices_or_any_cpu_nodes(self.device_node_mapping)
        programs.append(Program(text, frozenset(self.device_types), self.disable_cudagraphs_reason or mixed))
        return types.SimpleNamespace(call=lambda args: args, __file__=__file__, key="offline", runner=None)

    def inner(graph: GraphModule, given: Sequence[Any], **arguments: Any) -> Any:
        return compile_fx_inner(*on_gpu(graph, given), **arguments)

    with (
        mock.patch.object(GraphLowering, "compile_to_module", stopped),
        config.patch({"force_disable_caches": True, "compile_threads": 1}),
        functorch.config.patch({"force_non_lazy_backward_lowering": True}),
    ):
        compile_fx(module, list(inputs), inner_compile=inner, config_patches=marked(patches))
    return programs


def on_gpu(graph: GraphModule, inputs: Sequence[Any]) -> tuple[GraphModule, list[Any]]:
    """A graph with everything it names moved from the CPU to the GPU, and fake inputs there."""
    from torch._guards import detect_fake_mode

    device, mode = torch.device("cuda", 0), detect_fake_mode(inputs)
    assert mode is not None

    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)

    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.kwargs = {**node.kwargs, "device": device}
        for key in ("val", "tensor_meta"):
            if isinstance(node.meta.get(key), Tensor):
                node.meta[key] = moved(node.meta[key])
    graph.recompile()
    return graph, [moved(value) for value in inputs]


def undecorated(source: str, folder: Path) -> Any:
    """The function of a generated kernel, without the launcher around it."""
    text = re.sub(r"@triton_heuristics\.\w+\(.*?\n\)\n(?=@triton\.jit)", "", source, flags=re.S)
    name = re.findall(r"^def (triton_\w+)\(", text, re.M)[0]
    path = folder / f"{name}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def compile_kernel(source: str, arch: int = 90) -> Result:
    """A generated kernel as machine code."""
    import triton
    from triton.backends.compiler import GPUTarget

    signature: dict[str, str] = ast.literal_eval(re.findall(r"'signature': (\{.*?\})", source)[0])
    options = {name: int(re.findall(rf"\b{name}=(\d+)", source)[0]) for name in ("num_warps", "num_stages")}
    with tempfile.TemporaryDirectory() as folder:
        kernel = undecorated(source, Path(folder))
        aligned: dict[tuple[int, ...], list[Any]] = {
            (index,): [["tt.divisibility", 16]] for index, kind in enumerate(signature.values()) if kind[0] == "*"
        }
        ast_source = triton.compiler.ASTSource(kernel, signature, {}, aligned)
        compiled, log = compiled_with_log(ast_source, GPUTarget("cuda", arch, 32), options)
    return result_of(compiled, log)
