"""Supervised fine-tuning: the plain next-token likelihood, as baseline and starting point."""

from __future__ import annotations

from torch import Tensor

from ..engine.terms import CrossEntropyTerm
from ..engine.tokens import Tokens
from .base import Objective, weighted


class SFT(Objective):
    """L_r = (1 / L) sum_t -log q(target) of each response; by default the mean over all tokens.

    Takes no teacher; ``target`` is required.

    Args:
        reduction: "tokens", "responses" (the mean over responses of L_r) or "sum".

    Raises:
        ValueError: reduction is something else.
    """

    terms = {"cross_entropy": CrossEntropyTerm()}

    def __init__(self, reduction: str = "tokens"):
        super().__init__(reduction)

    def coefficients(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"cross_entropy": weighted(tokens.length.to(tokens.entropy.dtype).reciprocal(), tokens)}
