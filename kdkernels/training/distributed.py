"""The processes of a run: one without a launcher, or as many as torchrun starts."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no accelerator

import deepspeed
from deepspeed.accelerator import get_accelerator

from kdkernels.errors import InputError
from kdkernels.training.errors import DiskError
from kdkernels.training.launcher import LAUNCHER, launched

# DeepSpeed would compile an all-reduce for CPU processes on its first use: a minute, a need for ninja, and a lock that
# blocks every later run where that compile was killed. gloo does the same.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

T = TypeVar("T")


def start(timeout_seconds: float = 1800) -> None:
    """Joins the launcher's processes; without one, makes this process a world of its own. May be called again.

    An operation of all processes that does not end within `timeout_seconds` is an error (`lost_process`). Raises
    InputError where a launcher did not say all that it has to.
    """
    timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        if launched():
            missing = [name for name in LAUNCHER if name not in os.environ]
            if missing:
                raise InputError(
                    f"the environment variable RANK is set, as a launcher does, but {', '.join(missing)} is not: start "
                    "the processes with torchrun, or unset RANK"
                )
        else:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
            backend = get_accelerator().communication_backend_name()
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    deepspeed.init_distributed(verbose=False, timeout=timeout)


def leave() -> None:
    """The last thing that one of a launcher's processes does. Left to Python's exit, the threads of gloo's groups now
    and then abort a process whose work is done, which the launcher takes for a failed run.
    """
    if launched() and dist.is_initialized():
        dist.destroy_process_group()


def limit_waiting(timeout_seconds: float) -> None:
    """Gives all groups of processes that there are the timeout: DeepSpeed makes its own, with half an hour or more."""
    for group in distributed_c10d._world.pg_map:
        distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_seconds), group)


def rank() -> int:
    """This process's number among all."""
    return dist.get_rank()


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size()


def device() -> torch.device:
    """The device of this process."""
    return torch.device(get_accelerator().current_device_name())


def barrier() -> None:
    """Waits for all processes."""
    dist.barrier()


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes, in place."""
    dist.all_reduce(values)
    return values


def gathered(value: Any) -> list[Any]:
    """`value` of every process, in the order of their ranks."""
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def together() -> Iterator[None]:
    """Around what every process does on its own (no operation of all processes may be in it): where it fails on one,
    all fail with its error at once, instead of waiting for that process until the timeout.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    agree(error)


def agree(error: Exception | None) -> None:
    """Raises the process's own `error`, or that of the first process that has one; all processes call this together."""
    told = [error] if world_size() == 1 else gathered(None if error is None else _for_others(error))
    if error is not None:
        raise error
    others = [one for one in told if one is not None]
    if others:
        raise others[0]


def by_first(function: Callable[[], T]) -> T:
    """What `function` returned on rank 0, which alone calls it; what it raises there is raised on all processes."""
    value = None
    with together():
        if rank() == 0:
            value = function()
    return gathered(value)[0]


def lost_process(error: Exception) -> bool:
    """Whether `error` is how gloo, NCCL or the rendezvous say that another process ended or does not answer."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _for_others(error: Exception) -> Exception:
    """`error` as the other processes raise it; of a kind that survives the journey and keeps the exit status."""
    text = f"process {rank()}: {error}"
    if isinstance(error, (DiskError, InputError, FloatingPointError)):
        return type(error)(text)
    return InputError(text) if isinstance(error, OSError) else RuntimeError(f"{type(error)}, {text}")
