"""Which tokens of a response count, from the student's entropies; reference.py has the same rules for one response."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import Layout


def opener(entropy: Tensor, share: float | Tensor, layout: Layout) -> Tensor:
    """The first m tokens of each response, m smallest with cumulative entropy >= share * total; [n] -> bool [n].

    ``share`` may be one per response [R]. fp64 sums; token m is included; without any entropy m = 1
    (TSD-KD, section 3.1).
    """
    table = layout.spread(entropy.double(), 0.0)  # one response a row: a NaN stays in its own
    cumulative = table.cumsum(1)
    needed = share * cumulative[:, -1]
    inside = cumulative.roll(1, dims=1) < needed[:, None]
    inside[:, 0] = True
    return inside[layout.response, layout.position]


def most_uncertain(entropy: Tensor, ratio: float, layout: Layout) -> tuple[Tensor, Tensor]:
    """The n = max(1, floor(ratio * L + 0.5)) tokens of largest entropy per response, ties to the earlier.

    [n] -> bool [n], and each token's response's n [n]  (TSD-KD eq. 12).
    """
    table = layout.spread(entropy, -1.0)
    order = table.sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(table.shape[1], device=order.device).expand_as(order)
    )
    count = (ratio * layout.length.double() + 0.5).floor().clamp(min=1)
    return rank[layout.response, layout.position] < count, count
