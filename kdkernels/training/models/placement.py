"""Where the teacher's weights are between its forwards, and that they are where they are needed in them."""

from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from kdkernels.rollouts.local import evaluating
from kdkernels.teachers import LocalTeacher
from kdkernels.training.deepspeed_teacher import sharded
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.strategy import Strategy

T = TypeVar("T")


def place(config: Config, teacher: PreTrainedModel | None, strategy: Strategy) -> LocalTeacher | None:
    """The recipe's teacher as [teacher] wants it, None where there is none.

    Args:
        config: the recipe.
        teacher: the model at [teacher] path, as it was read; None for the base of the student.
        strategy: that of the student.
    """
    entries = strategy.module.vocab_size
    if config.teacher is None:
        return None
    if config.teacher.base:
        return LocalTeacher(strategy.module.student, entries, without_adapter(strategy))
    if config.teacher.placement == "zero3":
        return LocalTeacher(teacher, entries, sharded(teacher, config))
    if config.teacher.placement == "cpu":
        return LocalTeacher(teacher, entries, offloaded(teacher, distributed.device()))
    return LocalTeacher(teacher.to(distributed.device()), entries)


def offloaded(model: PreTrainedModel, device: torch.device) -> Callable[[Callable[[], T]], T]:
    """Keeps the weights of a frozen model in CPU memory, in pages that a GPU reads directly; they are copied to
    `device` for as long as a function runs, and nothing is copied back.
    """
    tensors = [*model.parameters(), *model.buffers()]
    kept = [one.data.pin_memory() if device.type == "cuda" else one.data for one in tensors]

    def put(values: list[torch.Tensor]) -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.data = value

    def present(function: Callable[[], T]) -> T:
        put([one.to(device, non_blocking=True) for one in kept])
        try:
            return function()
        finally:
            put(kept)

    put(kept)
    return present


def without_adapter(strategy: Strategy) -> Callable[[Callable[[], T]], T]:
    """Takes the student's adapter out of its forward while a function runs: what computes is its base."""
    student = strategy.module.student

    def present(function: Callable[[], T]) -> T:
        with strategy.whole(), evaluating(student):
            student.disable_adapters()
            try:
                return function()
            finally:
                student.enable_adapters()

    return present
