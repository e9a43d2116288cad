"""Teachers: what scores a batch for the student to learn from."""

from typing import Protocol

import torch
from transformers import PreTrainedModel

from kdkernels.data.batch import Batch
from kdkernels.sources import Head, Source

__all__ = ["LocalTeacher", "Teacher", "head"]


class Teacher(Protocol):
    """Gives the teacher's distributions over the next token, as a source that objectives take."""

    def score(self, batch: Batch) -> Source:
        """The source of `batch`, on its device, over its positions [B, L]; no gradient reaches it."""


def head(model: PreTrainedModel, batch: Batch, vocab_size: int) -> Head:
    """The model's last hidden states [B, L, H] for `batch` with its lm_head, which is left to multiply the positions
    that matter.
    """
    return Head.of(model, vocab_size=vocab_size, **batch.inputs)


class LocalTeacher:
    """A frozen model in this process; `vocab_size`: the ids that have a token, which it shares with the student."""

    def __init__(self, model: PreTrainedModel, vocab_size: int):
        self.model, self.vocab_size = model, vocab_size

    @torch.no_grad()
    def score(self, batch: Batch) -> Source:
        """The model's last hidden states with its lm_head."""
        return head(self.model, batch, self.vocab_size)
