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
_blocks: list[mmap.mmap] = []
_lock = threading.Lock()


def _references(things: list, i: int) -> int:
    return sys.getrefcount(things[i])


_UNUSED = _references([object()], 0)  # the list's, and what the count itself takes; a tensor over a block adds one


def _free() -> list[int]:
    """Places of the blocks that no tensor uses."""
    return [i for i in range(len(_blocks)) if _references(_blocks, i) == _UNUSED]


def release() -> None:
    """Gives the blocks back that no tensor uses."""
    for i in reversed(_free()):
        del _blocks[i]


def _bytes(count: int, most: float) -> Tensor:
    """[count] uninitialised bytes of a block of at most ``most`` times as many."""
    size = -(-count // mmap.PAGESIZE) * mmap.PAGESIZE
    with _lock:
        fit = [i for i in _free() if size <= len(_blocks[i]) <= most * size]
        if fit:
            block = _blocks[min(fit, key=lambda i: len(_blocks[i]))]
        else:
            release()
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # a fork's writes are its own
            with suppress(AttributeError, OSError):  # not every system has them
                block.madvise(mmap.MADV_HUGEPAGE)
            _blocks.append(block)
        return torch.frombuffer(block, dtype=torch.uint8, count=count)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty, of memory that serves again after the tensor."""
    count = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or count < _SMALLEST:
        return torch.empty(shape, dtype=dtype, device=device)
    return _bytes(count, most=1).view(dtype).view(shape)


def matrices(sizes: list[tuple[tuple[int, int], torch.dtype]], device: torch.device) -> list[Tensor]:
    """Uninitialised matrices of the given shapes and dtypes: one block, which may be that of a larger call."""
    if device.type != "cpu":
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in sizes]
    starts, total = [], 0
    for (rows, columns), dtype in sizes:
        starts.append(total)
        total += -(-rows * columns * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    block = torch.empty(total, dtype=torch.uint8) if total < _SMALLEST else _bytes(total, most=math.inf)
    return [
        block.view(dtype).as_strided((rows, columns), (columns, 1), start // dtype.itemsize)
        for start, ((rows, columns), dtype) in zip(starts, sizes, strict=True)
    ]
