"""Which tokens of a response count, from the student's entropies; reference.py has the same rules for one response."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layout import Layout


def opener(entropy: Tensor, share: float | Tensor, layout: Layout) -> Tensor:
    """The first m tokens of each response, m smallest with cumulative entropy >= share * total; [n] -> bool [n].

    ``share`` may be one per response [R]. fp64 sums; token m is included; without any entropy m = 1
    (TSD-KD, section 3.1).
    """
    padded = pad(entropy.double(), (0, 1))  # the number after the last token's stands for none
    out = torch.empty_like(padded, dtype=torch.bool)
    for responses, tokens in layout.tables:
        cumulative = padded[tokens].cumsum(1)  # a NaN stays in its own response
        needed = (share[responses] if isinstance(share, Tensor) else share) * cumulative[:, -1]
        inside = cumulative.roll(1, dims=1) < needed[:, None]
        inside[:, 0] = True
        out[tokens] = inside
    return out[:-1]


def most_uncertain(entropy: Tensor, ratio: float, layout: Layout) -> tuple[Tensor, Tensor]:
    """The n = max(1, floor(ratio * L + 0.5)) tokens of largest entropy per response, ties to the earlier.

    [n] -> bool [n], and each token's response's n [n]  (TSD-KD eq. 12).
    """
    padded = pad(entropy, (0, 1), value=-1.0)  # below every entropy
    rank = torch.empty_like(padded, dtype=torch.int64)
    for _, tokens in layout.tables:
        order = padded[tokens].sort(dim=1, descending=True, stable=True).indices
        places = torch.arange(tokens.shape[1], device=order.device).expand_as(order)
        rank[tokens] = torch.empty_like(order).scatter_(1, order, places)
    count = (ratio * layout.length.double() + 0.5).floor().clamp(min=1)
    return rank[:-1] < count, count
