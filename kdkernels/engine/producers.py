"""Both sides of the chunk loop: logits of some tokens in a buffer, and where their gradient goes.

Axes: N tokens, n tokens of a chunk, V vocabulary, H hidden, K stored words.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..compute import fp16, gemm, memory
from ..kernels import Backend, Rows
from ..sources import Head, Logits, Source, TopK
from . import gpu


def _copied(vocabulary: int, device: torch.device) -> int:
    """Rows of logits copied at a time, which the copy needs beside its output. GPUs want few launches."""
    return max(1, (1 << 18 if device.type == "cpu" else 1 << 24) // vocabulary)


def logits_dtype(student: Source, asked: torch.dtype | None) -> torch.dtype:
    """Of the student's buffer: fp32 on GPUs, the operands' own on CPUs, where logits twice as large would halve the
    chunks of a budget and cost a fifth of the time, and where logits exist already."""
    own = student.dtype
    if asked is None:
        wide = isinstance(student, Head) and student.device.type != "cpu" and own.itemsize < 4
        return torch.float32 if wide else own
    if asked != own and (asked != torch.float32 or own.itemsize > 4):
        raise ValueError(f"logits_dtype: expected {own} (the operands') or float32, got {asked}")
    return asked


class Costs(NamedTuple):
    """Bytes that a side takes."""

    kept: int  # throughout the call
    fixed: int  # at some time, whatever the chunk
    row: int  # for each token of a chunk


def costs(backend: Backend, source: Source, vocabulary: int, dtype: torch.dtype, largest: int, trained: bool) -> Costs:
    """Of a side with ``dtype`` logits, whose ``largest`` words are asked for; ``trained``: and gradients."""
    if isinstance(source, TopK):
        return Costs(0, 0, 128 * source.indices.shape[-1])  # ids, and a dozen fp64 vectors of outcomes
    row = memory.padded(vocabulary, source.device) * dtype.itemsize
    row += 64 * largest  # ids, values and what is computed from them
    if isinstance(source, Logits):
        return Costs(0, _copied(vocabulary, source.device) * vocabulary * source.dtype.itemsize, row)
    width, operand = source.hidden.shape[-1], source.dtype
    kept = 0 if _multiplies(source.weight) else vocabulary * width * operand.itemsize
    fixed, more = backend.products(source.device, operand).workspace(width, operand, dtype, trained)
    if trained and source.bias is not None:
        more += gemm.column_sums_row(vocabulary)
    return Costs(kept, fixed, row + (1 + trained) * width * operand.itemsize + more)


def work(student: Head | Logits, teacher: Source | None, dtype: torch.dtype, needs: tuple[bool, ...]) -> gpu.Sides:
    """What a call multiplies: with ``dtype`` logits and gradients of those of the student's tensors in ``needs``."""
    widths = (side.hidden.shape[-1] if isinstance(side, Head) else 0 for side in (student, teacher))
    d_hidden, d_weight = needs[:2] if isinstance(student, Head) and needs else (False, False)
    return gpu.Sides(*widths, d_hidden, d_weight, dtype.itemsize)


def _multiplies(weight: Tensor) -> bool:
    """Whether words lie side by side or below each other; every product would copy other weights."""
    return 1 in weight.stride()


def _take(source: Tensor, at: Tensor) -> Tensor:
    """Rows [n, X] of source [..., X] at flat positions [n]. Flattening what is not contiguous would copy all of it,
    unless it is a single row."""
    if source.is_contiguous() or source.dim() == 1:
        return source.view(-1, source.shape[-1]).index_select(0, at)
    places = []  # in each leading dimension
    for size in reversed(source.shape[:-1]):
        places.insert(0, at % size)
        at = at // size
    return source[tuple(places)]


# A gradient and what it still has to be multiplied with, where fp16 does not hold the product: a number or, for
# gradients [..., H], one for each [..., 1].
Gradient = tuple[Tensor | None, Tensor | float]


def _powers(values: Tensor) -> Tensor | float:
    """Room for the powers (fp16.py) of the rows of fp16 values [..., H]: fp32 [..., 1]."""
    return values.new_ones((*values.shape[:-1], 1), dtype=torch.float32) if values.dtype == torch.float16 else 1.0


class HeadSide:
    """Logits multiplied from hidden states. Gradients, of those in ``needs``: hidden, weight, bias."""

    def __init__(
        self, backend: Backend, head: Head, index: Tensor, buffer: Tensor, needs: tuple[bool, ...], chunks: int
    ):
        self.vocabulary = vocabulary = buffer.shape[1]
        self.source, self.index = head.hidden, index
        weight = head.weight[:vocabulary]
        # not contiguous(), which leaves the strides of a single number as they are
        self.weight = weight if _multiplies(head.weight) else weight.clone(memory_format=torch.contiguous_format)
        self.bias = None if head.bias is None else head.bias[:vocabulary]
        self.scale, self.softcap = float(head.scale), head.softcap
        self.buffer = buffer
        self.backend, self.products = backend, backend.products(head.device, head.dtype)
        self.d_hidden = self.d_weight = self.d_bias = None
        needs_hidden, needs_weight, needs_bias = needs
        if needs_hidden:
            self.d_hidden = torch.zeros_like(head.hidden, memory_format=torch.contiguous_format)
        if needs_weight:
            self.d_weight = gemm.WeightGradient(self.products, head.weight, vocabulary, chunks)
        if needs_bias:
            self.d_bias = torch.zeros_like(head.bias, dtype=torch.promote_types(head.dtype, torch.float32))
        self.powers = _powers(head.hidden)

    def hidden(self, tokens: slice) -> Tensor:
        return _take(self.source, self.index[tokens])

    def rows(self, tokens: slice, temperature: float, topk: int, gather: Tensor | None) -> Rows:
        logits = self.buffer[: tokens.stop - tokens.start]
        operands = self.hidden(tokens), self.weight, self.bias
        return self.backend.project(
            self.products, *operands, logits, self.scale, self.softcap, temperature, topk, gather
        )

    def add(self, tokens: slice, d_logits: Tensor, powers: Tensor | None) -> None:
        """Adds these tokens' part of the gradients; d_logits [n, V], of fp16 to be multiplied with powers [n]."""
        if self.d_hidden is not None:
            rows = self.products.multiply(d_logits, self.weight)
            self.d_hidden.view(-1, rows.shape[-1]).index_copy_(0, self.index[tokens], rows)
            if powers is not None:
                self.powers.view(-1).index_copy_(0, self.index[tokens], powers)
        if self.d_weight is not None:
            self.d_weight.add(d_logits, self.hidden(tokens), powers)
        if self.d_bias is not None:
            self.products.add_column_sums(d_logits, powers, self.d_bias[: self.vocabulary])

    def gradients(self) -> tuple[Gradient, ...]:
        """Of hidden, weight and bias."""
        weight = (self.d_weight.gradient, self.d_weight.factor) if self.d_weight else (None, 1.0)
        bias, factor = self.d_bias, 1.0
        if bias is not None:
            if self.source.dtype == torch.float16:
                factor = fp16.normalized(bias)
            bias = bias.to(self.source.dtype)
        return (self.d_hidden, self.powers), weight, (bias, factor)


class LogitsSide:
    """Logits copied into the buffer from where the caller has them. Gradient, if in ``needs``: of the logits."""

    def __init__(self, backend: Backend, source: Logits, index: Tensor, buffer: Tensor, needs: tuple[bool, ...]):
        self.backend, self.source, self.index, self.buffer = backend, source.logits, index, buffer
        self.vocabulary = buffer.shape[1]
        (needed,) = needs
        self.d_logits = torch.zeros_like(self.source, memory_format=torch.contiguous_format) if needed else None
        self.powers = _powers(self.source)

    def rows(self, tokens: slice, temperature: float, topk: int, gather: Tensor | None) -> Rows:
        logits = self.buffer[: tokens.stop - tokens.start]
        source, at = self.source[..., : self.vocabulary], self.index[tokens]
        step = _copied(self.vocabulary, logits.device)
        for first in range(0, len(logits), step):
            some = slice(first, first + step)
            logits[some] = _take(source, at[some])
        return self.backend.statistics(logits, 1.0, None, temperature, topk, gather)

    def add(self, tokens: slice, d_logits: Tensor, powers: Tensor | None) -> None:
        if self.d_logits is not None:
            flat = self.d_logits.view(-1, self.d_logits.shape[-1])
            flat[:, : self.vocabulary].index_copy_(0, self.index[tokens], d_logits)
            if powers is not None:
                self.powers.view(-1).index_copy_(0, self.index[tokens], powers)

    def gradients(self) -> tuple[Gradient, ...]:
        return ((self.d_logits, self.powers),)


class TopKSide:
    """A teacher's stored words."""

    def __init__(self, source: TopK, index: Tensor, vocabulary: int):
        self.ids, self.log_probs = source.indices, source.log_probs
        self.index, self.vocabulary, self.renormalize = index, vocabulary, source.renormalize
        if self.ids.shape[-1] > vocabulary:
            raise ValueError(f"indices: expected at most {vocabulary} words (the vocabulary), got {self.ids.shape[-1]}")

    def words(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """ids [n, K] and log-probs [n, K] in fp64.

        Raises:
            ValueError: on CPUs, ids or log-probabilities that are none. Elsewhere the token's log-probs become NaN.
        """
        at = self.index[tokens]
        ids, log_p = _take(self.ids, at), _take(self.log_probs, at)
        slack = 1e-3 if log_p.dtype.itemsize >= 4 else 2e-2
        log_p = log_p.double()
        ordered, total = ids.sort(-1).values, log_p.exp().sum(-1)
        outside = (ordered[:, 0] < 0) | (ordered[:, -1] >= self.vocabulary)
        twice = (ordered.diff(dim=-1) == 0).any(-1)
        wrong = outside | twice | (total > 1 + slack)
        if ids.device.type != "cpu":
            return (
                torch.where(wrong[:, None], torch.arange(ids.shape[1], device=ids.device), ids),
                log_p.masked_fill(wrong[:, None], torch.nan),
            )
        for bad, name, expected in (
            (outside, "indices", f"ids in [0, {self.vocabulary})"),
            (twice, "indices", "distinct ids for each token"),
        ):
            if bad.any():
                raise ValueError(f"{name}: expected {expected}, got {ids[bad][0].tolist()}")
        if wrong.any():
            raise ValueError(
                f"log_probs: expected log-probabilities whose exponentials sum to at most 1 for each token, got "
                f"{log_p[wrong][0].tolist()} with a sum of {total[wrong][0]:.6g}"
            )
        return ids, log_p
