"""Multiplies a gradient with a number that only the GPU knows: the incoming gradient of a backward.

It is 1 for a loss that is not scaled any further, but asking the GPU for it would be a sync. So the kernel looks, and
leaves the gradient alone if it is 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK, _WARPS = 4096, 8  # 16 numbers a thread
_PROGRAMS = 4096  # at most; they fill the largest GPUs a few times. With a factor of 1 all are launched for nothing


@triton.jit(do_not_specialize=["count"])
def scale_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """x *= factor, in fp32."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        while first < count:
            places = first + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + places, mask=places < count)
            tl.store(x_ptr + places, (x.to(tl.float32) * factor).to(x_ptr.dtype.element_ty), mask=places < count)
            first += tl.num_programs(0).to(tl.int64) * BLOCK


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor [], a number on the gradient's device, in fp32.

    Raises:
        ValueError: a gradient that is not contiguous.
    """
    if not gradient.is_contiguous():
        raise ValueError(f"gradient: expected a contiguous tensor, got strides {gradient.stride()}")
    count = gradient.numel()
    if count:
        with torch.cuda.device_of(gradient):
            programs = min(triton.cdiv(count, _BLOCK), _PROGRAMS)
            scale_kernel[(programs,)](gradient, factor, count, BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=False)
