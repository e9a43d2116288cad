"""GKD: divergences on the student's own responses."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_share, check_temperature
from ..divergences import JSD
from ..engine.terms import DivergenceTerm, Term
from ..engine.tokens import Tokens
from .base import Objective, weighted


class GKD(Objective):
    """L_r = (1 / L) sum_t JSD_beta(p || q)(t) of each response; by default the mean over responses  (GKD eq. 2).

    Args:
        beta: 0 is the forward, 1 the reverse KL, between them the generalized JSD.
        temperature: divides both models' logits inside the divergence; no T^2 factor.
        reduction: "responses", "tokens" (the mean over all tokens, as TRL and Hugging Face have it) or "sum".

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source:
        "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (Agarwal et al., ICLR 2024,
        arXiv 2306.13649), eq. 2.
    """

    def __init__(self, beta: float = 0.9, temperature: float = 1.0, reduction: str = "responses"):
        super().__init__(reduction)
        check_share("beta", beta)
        check_temperature(temperature)
        self.beta, self.temperature = beta, temperature

    @property
    def terms(self) -> dict[str, Term]:
        """Of the options as they are now."""
        return {"direct": DivergenceTerm(JSD(self.beta), self.temperature)}

    def coefficients(self, tokens: Tokens) -> dict[str, Tensor]:
        return {"direct": weighted(tokens.length.to(tokens.entropy.dtype).reciprocal(), tokens)}
