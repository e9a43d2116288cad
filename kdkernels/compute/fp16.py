"""What the range of fp16 asks for: a power of two leaves each token's coefficients and returns behind the products.

A coefficient may be as small as one over the tokens of a batch, a probability one over the words; their product,
written in the logits' place, would be 0 in fp16 (its least number is 2^-24) long before a loss scale multiplies it.
With the power taken out, the largest coefficient of a token is about 2^6: the probability of one word of a million is
still a normal number, and a thousandfold of the coefficient (log-ratios) still fits below 2^16.

Put back: with the rows of d hidden, which multiply one token each; for d weight and d bias, which are sums over tokens,
on the fp16 hidden states, relative to the largest, and then on the fp32 sums. The gradients handed to autograd are
fp16: what is left of the powers is multiplied in with the incoming gradient, which holds the loss scale.

Axes: n tokens, m coefficients of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HEADROOM = 6
_SMALLEST, _LARGEST = -100, 100  # exponents whose powers, and what they are multiplied with, fp32 still holds


def power(coefficients: Tensor) -> Tensor:
    """[n] powers of two by which ``coefficients`` [m, n] of each token are to be divided, without rounding.

    From the largest finite one; the smallest power where there is none, so that the token does not count.
    """
    largest = coefficients.float().abs().nan_to_num(0, 0, 0).amax(0)
    exponent = (largest.frexp().exponent - _HEADROOM).clamp(_SMALLEST, _LARGEST)
    return torch.ldexp(torch.ones_like(largest), exponent.masked_fill(largest == 0, _SMALLEST))


def normalized(sums: Tensor) -> Tensor:
    """Divides fp32 sums, in place, by the power of two with which fp16 holds them best; that power []."""
    low, high = sums.aminmax()
    largest = torch.maximum(-low, high)
    exponent = torch.where(largest.isfinite() & (largest > 0), largest, 1).frexp().exponent - 15
    exponent = exponent.clamp(_SMALLEST, _LARGEST)
    sums.mul_(torch.ldexp(torch.ones_like(largest), -exponent))
    return torch.ldexp(torch.ones_like(largest), exponent)
