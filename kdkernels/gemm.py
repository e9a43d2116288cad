"""The matrix products around the row kernels, with the dtypes and buffers that a chunk loop needs.

Logits = hidden @ weight.T, d hidden = d logits @ weight, d weight = sum over chunks of d logits.T @ hidden. For 16-bit
operands the logits may be wanted in fp32 and the sum has to be. Who multiplies is decided in ``products``.

Axes: C tokens of a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from . import memory

_UPCAST_WORDS = 4096  # words per step where the operands have to be widened
_ADDED_WORDS = 512  # words per step of adding 16-bit products to fp32 sums: they stay in the cache


class Torch:
    """torch's products, which round to the operands' dtype."""

    def workspace(self, width: int, operand: torch.dtype, logits: torch.dtype, trained: bool) -> tuple[int, int]:
        """Bytes whatever the chunk, and bytes a token, that products with [V, width] weights take beside their outputs:
        those for logits, and if ``trained`` those for gradients."""
        if operand == logits:
            return 0, 0
        return _UPCAST_WORDS * width * logits.itemsize, width * logits.itemsize

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out [C, V] = hidden [C, H] @ weight [V, H].T + bias [V], in out's dtype: the operands' or wider.

        A wider ``out`` is for accuracy (bf16 logits cost 4-23 % of a JSD's gradient). torch's CPU products have no fp32
        output for 16-bit operands, so these are widened a few words at a time: about twice the time.
        """
        step = len(weight) if out.dtype == hidden.dtype else _UPCAST_WORDS
        hidden = hidden.to(out.dtype)
        for first in range(0, len(weight), step):
            words = slice(first, first + step)
            if bias is None:
                torch.mm(hidden, weight[words].to(out.dtype).t(), out=out[:, words])
            else:
                torch.addmm(bias[words].to(out.dtype), hidden, weight[words].to(out.dtype).t(), out=out[:, words])

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b)

    def add(self, a: Tensor, b: Tensor, out: Tensor, first: bool) -> None:
        """out += a @ b, out = a @ b where it is the ``first``; all of one dtype."""
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)

    def accumulate(self, a: Tensor, b: Tensor, sums: Tensor, out: Tensor, first: bool, last: bool) -> None:
        """sums += a @ b in fp32, starting from nothing with the ``first``; with the ``last``, rounded to ``out``.

        The product goes to ``out`` first, and from there a few rows at a time: adding it at once would widen all of it.
        """
        torch.mm(a, b, out=out)
        for start in range(0, len(out), _ADDED_WORDS):
            rows = slice(start, start + _ADDED_WORDS)
            if first:
                sums[rows] = out[rows]
            else:
                sums[rows] += out[rows]
        if last:
            out.copy_(sums)


class TensorCores(Torch):
    """Products of 16-bit operands on a GPU, summed and written in fp32.

    mm and addmm take out_dtype= together with out= since torch 2.8, an addend of out_dtype since 2.10.
    """

    def workspace(self, width: int, operand: torch.dtype, logits: torch.dtype, trained: bool) -> tuple[int, int]:
        return 0, 0

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if out.dtype == hidden.dtype:
            super().project(hidden, weight, bias, out)
            return
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        if bias is not None:
            out += bias

    def accumulate(self, a: Tensor, b: Tensor, sums: Tensor, out: Tensor, first: bool, last: bool) -> None:
        if first:
            sums.zero_()
        torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
        if last:
            out.copy_(sums)


class Native(Torch):
    """csrc/gemm.h: products of bf16 or fp32 operands, summed in fp32 and written in either."""

    def workspace(self, width: int, operand: torch.dtype, logits: torch.dtype, trained: bool) -> tuple[int, int]:
        # csrc/gemm_avx512.cpp: a thread packs 32 KiB of weights and holds the fp32 sums of its block: 64 words of
        # every token for logits, 96 words of up to 2048 of the width for dW. Beside that it packs up to 128 words of
        # these, or of every token. All threads together hold the sums of dX, or the hidden states, packed, for dW.
        threads, padded = torch.get_num_threads(), width + 63
        fixed, row = threads * 32 * 1024, threads * 256
        if trained:
            fixed, row = fixed + threads * 96 * 4 * (min(padded, 2048) + 128), row + threads * 512 + 4 * padded
        return fixed, row

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        rows = None if bias is None else bias.contiguous().expand(out.shape)
        torch.ops.kdkernels.gemm_(hidden, weight.t(), rows, out)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        out = a.new_empty(len(a), b.shape[1])
        torch.ops.kdkernels.gemm_(a, b, None, out)
        return out

    def add(self, a: Tensor, b: Tensor, out: Tensor, first: bool) -> None:
        torch.ops.kdkernels.gemm_(a, b, None if first else out, out)

    def accumulate(self, a: Tensor, b: Tensor, sums: Tensor, out: Tensor, first: bool, last: bool) -> None:
        torch.ops.kdkernels.gemm_(a, b, None if first else sums, out if last else sums)


_TORCH, _TENSOR_CORES, _NATIVE = Torch(), TensorCores(), Native()


def products(backend: ModuleType, device: torch.device, operand: torch.dtype) -> Torch:
    """Who multiplies operands of this dtype: the native backend where it is chosen and this CPU's vendor is slower."""
    if device.type == "cuda" and operand.itemsize < 4:
        return _TENSOR_CORES
    multiplies = getattr(backend, "multiplies", None)
    return _NATIVE if multiplies and multiplies(operand) else _TORCH


def add_column_sums(dz: Tensor, out: Tensor) -> None:
    """out [V] += the sums of dz [C, V] over its rows, in out's dtype; on CPUs a few words at a time: they widen dz."""
    step = _ADDED_WORDS if out.device.type == "cpu" else len(out)
    for first in range(0, len(out), step):
        words = slice(first, first + step)
        out[words] += dz[:, words].sum(0, dtype=out.dtype)


class WeightGradient:
    """dW [V, H] = sum over chunks of dz.T @ hidden, summed in fp32 where there is more than one chunk.

    Rows from ``vocabulary`` on (padding) are zero. ``accumulator`` is the one fp32 [V, H] buffer outside the memory
    budget; a single chunk, or fp32 operands, do without it.
    """

    def __init__(self, products: Torch, weight: Tensor, vocabulary: int, chunks: int):
        self.products, self.chunks, self.added = products, chunks, 0
        self.gradient = memory.empty(weight.shape, weight.dtype, weight.device)
        self.gradient[vocabulary:] = 0
        self.words = self.gradient[:vocabulary]
        wide = weight.dtype.itemsize >= 4
        self.accumulator = None if wide or chunks == 1 else memory.empty(self.words.shape, torch.float32, weight.device)

    def add(self, dz: Tensor, hidden: Tensor) -> None:
        """Adds dz.T @ hidden; dz [C, V], hidden [C, H]. The last of the chunks completes ``gradient``."""
        first, last = self.added == 0, self.added == self.chunks - 1
        self.added += 1
        if self.accumulator is None:
            self.products.add(dz.t(), hidden, self.words, first)
        else:
            self.products.accumulate(dz.t(), hidden, self.accumulator, self.words, first, last)
