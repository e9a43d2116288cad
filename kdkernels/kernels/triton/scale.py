"""Multiplies a gradient with a number that only the GPU knows: the incoming gradient of a backward.

It is 1 for a loss that is not scaled any further, but asking the GPU for it would be a sync. So the kernel looks, and
leaves the gradient alone if it is 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch

_BLOCK, _WARPS = 4096, 8  # 16 numbers a thread
_PROGRAMS = 4096  # at most; they fill the largest GPUs a few times. With a factor of 1 all are launched for nothing


@triton.jit(do_not_specialize=["count"])
def scale_kernel(gradient_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    """gradient *= factor, in fp32."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        first = tl.program_id(0).to(tl.int64) * BLOCK
        while first < count:
            places = first + tl.arange(0, BLOCK)
            scaled = tl.load(gradient_ptr + places, mask=places < count).to(tl.float32) * factor
            tl.store(gradient_ptr + places, scaled.to(gradient_ptr.dtype.element_ty), mask=places < count)
            first += tl.num_programs(0).to(tl.int64) * BLOCK


_scale = Launch(scale_kernel)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """gradient *= factor [], a number on the gradient's device, in fp32.

    Raises:
        ValueError: a gradient that is not contiguous.
    """
    count = gradient.numel()
    _scale(min(-(-count // _BLOCK), _PROGRAMS), _WARPS, gradient, factor, count, _BLOCK)
