"""Whether a head's logits are those of the model that it was made of, at a few tokens.

Axes: n tokens, V vocabulary; [...] leading dimensions.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checks import check_count
from ..kernels import backend_for

if TYPE_CHECKING:
    from .head import Head

# The largest difference that rounding makes, as a part of a token's largest logit: products are summed in another
# order, and 16-bit logits are rounded to 8 bits (bf16) or 11.
_ALLOWED = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@torch.no_grad()
def verify(head: Head, model: nn.Module, tokens: int, inputs: dict) -> float:
    """See Head.verify."""
    check_count("tokens", tokens, 1)
    if head.group is not None:
        raise ValueError("group: expected a head of the whole vocabulary, got a rank's part; verify it undivided")
    out = model(**inputs)
    own = out[0] if isinstance(out, tuple) else out.logits
    if own.shape[:-1] != head.shape or own.shape[-1] < head.vocabulary:
        raise ValueError(
            f"hidden: expected the last hidden states of these inputs, whose logits are {list(own.shape)}, got a head "
            f"with logits {[*head.shape, head.vocabulary]}"
        )
    head = head.autocast()
    narrowest = min(head.dtype, own.dtype, key=lambda dtype: -_ALLOWED[dtype])
    index = _some(inputs.get("decoder_attention_mask", inputs.get("attention_mask")), head, tokens)
    z, own = _logits(head, index).double(), own.flatten(0, -2)[index, : head.vocabulary].double()
    largest = own.masked_fill(~own.isfinite(), 0).abs().amax(-1, keepdim=True).clamp_min(1e-30)
    apart = torch.where(z == own, 0, (z - own).abs() / largest).nan_to_num(nan=torch.inf)
    worst, allowed = float(apart.max()), _ALLOWED[narrowest]
    if worst <= allowed:
        return worst
    token, entry = divmod(int(apart.argmax()), head.vocabulary)
    position = [int(i) for i in torch.unravel_index(index[token], head.shape)]
    dropout = "; the model is in training mode: its dropout draws anew, call .eval() first" if model.training else ""
    raise ValueError(
        f"head: expected the model's own logits, which are {own[token, entry]:.6g} at position {position} for entry "
        f"{entry}, got {z[token, entry]:.6g}: {worst:.3g} of that token's largest logit apart, more than {allowed} "
        f"({narrowest}). The hidden states have to be the ones after the final norm, of these inputs and these "
        f"weights{dropout}"
    )


def _some(mask: object, head: Head, tokens: int) -> Tensor:
    """Flat positions [n], spread evenly over those that count."""
    counted = torch.arange(head.shape.numel(), device=head.device)
    if isinstance(mask, Tensor) and mask.shape == head.shape:
        counted = mask.flatten().nonzero()[:, 0]
    if not len(counted):
        raise ValueError("attention_mask: expected at least one position that counts, got none")
    return counted[:: math.ceil(len(counted) / tokens)]


def _logits(head: Head, index: Tensor) -> Tensor:
    """[n, V] as the head's producer makes them for the chunk loop."""
    dtype = head.logits_dtype(None)
    backend, entries = backend_for(head.device, dtype, head.dtype), head.vocabulary
    buffer = torch.empty((len(index), entries), dtype=dtype, device=head.device)
    rows = head.detach().producer(backend, index, entries, buffer).rows(slice(0, len(index)), 1.0, 1, None)
    z = head.scale * rows.logits.to(torch.promote_types(dtype, torch.float32))
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
