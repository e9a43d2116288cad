"""What the trainer of transformers does with a loss, where an objective is called in one of its steps."""

from __future__ import annotations

import sys
from types import FrameType

from .errors import InputError

MODULE, STEP = "transformers.trainer", "training_step"
SCALED = "loss_is_scaled_for_ga"  # an attribute of Trainer from transformers 5.19 on; TRL's have it too
COUNTS = ("get_batch_samples", "_get_num_items_in_batch")  # what makes num_items_in_batch
LOSSES = ("compute_loss", "_compute_loss")  # what a class of its own loss defines; the second is TRL's


def check_divided(reduction: str, denominator: object) -> None:
    """Raises an InputError where transformers' Trainer, in whose step this is called, would train on a loss that nobody
    divides, or that is divided by what it is not a mean over. Not to be asked of a loss without gradients.

    For most losses it adds up the gradients of the accumulated micro-batches without dividing them: those of a mean
    over one micro-batch would be those of several times the loss. TRL's trainers and many others are subclasses of it.
    A sum and what has a denominator add up. So does what the trainer divides, and what a class with a loss of its own
    says is divided there (``loss_is_scaled_for_ga = True``; what a class above says is about that one's loss).
    Evaluation is no step.
    """
    if reduction == "sum" or MODULE not in sys.modules:
        return
    if denominator is not None and reduction == "tokens":
        return
    step = _running_step()
    if step is None:
        return
    trainer, items = _of(step, "self", "num_items_in_batch")
    if denominator is not None:
        if denominator is items and _counts_tokens(trainer):
            raise InputError(
                f"denominator: expected a number of {reduction}, got num_items_in_batch, which counts tokens; it "
                'belongs to reduction="tokens"'
            )
        return
    batches = getattr(trainer, "current_gradient_accumulation_steps", 1)
    if batches > 1 and not _divides(trainer, items) and not _says_divided(trainer):
        raise InputError(
            f"denominator: expected what the whole step is divided by, got None in {type(trainer).__name__}, which "
            f"adds up the gradients of {batches} micro-batches and does not divide them: they would be those of "
            f'{batches} times the loss. Give denominator=num_items_in_batch and the objective reduction="tokens"; or '
            f"have the trainer divide: {SCALED} = False in its class (before transformers 5.19 "
            "self.model_accepts_loss_kwargs = False behind super().__init__); or, to divide in compute_loss, have "
            f'{SCALED} = True in the class, or reduction="sum"'
        )


def _running_step() -> FrameType | None:
    """The call of ``Trainer.training_step`` in which this is called, whatever overrides it or is wrapped around it."""
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_name == STEP and frame.f_globals.get("__name__") == MODULE:
            return frame
        frame = frame.f_back
    return None


def _of(step: FrameType, *names: str) -> tuple:
    """The local variables of these names."""
    found = step.f_locals
    values = tuple(map(found.get, names))
    if isinstance(found, dict):  # before Python 3.13 a copy, which would keep the batch for the backward
        found.clear()
    return values


def _counts_tokens(trainer: object) -> bool:
    """Whether num_items_in_batch is what the trainer of transformers counts: a subclass may count something else."""
    plain = sys.modules[MODULE].Trainer
    return all(getattr(getattr(trainer, n, None), "__func__", None) is getattr(plain, n, None) for n in COUNTS)


def _divides(trainer: object, items: object) -> bool:
    """Whether the trainer divides by the number of micro-batches, as its ``training_step`` decides."""
    said = getattr(trainer, SCALED, None)
    if said is not None and hasattr(sys.modules[MODULE].Trainer, SCALED):
        return not said
    return trainer.compute_loss_func is None and not (trainer.model_accepts_loss_kwargs and items is not None)


def _says_divided(trainer: object) -> bool:
    """Whether who wrote the loss says that it is divided there."""
    if SCALED in vars(trainer):
        return bool(getattr(trainer, SCALED))
    nearest = next(each for each in type(trainer).__mro__ if any(name in vars(each) for name in (SCALED, *LOSSES)))
    return bool(vars(nearest).get(SCALED))
