"""Where the teacher's weights are between its forwards, and that they are where they are needed in them."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkernels.data.tokenizers import vocabulary_hash
from kdkernels.errors import InputError
from kdkernels.http import Server
from kdkernels.rollouts.local import evaluating
from kdkernels.teachers import HiddenStatesTeacher, LocalTeacher, RoutedTeacher, Teacher
from kdkernels.teachers.served import Client
from kdkernels.teachers.stored import Cache, TopKTeacher
from kdkernels.training.deepspeed_teacher import sharded
from kdkernels.training.finite import first_nonfinite
from kdkernels.training.models.agreement import check_model
from kdkernels.training.models.loading import check_positions, load_teacher
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.recipe.teachers import each_teacher, of_section
from kdkernels.training.strategy import Strategy

T = TypeVar("T")


def place(
    config: Config, teacher: PreTrainedModel | None, strategy: Strategy, tokenizer: PreTrainedTokenizerBase
) -> Teacher | None:
    """The recipe's teacher as [teacher] wants it, None where there is none; all processes call this together.

    Args:
        config: the recipe.
        teacher: the model at [teacher] path, as it was read; None where there is none to read.
        strategy: that of the student.
        tokenizer: the run's.

    Raises:
        InputError, ServerError: a served teacher has another tokenizer, or its server does not answer.
    """
    if config.teachers:
        return _routed(config, strategy, tokenizer)
    if config.teacher is None:
        return None
    entries = strategy.module.vocab_size
    if config.teacher.base:
        return LocalTeacher(strategy.module.student, entries, without_adapter(strategy))
    return placed(config, teacher, entries, tokenizer)


def placed(
    config: Config, teacher: PreTrainedModel | None, entries: int, tokenizer: PreTrainedTokenizerBase
) -> Teacher:
    """As `place`, of a teacher that is no part of the student. entries: the ids that have a token."""
    if config.teacher.cache is not None:
        with distributed.together():
            return Cache(Path(config.teacher.cache), "[teacher] cache").teacher(entries, distributed.device())
    if config.teacher.url is not None:
        with distributed.together():
            client = Client(Server(config.teacher.url), vocabulary_hash(tokenizer), "[teacher] url")
            check_positions(client.about["positions"], "[teacher] url", config)
            return client.teacher(entries, distributed.device())
    if config.teacher.placement == "zero3":
        return LocalTeacher(teacher, entries, sharded(teacher, config))
    if config.teacher.placement == "cpu":
        return LocalTeacher(teacher, entries, offloaded(teacher, distributed.device()))
    return LocalTeacher(teacher.to(distributed.device()), entries)


def _routed(config: Config, strategy: Strategy, tokenizer: PreTrainedTokenizerBase) -> RoutedTeacher:
    """The teachers at [teachers.NAME]; several ones of the same files and settings are one."""
    found, there = {}, {}
    for section, alone in each_teacher(config).items():
        with of_section(section):
            if alone.teacher not in there:
                with distributed.together():
                    model = checked_teacher(alone, tokenizer) if alone.teacher.model else None
                there[alone.teacher] = place(alone, model, strategy, tokenizer)
        found[section.partition(".")[2]] = there[alone.teacher]
    return RoutedTeacher(found)


def checked_teacher(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model at [teacher] path, whose weights are finite and whose head is its own. Raises InputError."""
    model = load_teacher(config, tokenizer)
    name = first_nonfinite(model.state_dict().items())
    if name is not None:
        raise InputError(f"[teacher] path: {name} has values that are not finite")
    check_model("[teacher] path", model, (tokenizer.eos_token_id,) * 2, trained=False)
    return model


def describe(teacher: Teacher | None) -> list[str]:
    """A line about what of a teacher comes from somewhere else."""
    return [f"teacher: {teacher}"] if isinstance(teacher, (HiddenStatesTeacher, TopKTeacher, RoutedTeacher)) else []


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
