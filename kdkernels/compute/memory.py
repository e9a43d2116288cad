"""CPU memory that is kept from call to call: for logits, for the fp32 sums of dW and for dW itself.

Fresh memory is expensive on CPUs, because every page of it has to be mapped. The 300 MiB of logits of a bf16 loss over
[1024, 151936] take 200 ms and more per call for this on a virtual machine, and its 260 MiB of dW 50 to 390 ms; its
matrix products take 1500 ms. So blocks of memory are kept and used again as soon as no tensor uses them: the block of
dW once the caller has dropped the gradient. Blocks that are too small or too large for a request are freed before a new
one is made, so what is kept is about what one call needs. On GPUs PyTorch's caching allocator does this.
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
_SMALLEST = 1 << 20  # bytes; smaller requests are left to malloc, which keeps such memory itself


def _references(things: list, i: int) -> int:
    return sys.getrefcount(things[i])


_UNUSED = _references([object()], 0)  # references to a block that no tensor uses; a tensor over it adds one


class _Pool:
    """Blocks of memory, each used by one tensor at a time. A block may be ``most`` times as large as asked for."""

    def __init__(self, most: float):
        self.blocks: list[mmap.mmap] = []
        self.most, self.lock = most, threading.RLock()

    def free(self) -> list[int]:
        """Indices of the blocks that no tensor uses."""
        return [i for i in range(len(self.blocks)) if _references(self.blocks, i) == _UNUSED]

    def release(self) -> None:
        """Gives the blocks that no tensor uses back to the system."""
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
                # private: a forked process writes to a copy of its own
                block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                with suppress(AttributeError, OSError):  # not every system has huge pages
                    block.madvise(mmap.MADV_HUGEPAGE)
                self.blocks.append(block)
            return torch.frombuffer(block, dtype=torch.uint8, count=count)


_logits = _Pool(most=math.inf)  # one block, as large as any call needed so far
_gradients = _Pool(most=1)  # gradients are the caller's: none may hold more memory than its size says


def release() -> None:
    """Gives the blocks that no tensor uses back to the system."""
    _logits.release()
    _gradients.release()


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, in memory that is used again once the tensor is gone."""
    count = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or count < _SMALLEST:
        return torch.empty(shape, dtype=dtype, device=device)
    return _gradients.take(count).view(dtype).view(shape)


def padded(columns: int, device: torch.device) -> int:
    """The stride from row to row of a matrix with so many columns, in elements.

    On GPUs a multiple of 64, so that rows of any length are loaded and multiplied 16 bytes at a time. CPUs load equally
    fast from any address.
    """
    return columns if device.type == "cpu" else -(-columns // 64) * 64


def matrices(sizes: list[tuple[tuple[int, int], torch.dtype]], device: torch.device) -> list[Tensor]:
    """Uninitialised matrices of the given shapes and dtypes, with the strides of ``padded``.

    On CPUs all lie in one block, which may be larger than they are, unless they are small.
    """
    strides, starts, total = [padded(columns, device) for (_, columns), _ in sizes], [], 0
    for stride, ((rows, _), dtype) in zip(strides, sizes, strict=True):
        starts.append(total)
        total += -(-rows * stride * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    if device.type != "cpu" or total < _SMALLEST:
        return [
            torch.empty((rows, stride), dtype=dtype, device=device)[:, :columns]
            for stride, ((rows, columns), dtype) in zip(strides, sizes, strict=True)
        ]
    block = _logits.take(total)
    return [
        block.view(dtype).as_strided(shape, (stride, 1), start // dtype.itemsize)
        for start, stride, (shape, dtype) in zip(starts, strides, sizes, strict=True)
    ]
