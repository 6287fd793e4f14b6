"""A prepared weight: ``torch.nn.utils.parametrize`` parametrizations on a stock linear layer.

    values --SparseWeight--> dense W^R --LowRank (while enabled)--> W^R + scale * B @ A --> the layer's own forward

Eager mode, other backends, ``state_dict``, optimizers and autocast see ordinary tensors.  Eager computes the exact
input gradient; the double-pruned one is what ``torch.compile(..., backend="slope")`` adds.  Forward-mode
differentiation works in eager mode, and the transforms of ``torch.func`` work there and in compiled functions.

A Conv1D (Hugging Face's transposed linear) stores its weight as ``[K, N]``: ``transposed=True``.  ``values`` are
``[N, K * keep / group]`` all the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slope_compile._transforms import inside_transform
from slope_compile.config import LayerConfig
from slope_compile.kernels import ops, reference
from slope_compile.kernels._versions import writing
from slope_compile.kernels.masks import choose_mask, seeded_generator
from slope_compile.kernels.metadata import check_pattern, pack_mask, packed_width, unpack_mask
from slope_compile.log import log
from slope_compile.outside import Place, in_python


class SparseWeight(nn.Module):
    """``values [N, K keep/group]`` (the Parameter, held by the parametrization list) -> dense ``[N, K]``.

    Buffers, all in ``state_dict``:
        pattern: uint8 ``[N, ceil(K/8)]``, static.
        column_mask: uint8 ``[N, ceil(K keep/group / 8)]``, one bit per value, only if the configuration stores it.
        column_age: int64 ``[1]`` on the CPU, optimizer steps since the column mask was picked.
    """

    pattern: Tensor
    column_mask: Tensor | None
    column_age: Tensor | None

    def __init__(self, pattern: Tensor, shape: tuple[int, int], layer: LayerConfig, transposed: bool = False) -> None:
        super().__init__()
        self.nm = layer.pattern
        self.shape = shape  # (N, K)
        self.transposed = transposed
        self.double_pruned = layer.double_prunes(shape[0])
        self.interval = layer.interval if self.double_pruned else 0
        self.place: Place | None = None
        self.stores_columns = layer.stores_columns_for(shape[0])
        self.register_buffer("pattern", pattern)
        self._checked: tuple[int, int] | None = None if pattern.is_inference() else writing(pattern)
        """Version and address of the pattern when it was last known to be legal."""
        self.register_buffer("column_mask", None)
        self.register_buffer("column_age", None)

    def pick_columns(self, values: Tensor) -> None:
        """Pick the column mask of these values, if it is stored."""
        if self.stores_columns:
            self.column_mask = ops.pick_columns(values.detach(), self.pattern, self.nm.keep, self.nm.group)
            self.column_age = torch.full((1,), -1, dtype=torch.int64, device="cpu")

    def _check(self) -> None:
        """Check a pattern that was written to: averaging a model's buffers turns bits into other bits."""
        if type(self.pattern) is not Tensor or self.pattern.is_inference() or self.pattern.is_meta:
            return
        state = writing(self.pattern)
        if state != self._checked:
            check_pattern(self.pattern, self.shape[1], self.nm, "pattern" if self.place is None else self.place.path)
            self._checked = state

    def forward(self, values: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            if not inside_transform():  # tensors there have no memory of their own
                self._check()
            if self.place is not None:  # in this order: no guard on the place
                in_python(self.place)
        if inside_transform():
            weight = reference.expand(values, self.pattern, self.nm.keep, self.nm.group)
        else:
            weight = ops.expand(
                values,
                self.pattern,
                self.nm.keep,
                self.nm.group,
                self.double_pruned,
                self.column_mask,
                self.column_age,
                self.interval,
            )
        return weight.t() if self.transposed else weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Dense weight (in the layer's own orientation) -> its values at the kept positions."""
        weight = weight.t() if self.transposed else weight
        values: Tensor = ops.compress(weight.detach(), self.pattern, self.nm.keep, self.nm.group)
        return values

    def extra_repr(self) -> str:
        N, K = self.shape
        if not self.double_pruned:
            backward = "exact"
        elif not self.stores_columns:
            backward = "double_pruned at each backward"
        else:
            every = f"every {self.interval} steps" if self.interval else "never"
            backward = f"double_pruned, columns refreshed {every}"
        return f"{self.nm} of [{N}, {K}], values [{N}, {self.nm.compressed(K)}], backward={backward}"

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        age = self.column_age
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.column_age = age  # a counter that is read by the host in every step: it stays on the CPU
        return self

    def _load_from_state_dict(  # type: ignore[no-untyped-def]
        self, state_dict, prefix, metadata, strict, missing, unexpected, errors
    ):
        pattern = state_dict.get(prefix + "pattern")
        if pattern is not None:
            check_pattern(pattern, self.shape[1], self.nm, prefix.removesuffix("."))
        elif (dense := _dense_name(prefix)) in unexpected and not any(key.endswith(".pattern") for key in missing):
            # Not among the errors: PyTorch would raise those with strict=False too.
            log.warning(
                "load_state_dict: %r is dense in this checkpoint and compressed in the model, and is not loaded; "
                "load a dense checkpoint first, then sparsify_",
                dense,
            )
        self._renew_columns(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)

    def _renew_columns(self, state_dict: dict[str, Tensor], prefix: str) -> None:
        """Turn what earlier versions stored, the transpose's pattern uint8 ``[K, ceil(N/8)]``, into a column mask."""
        old, new, (N, K) = prefix + "column_pattern", prefix + "column_mask", self.shape
        columns = state_dict.get(old)
        if columns is None or new in state_dict or columns.shape != (K, packed_width(N)):
            return
        pattern = state_dict.get(prefix + "pattern", self.pattern).to(columns.device)
        mask = reference.compress(unpack_mask(columns, N).t(), pattern, self.nm.keep, self.nm.group)
        state_dict[new] = pack_mask(mask)
        del state_dict[old]


def _dense_name(prefix: str) -> str:
    """``"a.b.parametrizations.weight.0."`` -> ``"a.b.weight"``: where a dense model has the weight."""
    owner, _, rest = prefix.rpartition("parametrizations.")
    return owner + rest.partition(".")[0]


class LowRank(nn.Module):
    """Adds ``scale * B @ A`` to the weight while enabled; before that it is the identity.

    ``A [R, K]`` is drawn from N(0, 1) and ``B [N, R]`` is zero, as in the method's released code, so that switching on
    does not change the output.  Both are Parameters from the start; while disabled they take no part in the graph and
    so have no gradient and no optimizer state.
    """

    def __init__(self, A: Tensor, B: Tensor, scale: float, transposed: bool = False) -> None:
        super().__init__()
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        # As text: a float that differs between two layers of the same code, or is traced with dynamic=True, becomes an
        # input of Dynamo's graph, and the passes could not read the adapter's expression.  Text stays a constant.
        self._scale = repr(scale)
        self.transposed = transposed
        self.enabled = False

    @property
    def scale(self) -> float:
        """Factor of the product."""
        return float(self._scale)

    def forward(self, weight: Tensor) -> Tensor:
        if not self.enabled:
            return weight
        if self.transposed:
            return torch.addmm(weight, self.A.t(), self.B.t(), alpha=self.scale)
        return torch.addmm(weight, self.B, self.A, alpha=self.scale)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The part of an assigned weight that is left to the parametrizations below."""
        if not self.enabled:
            return weight
        product = self.scale * (self.B @ self.A)
        return weight - (product.t() if self.transposed else product)

    def get_extra_state(self) -> Tensor:
        """Whether the adapters are on, as a tensor, so that any checkpoint format can hold it."""
        return torch.tensor([self.enabled], dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.enabled = bool(state.item())

    def extra_repr(self) -> str:
        state = "on" if self.enabled else "off"
        return f"rank={self.A.shape[0]}, scale={self.scale:g}, {state}"


def choose_pattern(weight: Tensor, layer: LayerConfig, transposed: bool, path: str) -> Tensor:
    """The pattern, uint8 ``[N, ceil(K/8)]``, of a dense weight ``[N, K]``, or ``[K, N]`` if transposed."""
    dense = weight.detach()
    dense = (dense.t() if transposed else dense).contiguous()
    return pack_mask(choose_mask(dense, layer.pattern, layer.mask, layer.seed, path))


def draw_adapter(shape: tuple[int, int], layer: LayerConfig, path: str, like: Tensor) -> tuple[Tensor, Tensor]:
    """Initial factors of an adapter for a weight of ``shape`` (N, K): ``A [R, K]`` ~ N(0, 1), ``B [N, R]`` = 0.

    They depend on seed, module path and shape only; dtype and device are those of ``like``.
    """
    generator = seeded_generator(f"adapter:{layer.seed}:{path}")
    N, K = shape
    A = torch.randn(layer.adapter_rank, K, generator=generator, dtype=torch.float32, device="cpu")
    return A.to(like.dtype).to(like.device), like.new_zeros(N, layer.adapter_rank)
