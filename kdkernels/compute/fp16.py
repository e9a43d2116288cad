"""How gradients of fp16 logits keep within fp16's range: each token has a power of two of its own.

The gradient of a logit is about a coefficient times a probability. The coefficient may be as small as one over the
tokens of a batch, the probability as small as one over the vocabulary. Their product would be 0 in fp16, whose smallest
number is 2^-24, before any loss scale multiplies it. So a token's coefficients are divided by a power of two first
(``power``) that makes the largest of them about 2^6. A probability of 2^-20 then still gives a normal number, and a
thousand times the coefficient (log-ratios) still stays below 2^16.

The powers are multiplied in again after the products:
- d hidden: each row belongs to one token, and is multiplied with its power.
- d weight and d bias: they are sums over tokens. The fp16 hidden states are multiplied with the powers divided by the
  largest power, and the fp32 sums with that one (compute/gemm.py, WeightGradient).

The gradients for autograd are fp16 again. What does not fit there of the powers is multiplied in together with the
incoming gradient, which holds the loss scale.

Axes: n tokens, m coefficients of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HEADROOM = 6
_SMALLEST, _LARGEST = -100, 100  # exponents: fp32 holds these powers, and what they are multiplied with


def power(coefficients: Tensor) -> Tensor:
    """Powers of two [n] by which the ``coefficients`` [m, n] of each token are to be divided; this rounds nothing.

    The largest finite coefficient of a token decides. A token without one that is not 0 gets the smallest power.
    """
    largest = coefficients.float().abs().nan_to_num(0, 0, 0).amax(0)
    exponent = (largest.frexp().exponent - _HEADROOM).clamp(_SMALLEST, _LARGEST)
    return torch.ldexp(torch.ones_like(largest), exponent.masked_fill(largest == 0, _SMALLEST))


def normalized(sums: Tensor) -> Tensor:
    """Divides fp32 sums in place by a power of two so that the largest just fits fp16; returns that power []."""
    low, high = sums.aminmax()
    largest = torch.maximum(-low, high)
    exponent = torch.where(largest.isfinite() & (largest > 0), largest, 1).frexp().exponent - 15
    exponent = exponent.clamp(_SMALLEST, _LARGEST)
    sums.mul_(torch.ldexp(torch.ones_like(largest), -exponent))
    return torch.ldexp(torch.ones_like(largest), exponent)
