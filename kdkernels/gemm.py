"""The matrix products around the row kernels, with the dtypes and buffers that a chunk loop needs.

Axes: C tokens of a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UPCAST_WORDS = 4096  # words per step where the operands have to be widened
_ADDED_WORDS = 512  # words per step of adding 16-bit products to fp32 sums: they stay in the cache
_PRODUCT = 1 << 23  # numbers of an fp32 product that cannot be written where it belongs
_INTO = "dtype_out" in torch.ops.aten.mm.overloads()  # torch 2.12: mm and addmm with out_dtype= take out= as well


def workspace(hidden_size: int, operand: torch.dtype, logits: torch.dtype, device: torch.device) -> int:
    """Bytes that ``project`` needs beside its output."""
    if operand == logits:
        return 0
    if _sums_in_fp32(device):
        return 0 if _INTO else _PRODUCT * logits.itemsize
    return _UPCAST_WORDS * hidden_size * logits.itemsize


def _sums_in_fp32(device: torch.device) -> bool:
    """Whether products of 16-bit operands come in fp32 for nothing: on tensor cores."""
    return device.type == "cuda"


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, out [M, N] fp32 of 16-bit operands, on tensor cores."""
    if _INTO:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
        return
    step = max(1, _PRODUCT // len(a))
    for first in range(0, b.shape[1], step):
        columns = slice(first, first + step)
        out[:, columns] = torch.mm(a, b[:, columns], out_dtype=out.dtype)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out += a @ b, out [M, N] fp32 of 16-bit operands, on tensor cores."""
    if _INTO:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        return
    step = max(1, _PRODUCT // b.shape[1])
    for first in range(0, len(a), step):
        rows = slice(first, first + step)
        out[rows] += torch.mm(a[rows], b, out_dtype=out.dtype)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias; hidden [C, H], weight [V, H], out [C, V] of the operands' dtype or wider.

    A wider ``out`` is for accuracy (bf16 logits cost 4-23 % of a JSD's gradient). Tensor cores give it for nothing;
    torch's CPU GEMMs have no fp32 output for bf16 operands, so there these are widened a few words at a time: about
    twice the time.
    """
    if out.dtype != hidden.dtype and _sums_in_fp32(out.device):
        _product(hidden, weight.t(), out)
        if bias is not None:
            out += bias
        return
    if out.dtype == hidden.dtype:
        step = len(weight)
    else:
        step, hidden = _UPCAST_WORDS, hidden.to(out.dtype)
    for first in range(0, len(weight), step):
        words = slice(first, first + step)
        if bias is None:
            torch.mm(hidden, weight[words].to(out.dtype).t(), out=out[:, words])
        else:
            torch.addmm(bias[words].to(out.dtype), hidden, weight[words].to(out.dtype).t(), out=out[:, words])


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

    def __init__(self, weight: Tensor, vocabulary: int, chunks: int):
        self.gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
        self.gradient[vocabulary:] = 0
        self.words = self.gradient[:vocabulary]
        wide = weight.dtype.itemsize >= 4
        self.accumulator = None if wide or chunks == 1 else torch.zeros_like(self.words, dtype=torch.float32)
        self.empty = True

    def add(self, dz: Tensor, hidden: Tensor) -> None:
        """Adds dz.T @ hidden; dz [C, V], hidden [C, H]."""
        if self.accumulator is not None and _sums_in_fp32(dz.device):
            _add_product(dz.t(), hidden, self.accumulator)
        elif self.empty or self.accumulator is not None:
            torch.mm(dz.t(), hidden, out=self.words)
        else:
            self.words.addmm_(dz.t(), hidden)
        if self.accumulator is not None and not _sums_in_fp32(dz.device):
            # No CPU GEMM adds bf16 products into an fp32 matrix, and adding them at once would first widen all of them.
            for first in range(0, len(self.words), _ADDED_WORDS):
                words = slice(first, first + _ADDED_WORDS)
                self.accumulator[words] += self.words[words]
        self.empty = False

    def result(self) -> Tensor:
        if self.empty:
            self.words.zero_()
        elif self.accumulator is not None:
            self.words.copy_(self.accumulator)
        return self.gradient
