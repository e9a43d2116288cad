"""The matrix products around the row kernels, with the dtypes and buffers that a chunk loop needs.

Axes: C tokens of a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UPCAST_WORDS = 4096  # words per step where the operands have to be widened
_ADDED_WORDS = 512  # words per step of adding 16-bit products to fp32 sums: they stay in the cache


def workspace(hidden_size: int, operand: torch.dtype, logits: torch.dtype) -> int:
    """Bytes ``project`` needs beside its output."""
    return 0 if operand == logits else _UPCAST_WORDS * hidden_size * logits.itemsize


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out = hidden @ weight.T + bias; hidden [C, H], weight [V, H], out [C, V] of the operands' dtype or wider.

    A wider ``out`` is for accuracy (bf16 logits cost 4-23 % of a JSD's gradient) and widens the operands a few words at
    a time, since torch's CPU GEMMs have no fp32 output for bf16 operands: about twice the time.
    """
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
    """out [V] += the sums of dz [C, V] over its rows, in out's dtype; a few words at a time: no chunk is widened."""
    for first in range(0, len(out), _ADDED_WORDS):
        words = slice(first, first + _ADDED_WORDS)
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
        if self.empty or self.accumulator is not None:
            torch.mm(dz.t(), hidden, out=self.words)
        else:
            self.words.addmm_(dz.t(), hidden)
        if self.accumulator is not None:
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
