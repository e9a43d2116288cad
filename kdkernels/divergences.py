"""Divergences between a teacher p and a student q, all members of one family

    D(a, l, b, u) = a * KL(p || m_l) + b * KL(q || m_u),      m_x = x * p + (1 - x) * q

so that every backend implements the family once. The names follow GKD (Agarwal et al., 2024, eq. 1), DistiLLM
(Ko et al., 2024) and VCRD.
"""

from __future__ import annotations

from dataclasses import dataclass

from .checks import check_bool, check_share

__all__ = ["JSD", "Divergence", "ForwardKL", "ReverseKL", "SkewKL", "SkewReverseKL"]


@dataclass(frozen=True)
class Divergence:
    """``a * KL(p || m) + b * KL(q || m)``, ``m = mix * p + (1 - mix) * q``; use the names below.

    ``detached``: no gradient flows through m; the value is the same.
    """

    family: str
    a: float
    b: float
    mix: float
    detached: bool = False
    parameter: float | None = None  # what the family's member is called by: beta or alpha

    @property
    def name(self) -> str:
        """As users write it; made when asked for, because torch.compile cannot format a number that changes."""
        return self.family if self.parameter is None else f"{self.family}({self.parameter:g})"

    @property
    def skew(self) -> float:
        """Coefficient of (q - p) / m in dD/dq; what is left is ``b * log(q / m)`` and a constant.

        dD/dq = -a (1 - mix) p/m + b [log(q/m) + 1 - (1 - mix) q/m], and p/m = 1 - (1 - mix) (q - p)/m,
        q/m = 1 + mix (q - p)/m. With m a constant the terms in (1 - mix) are absent, and nothing is left of a's.
        """
        return 0.0 if self.detached else (1 - self.mix) * (self.a * (1 - self.mix) - self.b * self.mix)


def ForwardKL() -> Divergence:
    """KL(p || q), mode covering."""
    return Divergence("ForwardKL", a=1.0, b=0.0, mix=0.0)


def ReverseKL() -> Divergence:
    """KL(q || p), mode seeking."""
    return Divergence("ReverseKL", a=0.0, b=1.0, mix=1.0)


def JSD(beta: float) -> Divergence:
    """beta * KL(p || m) + (1 - beta) * KL(q || m), m = beta * p + (1 - beta) * q  (GKD eq. 1).

    beta -> 0 behaves as the forward and beta -> 1 as the reverse KL. At the ends the formula itself vanishes
    identically; there JSD(0) *is* ForwardKL and JSD(1) *is* ReverseKL.
    """
    check_share("beta", beta)
    if beta == 0.0:
        return ForwardKL()
    if beta == 1.0:
        return ReverseKL()
    return Divergence("JSD", a=beta, b=1 - beta, mix=beta, parameter=beta)


def SkewKL(alpha: float) -> Divergence:
    """KL(p || alpha * p + (1 - alpha) * q)  (DistiLLM; VCRD on teacher prefixes). 0 for alpha = 1."""
    check_share("alpha", alpha)
    return Divergence("SkewKL", a=1.0 if alpha < 1 else 0.0, b=0.0, mix=alpha, parameter=alpha)


def SkewReverseKL(alpha: float, detach: bool = False) -> Divergence:
    """KL(q || (1 - alpha) * p + alpha * q)  (DistiLLM; VCRD on student prefixes). 0 for alpha = 1.

    ``detach`` makes the mixture a constant to the gradient, as DistiLLM-2's released code does: the gradient is then
    q (log(q/m) - KL(q || m)). The papers' formula differentiates the mixture too.
    """
    check_share("alpha", alpha)
    check_bool("detach", detach)
    b = 1.0 if alpha < 1 else 0.0
    return Divergence("SkewReverseKL", a=0.0, b=b, mix=1 - alpha, detached=detach, parameter=alpha)
