"""A teacher known at K words of each token. Axes: K stored words; [...] leading."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..tensors import check_floating
from .base import Source


@dataclass(frozen=True, eq=False)
class TopK(Source):
    """A teacher known at K words per token, stored or served. Divergences take it; what needs more raises TypeError.

    Both distributions are coarsened to K + 1 outcomes, the K words and one bucket for all others: the teacher's
    bucket has the missing mass 1 - sum p, the student's the mass of its other words. ``renormalize=True`` drops the
    bucket: teacher and student are normalised over the K words. A temperature other than 1 needs that, because a bucket
    has no temperature. With K = V there is no bucket.

    Each token's ids must be distinct words of the shared vocabulary. A log-probability of -inf (probability 0) may pad
    a list, its id must still be such a word. Probabilities may sum to 1 + 1e-3 (16-bit: 1 + 2e-2) through rounding and
    are then normalised. On CPUs anything else is a ValueError at the call; asking a GPU would cost a sync: there such
    a token's divergence is NaN and metrics count it. The bucket has at least 2^-23, what fp32 lists lose in rounding:
    with 0 one confident token would make a reverse KL infinite.

    Args:
        indices: [..., K] int64 token ids.
        log_probs: [..., K] log p of these words, natural logarithm, at temperature 1.
        renormalize: drop the bucket of all other words.

    Raises:
        TypeError: dtypes other than int64 and floating point, or renormalize not a bool.
        ValueError: shapes or devices that do not fit.
    """

    indices: Tensor
    log_probs: Tensor
    renormalize: bool = False

    names = ("log_probs", "indices")

    def __post_init__(self):
        check_floating("log_probs", self.log_probs)
        if not isinstance(self.indices, Tensor) or self.indices.dtype != torch.int64:
            got = getattr(self.indices, "dtype", type(self.indices).__name__)
            raise TypeError(f"indices: expected an int64 tensor, got {got}")
        if self.log_probs.dim() < 1 or self.log_probs.shape[-1] == 0:
            raise ValueError(f"log_probs: expected shape [..., K], got {list(self.log_probs.shape)}")
        if self.indices.shape != self.log_probs.shape:
            raise ValueError(
                f"indices: expected shape {list(self.log_probs.shape)} (that of log_probs), got "
                f"{list(self.indices.shape)}"
            )
        if self.indices.device != self.log_probs.device:
            raise ValueError(
                f"indices: expected device {self.log_probs.device} (that of log_probs), got {self.indices.device}"
            )
        if not isinstance(self.renormalize, bool):
            raise TypeError(f"renormalize: expected a bool, got {self.renormalize!r}")
