"""Weight products on the CPU: the binding of the compiled kernel, and weights in its order."""

from __future__ import annotations

import ctypes
import mmap
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import Activation
from engine.errors import ConfigError
from engine.model.library import address_of, load_kernel

Format = Literal["float32", "bfloat16", "int8"]

FORMATS: tuple[Format, ...] = ("float32", "bfloat16", "int8")
ACTIVATIONS: tuple[Activation | None, ...] = (None, "gelu", "gelu_tanh", "relu", "relu2")
PANEL = 64
"""Outputs whose weights stand together; PANEL of cpu_panel.h."""

MAX_INT8_FEATURES = 2**31 // (255 * 127) - 1
"""Beyond so many in_features a sum of int8 products might not fit into 32 bits."""

CODES = 16
"""Of a panel; BF12::CODES of cpu_bf12.h."""

WORDS_PER_PATCH = 256
"""bfloat16 is held in 12 bits where at most one word of so many needs a patch. Trained weights: one
of 2,700 to 12,000; with one of 128, products of 8 rows and more would be slower for it."""


class _Linear(ctypes.Structure):
    """RopewayLinear of cpu_linear.cpp."""

    _fields_ = [
        *(
            (name, ctypes.c_void_p)
            for name in (
                "weight",
                "scale",
                "offset",
                "bias",
                "norm_weight",
                "norm_bias",
                "codes",
                "patches",
                "patch_begins",
            )
        ),
        *(
            (name, ctypes.c_int32)
            for name in (
                "in_features",
                "out_features",
                "format",
                "norm",
                "activation",
                "in_bfloat16",
                "out_bfloat16",
            )
        ),
        ("eps", ctypes.c_float),
    ]


class WeightMemory:
    """Memory in pages of 2 MiB where the system has them: a step reads all of it, in order."""

    CHUNK_BYTES = 2**26

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def take(self, num_bytes: int) -> Tensor:
        """uint8 [num_bytes]. What is not used of a chunk costs nothing."""
        size = -(-num_bytes // 64) * 64  # the next one begins at a cache line
        if self._chunk is None or self._used + size > len(self._chunk):
            # Private: shared memory gets no such pages, unless an administrator says so.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._chunk = mmap.mmap(-1, max(size, self.CHUNK_BYTES), flags)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                self._chunk.madvise(mmap.MADV_HUGEPAGE)
            self._used = 0
        place = torch.frombuffer(self._chunk, dtype=torch.uint8, count=num_bytes, offset=self._used)
        self._used += size
        return place

    def copy(self, tensor: Tensor) -> Tensor:
        """The same tensor here, contiguous."""
        return self.take(tensor.nbytes).view(tensor.dtype).view(tensor.shape).copy_(tensor)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[n, k] -> int8 [n, k], and float32 [n]: what a 1 stands for, by row; symmetric."""
    wide = weight.float()
    scale = wide.abs().amax(dim=1) / 127
    safe = torch.where(scale > 0, scale, 1.0)
    return (wide / safe[:, None]).round().to(torch.int8), scale


def to_panels(weight: Tensor) -> Tensor:
    """[out_features, in_features] as the kernel reads it: [panels, words, PANEL, width].

    What a panel or a word has too much is zero.
    """
    outputs, inputs = weight.shape
    width = 4 // weight.itemsize
    missing = (0, -inputs % width, 0, -outputs % PANEL)
    padded = F.pad(weight, missing) if any(missing) else weight  # which would copy all of it
    return padded.view(-1, PANEL, padded.shape[1] // width, width).transpose(1, 2)


class BF12Weight(NamedTuple):
    """A bfloat16 weight in 12 bits a number, without loss; BF12Weight of cpu_bf12.h."""

    panels: Tensor
    codes: Tensor
    patches: Tensor
    patch_begins: Tensor

    @classmethod
    def of(cls, weight: Tensor, memory: WeightMemory, variant: str) -> BF12Weight | None:
        """bfloat16 [out_features, in_features]; None where too many words would need a patch."""
        weight = weight.contiguous()
        outputs, inputs = weight.shape
        panels, words = -(-outputs // PANEL), -(-inputs // 2) * PANEL
        sizes = (outputs, inputs, torch.get_num_threads())
        types: list[type] = [*[ctypes.c_void_p] * 3, *[ctypes.c_int32] * 3]
        _, find_codes = load_kernel("linear", types, variant, "bf12_codes")
        codes = torch.empty(panels, CODES, dtype=torch.uint8)
        begins = torch.empty(panels + 1, dtype=torch.int64)
        find_codes(weight.data_ptr(), codes.data_ptr(), begins.data_ptr(), *sizes)
        num_patches = int(begins[-1])
        if num_patches * WORDS_PER_PATCH > panels * words:
            return None
        patches = torch.empty(num_patches, dtype=torch.int64)
        place = memory.take(panels * words * 3)  # bytes of a word
        types = [*[ctypes.c_void_p] * 5, *[ctypes.c_int32] * 3]
        _, write = load_kernel("linear", types, variant, "bf12_write")
        write(*(each.data_ptr() for each in (weight, codes, begins, place, patches)), *sizes)
        return cls(place, codes, patches, begins)


def _padded(vector: Tensor | None) -> Tensor | None:
    """float32, filled up with zeros to a multiple of PANEL."""
    if vector is None:
        return None
    return F.pad(vector.detach().float(), (0, -len(vector) % PANEL)).contiguous()


class KernelLinear(nn.Module):
    """norm(x) weight^T + bias, activated, added to a residual: one call. No gradients.

    A row's bits depend on that row alone, and on no number of threads.
    """

    def __init__(
        self,
        linear: nn.Linear,
        memory: WeightMemory,
        *,
        norm: nn.Module | None = None,
        activation: Activation | None = None,
        weight_format: Format | None = None,
        in_dtype: torch.dtype | None = None,
        out_dtype: torch.dtype | None = None,
        variant: str | None = None,
        kept_rows: int = 0,
        twelve_bits: bool = True,
    ) -> None:
        """norm: a LayerNorm or RMSNorm that stands before. weight_format: None: as the weight is.
        twelve_bits: hold bfloat16 so, without loss, where few enough words need a patch.
        kept_rows: so many have one memory for good: what a call returned, the next overwrites.

        in_dtype, out_dtype: float32 or bfloat16; None: the weight's. Raises KernelUnavailableError
        where there is no kernel (or not of the variant), ConfigError for what it does not compute.
        """
        super().__init__()
        weight = linear.weight.detach()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.in_dtype, self.out_dtype = in_dtype or weight.dtype, out_dtype or weight.dtype
        for name, dtype in (
            ("weight", weight.dtype),
            ("x", self.in_dtype),
            ("out", self.out_dtype),
        ):
            if dtype not in (torch.float32, torch.bfloat16):
                raise ConfigError(f"the CPU kernel takes float32 and bfloat16, {name} is {dtype}")
        self.variant, self._call = load_kernel(
            "linear", [*[ctypes.c_void_p] * 4, ctypes.c_int32, ctypes.c_int32], variant
        )
        self.weight_format: Format = weight_format or (
            "bfloat16" if weight.dtype == torch.bfloat16 else "float32"
        )
        scale = offset = None
        if self.weight_format == "int8":
            if self.in_features > MAX_INT8_FEATURES:
                raise ConfigError(
                    f"in_features must be at most {MAX_INT8_FEATURES} for int8, "
                    f"got {self.in_features}"
                )
            weight, scale = quantize_rows(weight)
            offset = F.pad(128 * weight.sum(dim=1, dtype=torch.int32), (0, -len(weight) % PANEL))
        else:
            weight = weight.to(getattr(torch, self.weight_format))
        coded = None
        if twelve_bits and self.weight_format == "bfloat16":
            coded = BF12Weight.of(weight, memory, self.variant)
        self.in_12_bits = coded is not None
        panels, *rest = coded or (memory.copy(to_panels(weight)), None, None, None)
        self._tensors = (  # kept alive: the structure holds their addresses
            panels,
            _padded(scale),
            offset,
            _padded(linear.bias),
            _padded(getattr(norm, "weight", None)),
            _padded(getattr(norm, "bias", None)),
            *rest,
        )
        addresses = (None if each is None else each.data_ptr() for each in self._tensors)
        self._linear = _Linear(
            *addresses,
            self.in_features,
            self.out_features,
            FORMATS.index(self.weight_format),
            _norm_kind(norm),
            ACTIVATIONS.index(activation),
            self.in_dtype == torch.bfloat16,
            self.out_dtype == torch.bfloat16,
            0.0 if norm is None else norm.eps,
        )
        self._kept = torch.empty(kept_rows, self.out_features, dtype=self.out_dtype)
        self.address = ctypes.addressof(self._linear)
        self.function_address = address_of(self._call)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """[..., in_features] -> [..., out_features]; residual: float32, of out's shape.

        Raises ValueError for other shapes or types.
        """
        shape = (*x.shape[:-1], self.out_features)
        if x.dtype != self.in_dtype or x.shape[-1] != self.in_features or not x.is_contiguous():
            raise ValueError(
                f"x must be contiguous {self.in_dtype} [..., {self.in_features}], "
                f"got {x.dtype} {tuple(x.shape)}"
            )
        if residual is not None and (
            residual.dtype != torch.float32
            or residual.shape != shape
            or not residual.is_contiguous()
        ):
            raise ValueError(
                f"residual must be contiguous float32 {shape}, "
                f"got {residual.dtype} {tuple(residual.shape)}"
            )
        num_rows = x.numel() // self.in_features
        if num_rows <= len(self._kept):
            out = self._kept[:num_rows].view(shape)
        else:
            out = torch.empty(shape, dtype=self.out_dtype)
        added = None if residual is None else residual.data_ptr()
        if num_rows and self._call(
            self.address, x.data_ptr(), added, out.data_ptr(), num_rows, torch.get_num_threads()
        ):
            raise MemoryError("no memory for the scratch space of a product")
        return out

    def extra_repr(self) -> str:
        """What print(model) shows."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{self.weight_format}{' in 12 bits' if self.in_12_bits else ''}, {self.variant}"
        )


class PanelEmbedding(nn.Module):
    """The rows of a head's weight in float32: a tied embedding that is not held a second time."""

    def __init__(self, head: KernelLinear) -> None:
        """Raises ConfigError for an int8 head: an embedding has its own precision."""
        super().__init__()
        if head.weight_format == "int8":
            raise ConfigError("an embedding cannot be read from an int8 head")
        types = [*[ctypes.c_void_p] * 3, ctypes.c_int32, ctypes.c_int32]
        _, self._call = load_kernel("linear", types, head.variant, "embedding")
        self._head = head

    def forward(self, token_ids: Tensor) -> Tensor:
        """Token ids int64 [...] -> float32 [..., in_features]. Raises IndexError."""
        ids = token_ids.contiguous()
        out = torch.empty(*ids.shape, self._head.in_features)
        status = self._call(
            self._head.address,
            ids.data_ptr(),
            out.data_ptr(),
            ids.numel(),
            torch.get_num_threads(),
        )
        if status:
            raise IndexError(f"token ids must be in [0, {self._head.out_features})")
        return out


def _norm_kind(norm: nn.Module | None) -> int:
    match norm:
        case None:
            return 0
        case nn.LayerNorm():
            return 1
        case nn.RMSNorm():
            return 2
    raise ConfigError(f"the CPU kernel has no {type(norm).__name__}")
