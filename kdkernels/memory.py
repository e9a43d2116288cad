"""The logits' memory: one block per process, kept from call to call.

Fresh memory is expensive on CPUs. The 300 MiB of logits of a [512, 151936] bf16 loss cost 200 ms and more of page
faults a call on a virtual machine (a fifth of the GEMMs), so the block of the last call serves the next one. It holds
what the largest call so far needed, which its ``memory_budget`` bounds. GPUs have PyTorch's caching allocator for this.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes
_kept: list[Tensor] = []  # at most one block, absent while a call uses it


def borrow(
    sizes: list[tuple[tuple[int, int], torch.dtype]], device: torch.device
) -> tuple[Tensor | None, list[Tensor]]:
    """Uninitialised matrices of the given shapes and dtypes, and the block to ``give_back`` once they are not used."""
    if device.type != "cpu":
        return None, [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in sizes]
    starts, total = [], 0
    for (rows, columns), dtype in sizes:
        starts.append(total)
        total += -(-rows * columns * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT
    try:
        block = _kept.pop()
    except IndexError:
        block = None
    if block is None or len(block) < total:
        block = None  # frees the smaller one first
        with torch.inference_mode(False):  # or a later call outside inference mode could not write to it
            block = torch.empty(total, dtype=torch.uint8, device=device)
    matrices = []
    for start, ((rows, columns), dtype) in zip(starts, sizes, strict=True):
        matrices.append(block[start : start + rows * columns * dtype.itemsize].view(dtype).view(rows, columns))
    return block, matrices


def give_back(block: Tensor | None) -> None:
    """Keeps the block for the next call, unless another one came back meanwhile."""
    if block is not None and not _kept:
        _kept.append(block)
