"""A distribution over the next token from logits that exist already.

Axes: N tokens, n tokens of a chunk, V vocabulary; [...] leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import Backend
from ..tensors import check_floating
from .base import Costs, Gradient, Producer, Source, check_vocab_size, powers_like, row_bytes, take


@dataclass(frozen=True, eq=False)
class Logits(Source):
    """Logits that exist already, as teacher or as student. A student's logits get the gradient.

    They are copied into the chunk buffers and never written to. A teacher's logits may have another dtype than the
    student's tensors (stored in bf16, say).

    Args:
        logits: [..., V] what the softmax is taken of, after scale and soft-cap.
        vocab_size: the real vocabulary where V is padded; the padding has probability 0.

    Raises:
        TypeError: logits is not a floating-point tensor, or vocab_size not an int.
        ValueError: logits has no last dimension, or vocab_size is outside [1, V].
    """

    logits: Tensor
    vocab_size: int | None = None

    names = ("logits",)
    axis = "V"
    trainable = True

    def __post_init__(self):
        check_floating("logits", self.logits)
        if self.logits.dim() < 1 or self.logits.shape[-1] == 0:
            raise ValueError(f"logits: expected shape [..., V], got {list(self.logits.shape)}")
        check_vocab_size(self.vocab_size, self.logits.shape[-1], "the columns of logits")

    @property
    def vocabulary(self) -> int:
        """How many entries have a probability."""
        return self.vocab_size or self.logits.shape[-1]

    @property
    def numbers(self) -> list[float]:
        """The vocabulary."""
        return [self.vocabulary]

    @classmethod
    def unpack(cls, tensors: list[Tensor], numbers: list[float]) -> Logits:
        """The source of these tensors and numbers."""
        return cls.trusted(logits=tensors[0], vocab_size=int(numbers[0]))

    def part(self, entries: slice) -> Logits:
        """These columns, which are not copied."""
        return self.trusted(logits=self.logits[..., entries], vocab_size=entries.stop - entries.start)

    def costs(self, backend: Backend, vocabulary: int, dtype: torch.dtype, largest: int, trained: bool) -> Costs:
        """See Source.costs."""
        copied = _copied(vocabulary, self.device) * vocabulary * self.dtype.itemsize
        return Costs(0, copied, row_bytes(vocabulary, self.device, dtype, largest))

    def producer(self, backend, index, vocabulary, buffer, needs=None, pieces=1) -> LogitsProducer:
        """See Source.producer."""
        return LogitsProducer(self.logits, backend, index, vocabulary, buffer, needs or (False,))


def _copied(vocabulary: int, device: torch.device) -> int:
    """How many tokens' logits are copied at a time, through a temporary of that size. GPUs want few launches."""
    return max(1, (1 << 18 if device.type == "cpu" else 1 << 24) // vocabulary)


class LogitsProducer(Producer):
    """Copies the caller's logits into the buffer. Its gradient is that of the logits, where ``needs`` asks for it."""

    def __init__(
        self,
        logits: Tensor,
        backend: Backend,
        index: Tensor,
        vocabulary: int,
        buffer: Tensor,
        needs: tuple[bool, ...],
    ):
        super().__init__(backend, index, vocabulary, buffer)
        self.source = logits
        (needed,) = needs
        self.d_logits = torch.zeros_like(logits, memory_format=torch.contiguous_format) if needed else None
        self.powers = powers_like(logits)

    def fill(self, tokens: slice, logits: Tensor) -> None:
        source, at = self.source[..., : self.vocabulary], self.index[tokens]
        step = _copied(self.vocabulary, logits.device)
        for first in range(0, len(logits), step):
            some = slice(first, first + step)
            logits[some] = take(source, at[some])

    def add(self, tokens: slice, d_logits: Tensor, powers: Tensor | None) -> None:
        if self.d_logits is not None:
            flat = self.d_logits.view(-1, self.d_logits.shape[-1])
            flat[:, : self.vocabulary].index_copy_(0, self.index[tokens], d_logits)
            if powers is not None:
                self.powers.view(-1).index_copy_(0, self.index[tokens], powers)

    def gradients(self) -> tuple[Gradient, ...]:
        return ((self.d_logits, self.powers),)
