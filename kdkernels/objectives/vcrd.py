"""VCRD: how valid a student's next step is decides how strongly it is distilled."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..checks import check_number, check_share
from ..divergences import SkewKL, SkewReverseKL
from ..engine.terms import DivergenceTerm, Needs, Term
from ..engine.tokens import Tokens
from .base import Objective, weighted

WEIGHTINGS = ("given", "likelihood_ratio", "uniform")
VALIDITY_WEIGHTS = ("ratio", "clamped_ratio", "difference", "student", "uniform")


class VCRD(Objective):
    """Local validity decides how strongly each token is distilled  (VCRD eqs. 2 - 4, Algorithm 1).

        L_r = (1 / L) lambda_T sum_t w(t) SKL_alpha(t) of a teacher-written response,
              (1 / L) lambda_S sum_t w(t) SRKL_alpha(t) of a student-written one
        loss = sum over responses of L_r times the response's tokens / prompts, by default
        SKL(t) = KL(p || alpha p + (1 - alpha) q),  SRKL(t) = KL(q || (1 - alpha) p + alpha q)

    ``from_teacher`` is required. A prompt has one response by each author, so prompts are the responses of the author
    who has more of them (``out.count``); ``denominator`` says another number.

    Args:
        alpha: share of p in the SKL's mixture, of q in the SRKL's.
        lambda_teacher, lambda_student: weights of the two terms.
        weighting: where w comes from. "given": the caller's ``weights`` [B, L], required, such as
            ``kdkernels.objectives.validity_weights`` of a process reward model's scores. "likelihood_ratio": from the
            same pass, without a judge (appendix 10.4): w = exp(clip(0.5 ln w_raw, ln 0.5, ln 2)),
            w_raw = p(argmax q) / (sum of the teacher's 128 largest p_i^2 + 1e-8). "uniform": 1. With the latter two,
            ``weights`` multiply what is there.
        reduction: "prompts" as above; "responses": the mean over responses of L_r (DistiLLM-2); "tokens"; "sum".

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source:
        "Validity-Calibrated Reasoning Distillation" (Saadi and Wang, arXiv 2605.04078), eqs. 2 - 4, Algorithm 1.
    """

    reductions = (*Objective.reductions, "prompts")

    def __init__(
        self,
        alpha: float = 0.1,
        lambda_teacher: float = 1.0,
        lambda_student: float = 1.0,
        weighting: str = "given",
        reduction: str = "prompts",
    ):
        super().__init__(reduction)
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
        check_number("lambda_teacher", lambda_teacher)
        check_number("lambda_student", lambda_student)
        check_share("alpha", alpha)
        self.alpha, self.lambda_teacher, self.lambda_student = alpha, lambda_teacher, lambda_student
        self.weighting = weighting
        self.needs_weights = weighting == "given"
        if weighting == "likelihood_ratio":
            self.reads = Needs(candidates=1, teacher_collision=128, all_entries=True)

    @property
    def terms(self) -> dict[str, Term]:
        """Of the options as they are now."""
        return {
            "skl": DivergenceTerm(SkewKL(self.alpha), group="teacher"),
            "srkl": DivergenceTerm(SkewReverseKL(self.alpha), group="student"),
        }

    def weight(self, tokens: Tokens) -> Tensor:
        """w(t), the caller's weights included [n]."""
        if self.weighting == "likelihood_ratio":
            ratio = reference.likelihood_ratio(tokens.teacher.at_student_argmax, tokens.teacher.collision)
        else:
            ratio = torch.ones_like(tokens.entropy)
        return weighted(ratio, tokens)

    def coefficients(self, tokens: Tokens) -> dict[str, Tensor]:
        w = self.weight(tokens) / tokens.length
        return {"skl": self.lambda_teacher * w, "srkl": self.lambda_student * w}

    def metrics(self, tokens: Tokens) -> dict[str, Tensor]:
        return {**super().metrics(tokens), "weight": self.weight(tokens).mean()}


def validity_weights(student: Tensor, teacher: Tensor, rule: str = "ratio") -> Tensor:
    """Weights for ``VCRD(weighting="given")`` from a judge's scores of both models' proposals at the same prefixes.

        ratio: r_S / (r_T + 1e-8) (eq. 1)   clamped_ratio: min(ratio, 1), no amplification   difference: r_S - r_T
        student: r_S   uniform: 1           (the ablations: sections 4.4, 4.5, table 10)

    Args:
        student, teacher: r(c, a_S), r(c, a_T) in [0, 1], of one shape, for teacher-written and student-written
            responses alike.
        rule: how the scores become weights. A difference may be negative: it then pushes the student away.

    Raises:
        TypeError, ValueError: naming the argument.

    Source:
        VCRD (arXiv 2605.04078), eq. 1, sections 4.4 and 4.5, table 10.
    """
    for name, scores in (("student", student), ("teacher", teacher)):
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            got = getattr(scores, "dtype", type(scores).__name__)
            raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
    if teacher.shape != student.shape:
        raise ValueError(f"teacher: expected shape {list(student.shape)} (the student's), got {list(teacher.shape)}")
    if rule not in VALIDITY_WEIGHTS:
        raise ValueError(f"rule: expected one of {', '.join(VALIDITY_WEIGHTS)}, got {rule!r}")
    return reference.validity_weights(student, teacher, rule)
