"""A teacher that is a model in this process."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from kdkernels.data.batch import Batch
from kdkernels.sources import Head, Source

T = TypeVar("T")


def as_it_is(function: Callable[[], T]) -> T:
    """Calls `function`: the model's weights are always where its forward looks for them."""
    return function()


class LocalTeacher:
    """A frozen model in this process.

    Args:
        model: the teacher.
        vocab_size: the ids that have a token, which it shares with the student.
        present: calls a function while the model's weights are where its forward looks for them.
    """

    alone = False

    def __init__(self, model: PreTrainedModel, vocab_size: int, present: Callable[[Callable[[], Any]], Any] = as_it_is):
        self.model, self.vocab_size, self.present = model, vocab_size, present

    def __str__(self) -> str:
        return f"{type(self.model).__name__} in this process"

    @torch.no_grad()
    def score(self, batch: Batch) -> Source:
        """The model's last hidden states with its lm_head, which stays where it was in the forward."""
        return self.present(lambda: _held(Head.of(self.model, vocab_size=self.vocab_size, **batch.inputs)))


def _held(source: Head) -> Head:
    """The same tensors, whatever becomes of the parameters that they come from."""
    tensors = {name: getattr(source, name) for name in source.names}
    return replace(source, **{name: one.detach() for name, one in tensors.items() if one is not None})
