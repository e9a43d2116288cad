"""A head with low-rank adapters, whose full weight is never made.

Axes: N tokens, n tokens of a chunk, V vocabulary, H hidden, R rank; [...] leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..compute import gemm
from ..kernels import Backend, Rows
from ..tensors import check_floating
from .base import Costs, Gradient, take
from .head import Head, HeadProducer, StateGradient, multiplies


@dataclass(frozen=True, eq=False)
class AdaptedHead(Head):
    """The logits z = softcap * tanh(scale * (hidden @ weight.T + inner @ outer.T + bias) / softcap).

    With LoRA, ``inner`` is scaling * hidden @ A.T and ``outer`` is B. Gradients of both come from the pass that makes
    the others; where ``weight`` is frozen, none is computed for it. ``Head.from_model`` makes such a head.

    Args:
        inner: [..., R] computed from the hidden states, in their dtype.
        outer: [V, R] in the same dtype.
        Others: as for kd.Head, and by name.

    Raises:
        TypeError, ValueError: as kd.Head; shapes, devices or dtypes of inner and outer do not fit.
    """

    inner: Tensor | None = None  # never None: fields with a default come before
    outer: Tensor | None = None

    names = ("hidden", "weight", "inner", "outer", "bias")
    entries = ("weight", "outer", "bias")

    def __post_init__(self):
        super().__post_init__()
        for name, tensor in (("inner", self.inner), ("outer", self.outer)):
            check_floating(name, tensor)
            for what in ("device", "dtype"):
                expected, got = getattr(self.hidden, what), getattr(tensor, what)
                if expected != got:
                    kind = ValueError if what == "device" else TypeError
                    raise kind(f"{name}: expected {what} {expected} (that of hidden), got {got}")
        if self.inner.dim() < 1 or self.inner.shape[:-1] != self.shape or not self.inner.shape[-1]:
            raise ValueError(f"inner: expected shape {[*self.shape, 'R']}, got {list(self.inner.shape)}")
        expected = [self.weight.shape[0], self.inner.shape[-1]]
        if list(self.outer.shape) != expected:
            raise ValueError(f"outer: expected shape {expected}, got {list(self.outer.shape)}")

    def costs(self, backend: Backend, vocabulary: int, dtype: torch.dtype, largest: int, trained: bool) -> Costs:
        """See Source.costs."""
        of_head = super().costs(backend, vocabulary, dtype, largest, trained)
        rank, size = self.inner.shape[-1], self.dtype.itemsize
        kept = 0 if multiplies(self.outer) else vocabulary * rank * size
        fixed, more = backend.products(self.device, self.dtype).workspace(rank, self.dtype, dtype, trained)
        row = (1 + trained) * rank * size + more
        return Costs(of_head.kept + kept, max(of_head.fixed, fixed), of_head.row + row)

    def producer(self, backend, index, vocabulary, buffer, needs=None, pieces=1) -> AdaptedProducer:
        """See Source.producer."""
        return AdaptedProducer(self, backend, index, vocabulary, buffer, needs or (False,) * 5, pieces)


class AdaptedProducer(HeadProducer):
    """Adds the low-rank product to a head's logits. Its gradients, where ``needs`` asks: of ``AdaptedHead.names``."""

    def __init__(
        self,
        head: AdaptedHead,
        backend: Backend,
        index: Tensor,
        vocabulary: int,
        buffer: Tensor,
        needs: tuple[bool, ...],
        pieces: int,
    ):
        needs_hidden, needs_weight, needs_inner, needs_outer, needs_bias = needs
        super().__init__(head, backend, index, vocabulary, buffer, (needs_hidden, needs_weight, needs_bias), pieces)
        self.inner = head.inner
        outer = head.outer[:vocabulary]
        self.outer = outer if multiplies(head.outer) else outer.clone(memory_format=torch.contiguous_format)
        self.d_inner = self.d_outer = None
        if needs_inner:
            self.d_inner = StateGradient(head.inner, backend, self.products, index)
        if needs_outer:
            self.d_outer = gemm.WeightGradient(self.products, head.outer, vocabulary, pieces)

    def _inner(self, tokens: slice) -> Tensor:
        return take(self.inner, self.index[tokens])

    def rows(self, tokens: slice, temperature: float, topk: int, gather: Tensor | None) -> Rows:
        logits = self.buffer[: tokens.stop - tokens.start]
        self.products.project(self.hidden(tokens), self.weight, self.bias, logits)
        self.products.extend(self._inner(tokens), self.outer, logits)
        return self.backend.statistics(logits, self.scale, self.softcap, temperature, topk, gather)

    def add(self, tokens: slice, d_logits: Tensor, powers: Tensor | None) -> None:
        super().add(tokens, d_logits, powers)
        if self.d_inner is not None:
            self.d_inner.add(tokens, d_logits, self.outer, powers)
        if self.d_outer is not None:
            self.d_outer.add(d_logits, self._inner(tokens), powers)

    def gradients(self) -> tuple[Gradient, ...]:
        hidden, weight, bias = super().gradients()
        outer = (self.d_outer.gradient, self.d_outer.factor) if self.d_outer else (None, 1.0)
        inner = self.d_inner.finished() if self.d_inner else (None, 1.0)
        return hidden, weight, inner, outer, bias
