"""Divergences between a teacher p and a student q. All are members of one family

    D = a * KL(p || m) + b * KL(q || m),      m = mix * p + (1 - mix) * q

so that every backend implements the family once.

Source:
    "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD, arXiv 2306.13649), eq. 1;
    "DistiLLM: Towards Streamlined Distillation for Large Language Models" (arXiv 2402.03898);
    "Validity-Calibrated Reasoning Distillation" (VCRD, arXiv 2605.04078).
"""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_bool, check_share

__all__ = ["JSD", "Divergence", "ForwardKL", "ReverseKL", "SkewKL", "SkewReverseKL"]


@dataclass(frozen=True)
class Divergence:
    """``a * KL(p || m) + b * KL(q || m)`` with ``m = mix * p + (1 - mix) * q``; made by the functions below.

    Args:
        family: the name of the function that made it.
        a, b: the weights of the two KLs.
        mix: the teacher's share of the mixture m.
        detached: m is a constant to the gradient; the value is the same.
        parameter: the argument of that function, beta or alpha; None where it has none.
    """

    family: str
    a: float
    b: float
    mix: float
    detached: bool = False
    parameter: float | None = None

    @property
    def name(self) -> str:
        """As users write it. Made when asked for, because torch.compile cannot format a number that changes."""
        return self.family if self.parameter is None else f"{self.family}({self.parameter:g})"

    @property
    def skew(self) -> float:
        """The coefficient of (q - p) / m in dD/dq; the rest of dD/dq is ``b * log(q / m)`` and a constant.

            dD/dq = -a (1 - mix) p/m + b [log(q/m) + 1 - (1 - mix) q/m]
            p/m = 1 - (1 - mix) (q - p)/m,      q/m = 1 + mix (q - p)/m

        Where m is a constant, the terms with (1 - mix) are absent, so that only ``b * log(q / m)`` is left.
        """
        return 0.0 if self.detached else (1 - self.mix) * (self.a * (1 - self.mix) - self.b * self.mix)


def ForwardKL() -> Divergence:
    """KL(p || q). It makes the student cover every mode of the teacher."""
    return Divergence("ForwardKL", a=1.0, b=0.0, mix=0.0)


def ReverseKL() -> Divergence:
    """KL(q || p). It makes the student seek the teacher's largest mode."""
    return Divergence("ReverseKL", a=0.0, b=1.0, mix=1.0)


def JSD(beta: float) -> Divergence:
    """The generalized Jensen-Shannon divergence.

        beta * KL(p || m) + (1 - beta) * KL(q || m),      m = beta * p + (1 - beta) * q

    It behaves as the forward KL for beta -> 0 and as the reverse KL for beta -> 1. The formula itself is 0 at both
    ends, so JSD(0) *is* ForwardKL and JSD(1) *is* ReverseKL.

    Args:
        beta: the teacher's share of the mixture, in [0, 1].

    Raises:
        TypeError, ValueError: beta is not a number in [0, 1].

    Source: GKD (arXiv 2306.13649), eq. 1.
    """
    check_share("beta", beta)
    if beta == 0.0:
        return ForwardKL()
    if beta == 1.0:
        return ReverseKL()
    return Divergence("JSD", a=beta, b=1 - beta, mix=beta, parameter=beta)


def SkewKL(alpha: float) -> Divergence:
    """KL(p || alpha * p + (1 - alpha) * q); 0 for alpha = 1.

    Args:
        alpha: the teacher's share of the mixture, in [0, 1].

    Raises:
        TypeError, ValueError: alpha is not a number in [0, 1].

    Source: DistiLLM (arXiv 2402.03898); VCRD (arXiv 2605.04078) takes it for the teacher's responses.
    """
    check_share("alpha", alpha)
    return Divergence("SkewKL", a=1.0 if alpha < 1 else 0.0, b=0.0, mix=alpha, parameter=alpha)


def SkewReverseKL(alpha: float, detach: bool = False) -> Divergence:
    """KL(q || (1 - alpha) * p + alpha * q); 0 for alpha = 1.

    Args:
        alpha: the student's share of the mixture, in [0, 1].
        detach: the mixture is a constant to the gradient, which is then q (log(q/m) - KL(q || m)), as in DistiLLM-2's
            released code. By default the mixture is differentiated too, as the papers' formula says.

    Raises:
        TypeError, ValueError: alpha is not a number in [0, 1], or detach not a bool.

    Source: DistiLLM (arXiv 2402.03898); VCRD (arXiv 2605.04078) takes it for the student's responses.
    """
    check_share("alpha", alpha)
    check_bool("detach", detach)
    b = 1.0 if alpha < 1 else 0.0
    return Divergence("SkewReverseKL", a=0.0, b=b, mix=1 - alpha, detached=detach, parameter=alpha)
