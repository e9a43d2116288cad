"""A distribution over the next word from logits that exist already. Axes: V vocabulary; [...] leading."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..tensors import check_floating
from .base import Source, check_vocab_size


@dataclass(frozen=True, eq=False)
class Logits(Source):
    """Logits that exist already, as teacher or as student (the gradient then goes to them).

    They are copied into the chunk buffers, never written to. A teacher's may be of another dtype than the student's
    operands (stored in bf16, say); both sides are computed from their own values.

    Args:
        logits: [..., V], after scale and soft-cap: what the softmax is taken of.
        vocab_size: real vocabulary where V is padded beyond it; the padding has probability 0.

    Raises:
        TypeError: not a floating-point tensor, or a vocab_size that is not an int.
        ValueError: no last dimension, or a vocab_size outside [1, V].
    """

    logits: Tensor
    vocab_size: int | None = None

    names = ("logits",)

    def __post_init__(self):
        check_floating("logits", self.logits)
        if self.logits.dim() < 1 or self.logits.shape[-1] == 0:
            raise ValueError(f"logits: expected shape [..., V], got {list(self.logits.shape)}")
        check_vocab_size(self.vocab_size, self.logits.shape[-1], "the columns of logits")

    @property
    def vocabulary(self) -> int:
        """Number of words with a probability."""
        return self.vocab_size or self.logits.shape[-1]
