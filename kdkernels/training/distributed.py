"""The processes of a run: one without a launcher, or as many as torchrun starts."""

import os
from typing import Any

import torch
import torch.distributed as dist

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no accelerator

import deepspeed
from deepspeed.accelerator import get_accelerator

# DeepSpeed would compile an all-reduce for CPU processes on its first use: a minute, a need for ninja, and a lock that
# blocks every later run where that compile was killed. gloo does the same.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def start() -> None:
    """Joins the launcher's processes; without one, makes this process a world of its own. May be called again."""
    if "RANK" not in os.environ and not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        backend = get_accelerator().communication_backend_name()
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    deepspeed.init_distributed(verbose=False)


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
