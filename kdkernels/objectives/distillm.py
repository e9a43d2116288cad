"""DistiLLM-2: a divergence for the teacher's responses and another for the student's."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_bool, check_share
from ..divergences import SkewKL, SkewReverseKL
from ..engine.terms import DivergenceTerm, Term
from ..engine.tokens import Tokens
from .base import Objective, weighted


class DistiLLM2(Objective):
    """L_r = (1 / L) sum_t SKL_alpha(t) where the teacher wrote the response, SRKL_alpha(t) elsewhere; by default the
    mean over responses.

        SKL(t) = KL(p || alpha p + (1 - alpha) q),  SRKL(t) = KL(q || (1 - alpha) p + alpha q)

    ``from_teacher`` is required. Without a response of one author its term is 0.

    Args:
        alpha_teacher: the teacher's share of the mixture on teacher-written responses.
        alpha_student: the student's share of the mixture on student-written ones.
        detach_mixture: the mixture of the SRKL is a constant to the gradient, as in the released code.
        reduction: "responses", "tokens" (the mean over all tokens) or "sum".

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source:
        "DistiLLM-2: A Contrastive Approach Boosts the Distillation of LLMs" (Ko et al., ICML 2025, arXiv 2503.07067).
    """

    def __init__(
        self,
        alpha_teacher: float = 0.1,
        alpha_student: float = 0.1,
        detach_mixture: bool = False,
        reduction: str = "responses",
    ):
        super().__init__(reduction)
        check_share("alpha_teacher", alpha_teacher)
        check_share("alpha_student", alpha_student)
        check_bool("detach_mixture", detach_mixture)
        self.alpha_teacher, self.alpha_student, self.detach_mixture = alpha_teacher, alpha_student, detach_mixture

    @property
    def terms(self) -> dict[str, Term]:
        """Of the options as they are now."""
        return {
            "skl": DivergenceTerm(SkewKL(self.alpha_teacher), group="teacher"),
            "srkl": DivergenceTerm(SkewReverseKL(self.alpha_student, self.detach_mixture), group="student"),
        }

    def coefficients(self, tokens: Tokens) -> dict[str, Tensor]:
        mean = weighted(tokens.length.to(tokens.entropy.dtype).reciprocal(), tokens)
        return {"skl": mean, "srkl": mean}
