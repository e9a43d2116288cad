"""Supervised fine-tuning: the plain next-token likelihood, as baseline and starting point."""

from __future__ import annotations

from torch import Tensor

from ..engine.spec import Tokens
from .base import Objective, weighted


class SFT(Objective):
    """Mean over response tokens of -log q(target). Takes no teacher; ``target`` is required."""

    needs_teacher = False
    needs_target = True
    mean_over = "tokens"
    names = {"cross_entropy": "cross_entropy"}

    def coefficients(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"cross_entropy": weighted(tokens.entropy.new_ones(tokens.entropy.shape), tokens)}
