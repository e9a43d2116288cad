"""Supervised fine-tuning: the plain next-token likelihood, as baseline and starting point."""

from __future__ import annotations

from torch import Tensor

from ..engine.terms import CrossEntropyTerm
from ..engine.tokens import Tokens
from .base import Objective, weighted


class SFT(Objective):
    """Mean over response tokens of -log q(target). Takes no teacher; ``target`` is required."""

    mean_over = "tokens"
    terms = {"cross_entropy": CrossEntropyTerm()}

    def coefficients(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"cross_entropy": weighted(tokens.entropy.new_ones(tokens.entropy.shape), tokens)}
