"""Whether tensors are finite: nothing else may be trained from or saved."""

import math
from collections.abc import Iterable

import torch

from kdkernels.training.processes import distributed
from kdkernels.training.strategy import Strategy


def nonfinite(strategy: Strategy) -> str | None:
    """The name of a weight, buffer or optimizer state of the student that is not finite on some process; all processes
    call this together. (The objective's buffers may say NaN for what it has not seen yet.)
    """
    own = first_nonfinite(strategy.tensors())
    return next((name for name in distributed.gathered(own) if name is not None), None)


def first_nonfinite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first of the named `tensors` that holds a NaN or an infinity."""
    for name, tensor in tensors:
        # the largest magnitude is NaN if any value is, and needs no memory
        measurable = tensor.is_floating_point() and tensor.numel() > 0
        if measurable and not torch.linalg.vector_norm(tensor.detach(), ord=math.inf).isfinite():
            return name
    return None
