"""The processes of a run: one without a launcher, or as many as torchrun starts."""

import atexit
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from kdkernels.errors import InputError, ServerError
from kdkernels.training.errors import DiskError
from kdkernels.training.processes.launcher import LAUNCHER, launched

T = TypeVar("T")


def start(timeout_seconds: float = 1800) -> None:
    """Joins the launcher's processes; without one, makes this process a world of its own. May be called again.

    An operation of all processes that does not end within `timeout_seconds` is an error (`lost_process`). Raises
    InputError where a launcher did not say all that it has to.
    """
    atexit.unregister(_let_go)
    atexit.register(_let_go)
    if dist.is_initialized():
        return
    timeout = timedelta(seconds=timeout_seconds)
    if not launched():
        dist.init_process_group(_backend(), store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    missing = [name for name in LAUNCHER if name not in os.environ]
    if missing:
        raise InputError(
            f"the environment variable RANK is set, as a launcher does, but {', '.join(missing)} is not: start the "
            "processes with torchrun, or unset RANK"
        )
    if torch.accelerator.is_available():  # each process has a device of its own
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    own = device() if torch.accelerator.is_available() else None
    dist.init_process_group(_backend(), timeout=timeout, device_id=own)


def leave() -> None:
    """The last thing that one of a launcher's processes does: ends the groups, and the threads of those that nobody
    else holds on to (DeepSpeed holds on to its own, under ZeRO-3 to all). `_let_go` is for the rest of them.
    """
    if launched() and dist.is_initialized():
        dist.destroy_process_group()


def limit_waiting(timeout_seconds: float) -> None:
    """Gives all groups of processes that there are the timeout: an engine makes its own, with half an hour or more."""
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
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())


def barrier() -> None:
    """Waits for all processes."""
    dist.barrier()


def total(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes, in place."""
    dist.all_reduce(values)
    return values


def peak_memory() -> float:
    """The largest amount of memory that any process has held so far, in GiB: of its accelerator, or else resident."""
    if torch.accelerator.is_available():
        peak = torch.accelerator.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    largest = torch.tensor(peak / 2**30, dtype=torch.float64, device=device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


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


def _let_go() -> None:
    """Gives the threads of gloo's groups the time to drop the tensors of the last operations; Python's exit calls it.

    Such a thread drops them after it has woken whoever waits for the operation, and needs Python's lock for that. This
    thread may have it by then, and keep it until the interpreter ends: Python then ends the other thread where C++
    allows no such thing, and the process aborts (SIGABRT, "terminate called without an active exception") although its
    work is done, which a launcher takes for a failed run. While this thread sleeps, the lock is free.
    """
    time.sleep(0.1)


def _backend() -> str:
    """What PyTorch's processes talk to each other by: NCCL on GPUs, gloo on CPUs."""
    return dist.get_default_backend_for_device(device())


def _for_others(error: Exception) -> Exception:
    """`error` as the other processes raise it; of a kind that survives the journey and keeps the exit status."""
    text = f"process {rank()}: {error}"
    if isinstance(error, (DiskError, InputError, ServerError, FloatingPointError)):
        return type(error)(text)
    return InputError(text) if isinstance(error, OSError) else RuntimeError(f"{type(error)}, {text}")
