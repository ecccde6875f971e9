"""Weight matrices of decoding on a CPU, in the layout that is fastest there.

A matrix is used once for each token, so its bytes limit the speed. oneDNN reads a matrix in its own blocked layout at
the speed of the memory, where `F.linear` of one row takes up to five times as long; int8 and int4 weights have fewer
bytes.

Shapes: B sequences, k matrices (out, in).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SMALL = 1 << 20  # numbers in a matrix up to which `SmallMatrices` may be faster
FEW = 700_000  # multiplications that take about as long as a call of oneDNN
INT4_GROUP = 32  # inputs that share a scale


class Matrices(ABC):
    """k matrices of one shape (out, in) that multiply a few rows, with an optional relu.

    Args:
        weights: The matrices, k x (out, in), float32 or bfloat16.
        dtype: float32 or bfloat16: of the products, and of the weights where they are not quantised.
        relu: Whether the products go through relu.
    """

    def __init__(self, weights: Sequence[Tensor], dtype: torch.dtype, relu: bool = False):
        self.dtype, self.relu = dtype, relu
        self.post = "relu" if relu else "none"  # oneDNN's post operation
        self.pack([weight.detach() for weight in weights])

    @abstractmethod
    def pack(self, weights: list[Tensor]) -> None:
        """Store the weights, k x (out, in), in the layout of this class."""

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x[:, i] of rows (B, k, in), float32, by matrix i; concatenate: (B, k * out) of `dtype`."""

    def finish(self, products: list[Tensor]) -> Tensor:
        """Concatenate products, k x (B, out), and apply the relu: (B, k * out)."""
        y = concatenate(products).to(self.dtype)  # (B, k * out)
        return y.relu_() if self.relu else y


def concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class PlainMatrices(Matrices):
    """Plain weights: the reference, and for processors without oneDNN."""

    def pack(self, weights: list[Tensor]) -> None:
        self.weights = [weight.to(self.dtype) for weight in weights]

    def __call__(self, x: Tensor) -> Tensor:
        parts = x.to(self.dtype).unbind(1)  # k x (B, in)
        return self.finish([F.linear(part, weight) for part, weight in zip(parts, self.weights, strict=True)])


class PackedMatrices(Matrices):
    """Weights in oneDNN's blocked layout."""

    def pack(self, weights: list[Tensor]) -> None:
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.weights = [reorder(weight.to(self.dtype).contiguous()) for weight in weights]
        self.linear = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        parts = zip(x.to(self.dtype).unbind(1), self.weights, strict=True)
        return concatenate([self.linear(part, weight, None, self.post, [], "") for part, weight in parts])


class SmallMatrices(PackedMatrices):
    """float32 matrices so small that a call of oneDNN takes longer than the product: few rows use one bmm for all k."""

    def pack(self, weights: list[Tensor]) -> None:
        super().pack(weights)
        self.stack = torch.stack(weights).to(self.dtype).mT.contiguous()  # (k, in, out)

    def __call__(self, x: Tensor) -> Tensor:
        B, _, width = x.shape
        if B * width * self.stack.shape[2] > FEW:
            return super().__call__(x)
        y = torch.bmm(x.transpose(0, 1), self.stack).transpose(0, 1).flatten(1)  # (B, k * out)
        return y.relu_() if self.relu else y


class Int8Matrices(Matrices):
    """int8 weights with a scale for each output; rows are rounded to 8 bits with a scale for each. Uses oneDNN."""

    def pack(self, weights: list[Tensor]) -> None:
        rounded = [round_rows(weight.float()) for weight in weights]  # (out, in) int8 and (out, 1)
        self.weights = [torch.ops.onednn.qlinear_prepack(quantized, None) for quantized, _ in rounded]
        self.scales = [scale[:, 0].contiguous() for _, scale in rounded]  # k x (out)
        self.zeros = torch.zeros_like(self.scales[0], dtype=torch.int32)  # (out)
        self.linear = torch.ops.onednn.qlinear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        scale = row_scales(x)  # (B, k, 1)
        quantized = (x / scale).add_(128.5).to(torch.uint8)  # (B, k, in), 128 for 0; cut off, which rounds
        y = concatenate([self.multiply(part, i) for i, part in enumerate(quantized.unbind(1))])  # (B, k * out)
        return y.view(*x.shape[:2], -1).mul_(scale.to(self.dtype)).flatten(1)

    def multiply(self, quantized: Tensor, i: int) -> Tensor:
        """Multiply rows (B, in) uint8, 128 for 0, by matrix i: (B, out), without the rows' scales."""
        scales, zeros = self.scales[i], self.zeros
        return self.linear(
            quantized, 1.0, 128, self.weights[i], scales, zeros, None, 1.0, 0, self.dtype, self.post, [], ""
        )


class Int8WeightMatrices(Matrices):
    """int8 weights with a scale for each output, rows in bfloat16: for processors without int8 dot products.

    `in` must be divisible by 16.
    """

    def pack(self, weights: list[Tensor]) -> None:
        rounded = [round_rows(weight.float()) for weight in weights]  # (out, in) int8 and (out, 1)
        self.weights = [quantized for quantized, _ in rounded]
        self.scales = [scale[:, 0].bfloat16() for _, scale in rounded]  # k x (out)

    def __call__(self, x: Tensor) -> Tensor:
        linear = torch.ops.aten._weight_int8pack_mm.default
        parts = x.transpose(0, 1).to(torch.bfloat16, memory_format=torch.contiguous_format)  # (k, B, in)
        return self.finish([linear(*part) for part in zip(parts, self.weights, self.scales, strict=True)])


class Int4Matrices(Matrices):
    """int4 weights with a scale and an offset for each 32 inputs of an output, rows in bfloat16.

    `in` must be divisible by 32 and `out` by 16.
    """

    def pack(self, weights: list[Tensor]) -> None:
        rounded = [round_groups(weight.float()) for weight in weights]  # (out, in) int32 and (in / 32, out, 2)
        self.weights = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(quantized, 1) for quantized, _ in rounded]
        self.scales = [scales for _, scales in rounded]

    def __call__(self, x: Tensor) -> Tensor:
        linear = torch.ops.aten._weight_int4pack_mm_for_cpu.default
        parts = x.transpose(0, 1).to(torch.bfloat16, memory_format=torch.contiguous_format)  # (k, B, in)
        triples = zip(parts, self.weights, self.scales, strict=True)
        return self.finish([linear(part, weight, INT4_GROUP, scales) for part, weight, scales in triples])


def row_scales(rows: Tensor) -> Tensor:
    """Return the scale of each row (..., in), float32, so that rows / scale are from -127 to 127: (..., 1)."""
    return torch.linalg.vector_norm(rows, math.inf, dim=-1, keepdim=True).clamp_(min=1e-20).div_(127)


def round_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows (..., in), float32, to int8; return these and scales (..., 1): rows = quantized * scale."""
    scale = row_scales(rows)  # (..., 1)
    return (rows / scale).round_().to(torch.int8), scale


def round_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a matrix (out, in), float32, to 4 bits by groups of 32 inputs of an output.

    Returns:
        Integers 0 to 15, (out, in) int32, and the scale and offset of each group, (in / 32, out, 2) bfloat16:
        weight = (quantized - 8) * scale + offset.
    """
    groups = weight.unflatten(1, (-1, INT4_GROUP))  # (out, G, 32)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)  # (out, G, 1)
    scale = ((high - low) / 15).clamp_(min=1e-20).bfloat16()  # (out, G, 1)
    offset = (low + 8 * scale.float()).bfloat16()  # (out, G, 1)
    quantized = ((groups - offset.float()) / scale.float()).round_().add_(8).clamp_(0, 15)  # (out, G, 32)
    return quantized.flatten(1).to(torch.int32), torch.cat((scale, offset), dim=-1).transpose(0, 1).contiguous()


def make_matrices(
    weights: Sequence[Tensor], dtype: torch.dtype, quantization: str | None = None, relu: bool = False
) -> Matrices:
    """Create matrices of the fastest class; `quantization` is None, "int8" or "int4"."""
    return matrices_class(weights[0].numel(), dtype, quantization)(weights, dtype, relu)


def matrices_class(size: int, dtype: torch.dtype, quantization: str | None) -> type[Matrices]:
    """Return the fastest class on this processor for matrices of `size` numbers each."""
    onednn = torch.backends.mkldnn.is_available()
    if quantization == "int4":
        return Int4Matrices
    if quantization == "int8":
        return Int8Matrices if onednn and torch.cpu._is_vnni_supported() else Int8WeightMatrices
    if dtype == torch.float32 and onednn:
        return SmallMatrices if size <= SMALL else PackedMatrices
    return PackedMatrices if onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported() else PlainMatrices
