"""The adaptive opener of TSD-KD (appendix A.7): the harder a response, the longer its opener."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..checks import check_count, check_share
from ..layout import Layout


class AdaptiveOpener(nn.Module):
    """The share c of a response's entropy that its opener holds, from how far the student is behind.

        gap = mean over the response's tokens of H_s - H_t
        difficulty = mean of the gaps of this response and the window - 1 before it
        c = shares[i] where edges[i - 1] <= difficulty < edges[i]

    Responses come in the order of the batch's rows (of its Layout). In training mode they enter the window, a buffer
    that is saved with the state; in evaluation mode nothing changes and each response is averaged with the window as
    it stands. A gap that is not finite counts as absent. The teacher's entropies are needed before anything else, which
    costs one more product with its head. On a GPU, move the objective there: a window elsewhere costs syncs. Under
    activation checkpointing keep the objective outside, where it runs once per batch.

    Args (the paper gives only the window; take quantiles of the gaps of your own models as edges, the metrics
    student_entropy - teacher_entropy show them):
        edges: increasing gaps in nats, one fewer than shares.
        shares: c in [0, 1] for each interval between the edges, from the easy to the hard end. The defaults lie
            around the paper's fixed c = 0.1.
        window: responses in the moving average.

    Raises:
        TypeError, ValueError: naming the argument.

    Source:
        TSD-KD (arXiv 2603.13260), appendix A.7.
    """

    def __init__(
        self,
        edges: tuple[float, ...] = (0.05, 0.15),
        shares: tuple[float, ...] = (0.05, 0.1, 0.2),
        window: int = 5,
    ):
        super().__init__()
        if not all(map(math.isfinite, edges)) or not all(low < high for low, high in pairwise(edges)):
            raise ValueError(f"edges: expected increasing finite numbers, got {edges!r}")
        if len(shares) != len(edges) + 1:
            raise ValueError(f"shares: expected {len(edges) + 1}, one more than edges, got {len(shares)}")
        for share in shares:
            check_share("shares", share)
        check_count("window", window, 1)
        self.edges, self.shares = tuple(edges), tuple(shares)
        self.register_buffer("gaps", torch.full((window,), torch.nan, dtype=torch.float64, device="cpu"))

    def forward(self, entropy: Tensor, teacher_entropy: Tensor, layout: Layout) -> Tensor:
        """c of each response [R] fp64, from both models' entropies [n]."""
        gaps = layout.sums((entropy - teacher_entropy).double()) / layout.response_lengths
        gaps = torch.where(gaps.isfinite(), gaps, torch.nan).to(self.gaps.dtype)  # a model cast to bf16 casts buffers
        known, window = self.gaps.to(gaps.device), len(self.gaps)
        if self.training:
            samples = torch.cat([known, gaps])
            self.gaps.copy_(samples[-window:])
            samples = samples.unfold(0, window, 1)[1:]
        else:
            samples = torch.cat([known[1:].expand(len(gaps), -1), gaps[:, None]], dim=1)
        difficulty = samples.double().nanmean(1)
        share = torch.full_like(difficulty, self.shares[0])
        for edge, harder in zip(self.edges, self.shares[1:], strict=True):
            share = torch.where(difficulty >= edge, harder, share)
        return share
