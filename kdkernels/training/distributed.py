"""The processes of a run: one without a launcher, or as many as torchrun starts."""

import os
import socket
from typing import Any

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no accelerator

import deepspeed
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator


def start() -> None:
    """Joins the launcher's processes; without one, makes this process a world of its own. May be called again."""
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        os.environ |= {
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
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
    """The sum of `values` over all processes."""
    dist.all_reduce(values)
    return values


def gathered(value: Any) -> list[Any]:
    """`value` of every process, in the order of their ranks."""
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
