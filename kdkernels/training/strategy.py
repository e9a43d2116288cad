"""What the trainer asks of whoever spreads a run's module over its processes and updates its weights."""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from kdkernels.data import Batch
from kdkernels.distillation import Distillation
from kdkernels.objectives import Output
from kdkernels.sources import Source


class Strategy(Protocol):
    """Student and objective, prepared for forward and backward passes and for updates on the processes of a run, each
    of which has one. All processes call its methods together.
    """

    @property
    def module(self) -> Distillation:
        """The module itself, whose weights are those that are trained."""

    @property
    def device(self) -> torch.device:
        """Where batches have to be."""

    def forward(self, batch: Batch, teacher: Source | None, weights: Tensor | None) -> Output:
        """What the module makes of one micro-batch."""

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` to that of the step: the sum over all micro-batches and processes."""

    def step(self, loss: float, lr: float, apply: bool = True) -> tuple[float, str | None]:
        """The update with the gradient of all micro-batches of a step, which it then forgets.

        Args:
            loss: the step's, of all processes.
            lr: the learning rate of this step.
            apply: False leaves weights and optimizer state as they are.

        Returns:
            The norm of the gradient before clipping; which of loss and norm is not finite, in words, or None. Where
            one is not, weights and optimizer state stay as they were, on all processes alike.
        """

    def whole(self) -> AbstractContextManager[None]:
        """While it is entered, every process has all weights of the student in place, for what runs the model outside
        of `forward`, as often as each likes: generation, evaluation. It may not change them. May be entered again.
        """

    def weights(self, frozen: bool = True) -> dict[str, Tensor] | None:
        """Weights and buffers of the student by the names of its `state_dict`, on process 0 alone; None on the others,
        none of which ever holds more than one that it shares. frozen=False: only the weights that are trained.
        """

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Weights, buffers and optimizer state of the student on this process, by names for people."""

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What it takes to go on after a whole step: (what all processes have alike, what this one has of its own), in
        plain containers of tensors, numbers and text.
        """

    def load_state(self, shared: dict[str, Any], own: dict[str, Any]) -> None:
        """Goes back to what `state` gave. Raises KeyError, ValueError, TypeError, RuntimeError or AttributeError for
        the state of something else.
        """
