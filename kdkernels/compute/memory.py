"""CPU memory that is used again from call to call: for logits, for the fp32 sums of dW and for dW itself.

Fresh memory is expensive on CPUs. The 300 MiB of logits of a [1024, 151936] bf16 loss cost 200 ms and more of page
faults a call on a virtual machine, its 260 MiB of dW 50 to 390 ms (the products take 1500). So blocks are kept, and
serve again once no tensor uses them: dW's when the caller drops the gradient. What is kept is what one call needed;
blocks that do not fit the next one are freed first. GPUs have PyTorch's caching allocator for this.
"""

from __future__ import annotations

import math
import mmap
import sys
import threading
from contextlib import suppress

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes
_SMALLEST = 1 << 20  # bytes: malloc keeps what is smaller


def _references(things: list, i: int) -> int:
    return sys.getrefcount(things[i])


_UNUSED = _references([object()], 0)  # the list's, and what the count itself takes; a tensor over a block adds one


class _Pool:
    """Blocks of memory, each under one tensor at a time; ``most``: how many times larger than asked for one may be."""

    def __init__(self, most: float):
        self.blocks: list[mmap.mmap] = []
        self.most, self.lock = most, threading.RLock()

    def free(self) -> list[int]:
        """Places of the blocks that no tensor uses."""
        return [i for i in range(len(self.blocks)) if _references(self.blocks, i) == _UNUSED]

    def release(self) -> None:
        """Gives these back."""
        with self.lock:
            for i in reversed(self.free()):
                del self.blocks[i]

    def take(self, count: int) -> Tensor:
        """[count] uninitialised bytes."""
        size = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
        with self.lock:
            fit = [i for i in self.free() if size <= len(self.blocks[i]) <= self.most * size]
            if fit:
                block = self.blocks[min(fit, key=lambda i: len(self.blocks[i]))]
            else:
                self.release()
                block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a fork's writes are its own
                with suppress(AttributeError, OSError):  # not every system has them
                    block.madvise(mmap.MADV_HUGEPAGE)
                self.blocks.append(block)
            return torch.frombuffer(block, dtype=torch.uint8, count=count)


_logits = _Pool(most=math.inf)  # of the largest call so far
_gradients = _Pool(most=1)  # some are the caller's: none may hold more than it shows


def release() -> None:
    """Gives the blocks back that no tensor uses."""
    _logits.release()
    _gradients.release()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, of memory that serves again after the tensor."""
    count = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or count < _SMALLEST:
        return torch.empty(shape, dtype=dtype, device=device)
    return _gradients.take(count).view(dtype).view(shape)


def padded(columns: int, device: torch.device) -> int:
    """From row to row of a matrix, in elements. On GPUs a multiple of 64, so that rows of any length are loaded and
    multiplied 16 bytes at a time; CPUs load as well from anywhere."""
    return columns if device.type == "cpu" else -(-columns // 64) * 64


def matrices(sizes: list[tuple[tuple[int, int], torch.dtype]], device: torch.device) -> list[Tensor]:
    """Uninitialised matrices of the given shapes and dtypes, their rows ``padded``: on CPUs one block, which may be
    that of a larger call."""
    strides = [padded(columns, device) for (_, columns), _ in sizes]
    if device.type != "cpu":
        return [
            torch.empty((rows, stride), dtype=dtype, device=device)[:, :columns]
            for stride, ((rows, columns), dtype) in zip(strides, sizes, strict=True)
        ]
    starts, total = [], 0
    for stride, ((rows, _), dtype) in zip(strides, sizes, strict=True):
        starts.append(total)
        total += -(-rows * stride * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(total, dtype=torch.uint8, device=device) if total < _SMALLEST else _logits.take(total)
    return [
        block.view(dtype).as_strided(shape, (stride, 1), start // dtype.itemsize)
        for start, stride, (shape, dtype) in zip(starts, strides, sizes, strict=True)
    ]
