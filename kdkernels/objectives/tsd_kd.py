"""TSD-KD: selected tokens are distilled by the teacher's ranking, gated divergences and an entropy."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from ..checks import check_count, check_number, check_positive, check_share, check_temperature
from ..divergences import JSD
from ..engine.terms import DivergenceTerm, EntropyTerm, PlackettLuceTerm, Term
from ..engine.tokens import Tokens
from ..layout import Layout
from . import selection
from .adaptive_opener import AdaptiveOpener
from .base import Objective, weighted


class TSDKD(Objective):
    """L_r = indirect_weight * L_ind + direct_weight * L_dir + entropy_weight * L_em of each response; by default the
    mean over responses  (TSD-KD eq. 13).

        L_dir = (1/L) sum_t gate(t) JSD_beta(t),  gate(t) = sigmoid((H_s(t) - H_t(t)) / tau), a constant    (eq. 11)
        L_ind = sum over the opener of the NLL of the teacher's order of the student's top k                (eqs. 4, 5)
        L_em  = mean of H_s over the ``entropy_ratio`` most uncertain tokens of the response                (eq. 12)

    The opener is the shortest prefix that holds the share ``opener`` of the response's entropy. Selections are made
    per response.

    Args (defaults: the paper's, section 4.1 and appendix A.9; tau is not given there):
        beta: the JSD's mixture, 0.9 is close to the reverse KL.
        tau: width of the gate, in nats.
        k: candidates the student proposes; choose it for the vocabulary.
        opener: share of the cumulative entropy, in [0, 1], or an ``AdaptiveOpener`` (appendix A.7).
        entropy_ratio: share of tokens whose entropy is minimised, in [0, 1].
        indirect_weight, direct_weight, entropy_weight: weights of the terms.
        temperature: of the JSD only; gate, opener, ranking and entropy are at 1.
        reduction: "responses", "tokens" (each response counts in proportion to its tokens) or "sum".

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.

    Source:
        "Explain in Your Own Words: Improving Reasoning via Token-Selective Dual Knowledge Distillation"
        (arXiv 2603.13260), eqs. 4, 5, 11 - 13.
    """

    selects = True

    def __init__(
        self,
        beta: float = 0.9,
        tau: float = 1.0,
        k: int = 10,
        opener: float | AdaptiveOpener = 0.1,
        entropy_ratio: float = 0.1,
        indirect_weight: float = 0.1,
        direct_weight: float = 1.0,
        entropy_weight: float = 1.0,
        temperature: float = 1.0,
        reduction: str = "responses",
    ):
        super().__init__(reduction)
        check_positive("tau", tau)
        for name, weight in (
            ("indirect_weight", indirect_weight), ("direct_weight", direct_weight), ("entropy_weight", entropy_weight)
        ):  # fmt: skip
            check_number(name, weight)
        check_share("beta", beta)
        check_temperature(temperature)
        check_count("k", k, 1)
        self.selects_by_teacher = isinstance(opener, AdaptiveOpener)
        if not self.selects_by_teacher:
            check_share("opener", opener)
        check_share("entropy_ratio", entropy_ratio)
        self.tau, self.opener, self.entropy_ratio = tau, opener, entropy_ratio
        self.indirect_weight, self.direct_weight, self.entropy_weight = indirect_weight, direct_weight, entropy_weight
        self.beta, self.temperature, self.k = beta, temperature, k

    @property
    def terms(self) -> dict[str, Term]:
        """Of the options as they are now."""
        return {
            "direct": DivergenceTerm(JSD(self.beta), self.temperature),
            "indirect": PlackettLuceTerm(self.k),
            "entropy_minimisation": EntropyTerm(),
        }

    def select(self, tokens: Tokens, layout: Layout) -> dict[str, Tensor]:
        entropy = tokens.entropy
        uncertain, count = selection.most_uncertain(entropy, self.entropy_ratio, layout)
        share = self.opener(entropy, tokens.teacher.entropy, layout) if self.selects_by_teacher else self.opener
        opener = selection.opener(entropy, share, layout)
        return {"opener": opener.to(entropy.dtype), "uncertain": (uncertain / count).to(entropy.dtype)}

    def coefficients(self, tokens: Tokens) -> dict[str, Tensor]:
        gate = reference.gate(tokens.entropy, tokens.teacher.entropy, self.tau)
        return {
            "direct": weighted(self.direct_weight * gate / tokens.length, tokens),
            "indirect": weighted(self.indirect_weight * tokens.selected["opener"], tokens),
            "entropy_minimisation": weighted(self.entropy_weight * tokens.selected["uncertain"], tokens),
        }

    def metrics(self, tokens: Tokens) -> dict[str, Tensor]:
        gate = reference.gate(tokens.entropy, tokens.teacher.entropy, self.tau)
        opener = tokens.selected["opener"]
        return {**super().metrics(tokens), "gate": gate.mean(), "opener_share": opener.mean()}
