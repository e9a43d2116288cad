"""The specification: every quantity, objective and gradient in plain PyTorch on full logits, as the papers state them.

It is slow and takes much memory on purpose. All other code is tested against this file in fp64; the gradients in closed
form here are tested against autograd of the values (tests/test_reference.py).

Axes: N or C tokens, V vocabulary, K candidates, R responses, L tokens of a response. ``z`` are logits after scale,
soft-cap and mask of the vocabulary's padding; q = softmax(z_s) is the student, p = softmax(z_t) the teacher. Entropies
and divergences are in nats. A stop-gradient is written ``.detach()``.

Source: "Explain in Your Own Words: Improving Reasoning via Token-Selective Dual Knowledge Distillation" (TSD-KD,
    arXiv 2603.13260); "Validity-Calibrated Reasoning Distillation" (VCRD, arXiv 2605.04078); "On-Policy Distillation of
    Language Models: Learning from Self-Generated Mistakes" (GKD, arXiv 2306.13649); "DistiLLM-2: A Contrastive Approach
    Boosts the Distillation of LLMs" (arXiv 2503.07067).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .divergences import JSD, Divergence, SkewKL, SkewReverseKL

# ---- per token -----------------------------------------------------------------------------------------------------


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scale: float = 1.0, softcap: float | None = None
):
    """z = softcap * tanh(scale * (h W^T + bias) / softcap); hidden [N, H], weight [V, H] -> [N, V]."""
    z = scale * torch.nn.functional.linear(hidden, weight, bias)
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def xlogy(x: Tensor, log_y: Tensor) -> Tensor:
    """x * log y with 0 * log 0 = 0."""
    return torch.where(x == 0, torch.zeros_like(x), x * log_y)


def entropy(z: Tensor) -> Tensor:
    """H = -sum_i q_i log q_i; z [C, V] -> [C]."""
    log_q = z.log_softmax(-1)
    return -xlogy(log_q.exp(), log_q).sum(-1)


def entropy_gradient(z: Tensor) -> Tensor:
    """dH/dz_i = -q_i (log q_i + H)."""
    log_q = z.log_softmax(-1)
    q = log_q.exp()
    return -xlogy(q, log_q) - q * entropy(z)[:, None]


def cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """-log q(target); z [C, V], target [C] -> [C]."""
    return -z.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def log_mixture(log_p: Tensor, log_q: Tensor, mix: float) -> Tensor:
    """log(mix * p + (1 - mix) * q), in log space: there, probabilities that underflow still have a logarithm."""
    if mix == 0.0:
        return log_q
    if mix == 1.0:
        return log_p
    return torch.logaddexp(log_p + math.log(mix), log_q + math.log1p(-mix))


def divergence(z_s: Tensor, z_t: Tensor, d: Divergence, temperature: float = 1.0) -> Tensor:
    """D = a KL(p || m) + b KL(q || m), both softmaxes at ``temperature``, no T^2 factor; z_s, z_t [C, V] -> [C]."""
    log_q = (z_s / temperature).log_softmax(-1)
    log_p = (z_t / temperature).log_softmax(-1)
    log_m = log_mixture(log_p, log_q, d.mix)
    if d.detached:
        log_m = log_m.detach()
    value = torch.zeros_like(log_q[..., 0])
    if d.a:
        value = value + d.a * xlogy(log_p.exp(), log_p - log_m).sum(-1)
    if d.b:
        value = value + d.b * xlogy(log_q.exp(), log_q - log_m).sum(-1)
    return value


def divergence_gradient(z_s: Tensor, z_t: Tensor, d: Divergence, temperature: float = 1.0) -> Tensor:
    """dD/dz_s = q (g - E_q[g]) / T with g = dD/dq = skew (q - p) / m + b log(q/m); a constant in g would cancel.

    ``Divergence.skew`` derives g. q * g is the exponential of summed logarithms. So there is no 0 * inf, and an entry
    whose q underflows keeps its gradient (forward KL: -p). Where the student masks an entry, the gradient is 0.

    The first term of g is rewritten with q = (1 - mix) q (q - p)/m + q p/m:

        q ((q - p)/m - E_q[(q - p)/m]) = q (q - p)/m E_q[p/m] - q p/m E_q[(q - p)/m]

    On the right nothing large cancels, even where p and q hardly overlap: p/m is small wherever q is not.
    """
    log_q = (z_s / temperature).log_softmax(-1)
    log_p = (z_t / temperature).log_softmax(-1)
    log_m = log_mixture(log_p, log_q, d.mix)
    q, log_q_m = log_q.exp(), log_q - log_m

    def mean(x: Tensor) -> Tensor:
        return x.sum(-1, keepdim=True) / q.sum(-1, keepdim=True)  # rounded probabilities do not sum to 1

    gradient = torch.zeros_like(q)
    if d.skew:
        q_p = torch.where(log_q.isneginf(), 0, (log_p + log_q_m).exp())
        q_skew = torch.where(log_q.isneginf(), 0, (log_q + log_q_m).exp()) - q_p
        gradient = gradient + d.skew * (q_skew * mean(q_p) - q_p * mean(q_skew))
    if d.b:
        q_log = xlogy(q, log_q_m)
        gradient = gradient + d.b * (q_log - q * mean(q_log))
    return gradient / temperature


def missing_mass(log_p: Tensor) -> Tensor:
    """log(1 - sum_i p_i) [C, 1] of log_p [C, K]: the mass of all entries but the K listed ones.

    The mass is at least 2^-23, which fp32 lists lose in rounding: where it is 0, a reverse KL would be infinite.
    """
    return (1 - log_p.exp().sum(-1, keepdim=True)).clamp(min=2.0**-23).log()


def topk_divergence(
    z_s: Tensor, indices: Tensor, log_p: Tensor, d: Divergence, temperature: float = 1.0, renormalize: bool = False
) -> Tensor:
    """The divergence of both distributions coarsened to K + 1 outcomes: K entries and one bucket for all others.

    indices, log_p [C, K]: distinct ids and log p of K entries; those of log p = -inf are not listed and lie in the
    bucket. The teacher's bucket has the mass 1 - sum p, the student's that of its other entries. ``renormalize`` drops
    it; where all entries are listed there is none. z_s [C, V] -> [C].
    """
    z, unlisted = z_s.gather(-1, indices), log_p.isneginf()
    listed = z.masked_fill(unlisted, -math.inf)
    if renormalize or (indices.shape[-1] == z_s.shape[-1] and not unlisted.any()):
        return divergence(listed, log_p, d, temperature)
    others = z_s.scatter(-1, indices, z.masked_fill(~unlisted, -math.inf)).logsumexp(-1, keepdim=True)
    return divergence(torch.cat([listed, others], -1), torch.cat([log_p, missing_mass(log_p)], -1), d)


def sampled_masses(log_p: Tensor) -> Tensor:
    """The mass that each of K sampled entries stands for: max(p, tau); log_p [C, K] -> [C, K].

    All entries with p >= tau are there; each of the others was drawn with probability p / tau. Where the c likeliest,
    of mass P_c, are there for certain, tau = (1 - P_c) / (K - c): c is the smallest number for which the next entry is
    not above it. An entry with p = 0 stands for nothing.
    """
    p, order = log_p.exp().sort(dim=-1, descending=True, stable=True)
    certain = torch.arange(p.shape[-1], device=p.device)
    tau = (1 - (p.cumsum(-1) - p)).clamp(min=0) / (p.shape[-1] - certain)
    below = p <= tau
    below[..., -1] = True  # probabilities that sum to 1 + rounding
    c = below.to(torch.uint8).argmax(-1, keepdim=True)
    masses = torch.where(certain < c, p, tau.gather(-1, c)).masked_fill(p == 0, 0)
    return torch.empty_like(masses).scatter_(-1, order, masses)


def sampled_terms(log_q: Tensor, log_p: Tensor, d: Divergence) -> tuple[Tensor, Tensor]:
    """h [C, K] and dh / dlog q [C, K], of which D = slope + sum_i p_i h_i and slope = -b log(1 - mix).

        h = a log(p / m) + b (q / p) log((1 - mix) q / m)

    D's own terms without ``slope * q``, which sums up to the slope whatever q is. So no entry has a large term: where
    q is far above p, the second one tends to -b mix / (1 - mix). A reverse KL (mix = 1) has no such bound.
    """
    x = log_q - log_p
    if d.mix in (0.0, 1.0):
        slope = torch.full_like(x, 0.0 if d.detached else -(1 - d.mix) * d.a)
        return -(1 - d.mix) * d.a * x, slope.masked_fill(log_q.isneginf(), 0)
    odds = x + (math.log1p(-d.mix) - math.log(d.mix))  # log of the student's part of m over the teacher's
    share, most = odds.sigmoid(), d.mix / (1 - d.mix)
    near = odds.clamp(-700, 36)  # fp64 has the limits beyond
    bent = most * near.exp() * logsigmoid(near)
    h = d.a * (logsigmoid(-odds) - math.log(d.mix)) + d.b * bent
    return h, d.b * bent + (0 if d.detached else (d.b * most - d.a) * share)


def sampled_divergence(z_s: Tensor, indices: Tensor, log_p: Tensor, d: Divergence) -> Tensor:
    """The divergence estimated from K sampled entries, exact in the mean over the draws; that of a token may be < 0.

        slope + sum_i max(p_i, tau) h_i

    indices, log_p [C, K]: distinct ids and log p of entries drawn as ``sampled_masses`` says. z_s [C, V] -> [C].

    Source: "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs" (arXiv 2503.16870) samples entries for
        the forward KL, with replacement; here they are distinct, and the divergence any one with a bounded h.
    """
    masses, log_q = sampled_masses(log_p), z_s.log_softmax(-1).gather(-1, indices)
    h, _ = sampled_terms(log_q, log_p, d)
    return sampled_slope(d) + torch.where(masses == 0, 0, masses * h).sum(-1)


def sampled_slope(d: Divergence) -> float:
    """What D tends to for each unit of mass that the student has where the teacher has none. Raises ValueError: it
    grows without bound, as that of a reverse KL."""
    if d.b and d.mix == 1:
        raise ValueError(
            "divergence: expected one that is bounded where the teacher has no mass, got the reverse KL, which sampled "
            "entries cannot estimate; they can kd.JSD(beta < 1) and kd.SkewReverseKL(alpha > 0)"
        )
    return -d.b * math.log1p(-d.mix) if d.b else 0.0


def candidates(z_s: Tensor, k: int) -> Tensor:
    """The student's k largest logits, largest first, ties to the smaller index; [C, V] -> indices [C, K]."""
    return z_s.sort(dim=-1, descending=True, stable=True).indices[:, :k]


# Nats below the most likely entry. Masks lie below that, fp16's lowest number -65504 included, and no real entry does.
ABSENT = 3e4


def absent(z: Tensor, top: Tensor) -> Tensor:
    """Which entries are masked, with -inf or a dtype's lowest number; z [C, K], top [C, 1] each token's largest logit.

    Where all entries of a token are masked, or one is NaN, none is called absent: the token's values must become NaN.
    """
    return z - top <= -ABSENT


def teacher_order(z_t_candidates: Tensor, top: Tensor) -> Tensor:
    """The teacher's descending order of the student's candidates, ties by the student's rank; [C, K] -> [C, K].

    Entries that the teacher masks come last, as ties. top [C]: the teacher's largest logit of all entries.
    """
    z = z_t_candidates.masked_fill(absent(z_t_candidates, top[:, None]), -math.inf)
    return z.sort(dim=-1, descending=True, stable=True).indices


def plackett_luce(ranked: Tensor) -> Tensor:
    """NLL = sum_j [logsumexp(ranked_j..ranked_k) - ranked_j]  (TSD-KD eq. 4), over the candidates that exist.

    ranked [C, K]: the student's logits of its own candidates, in the teacher's order -> [C]. Entries that the student
    masks are no candidates, wherever the teacher ranks them. Where fewer than k entries exist, their order is learnt.
    """
    return plackett_luce_with_gradient(ranked)[0]


def plackett_luce_with_gradient(ranked: Tensor) -> tuple[Tensor, Tensor]:
    """NLL [C] and its gradient [C, K], which is 0 where absent.

        dNLL/dranked_i = sum_{j <= i} exp(ranked_i - logsumexp(ranked_j..)) - 1

    exp(ranked_i) is taken out of the sum. What is left is a cumulative sum over j, so there are no [C, K, K] terms.
    """
    top = ranked.max(-1, keepdim=True).values
    gone = absent(ranked, top)
    z = (ranked - top).masked_fill(gone, -2 * ABSENT)
    tails = z.flip(-1).logcumsumexp(-1).flip(-1)  # of each candidate and all behind it
    before = (-tails).masked_fill(gone, -math.inf).logcumsumexp(-1)
    return (tails - z).masked_fill(gone, 0).sum(-1), ((z + before).exp() - 1).masked_fill(gone, 0)


def gate(entropy_s: Tensor, entropy_t: Tensor, tau: float) -> Tensor:
    """sigmoid((H_s - H_t) / tau), never differentiated  (TSD-KD eq. 11)."""
    return torch.sigmoid((entropy_s.detach() - entropy_t.detach()) / tau)


def collision(z: Tensor, k: int) -> Tensor:
    """The sum of the k largest p_i^2, not renormalised; z [C, V] -> [C]  (VCRD, appendix 10.4)."""
    return z.softmax(-1).topk(min(k, z.shape[-1])).values.square().sum(-1)


def likelihood_ratio(log_p_proposal: Tensor, collision: Tensor) -> Tensor:
    """w = exp(clip(0.5 ln w_raw, ln 0.5, ln 2)), w_raw = p(a_S) / (collision + 1e-8); [C], [C] -> [C].

    a_S is the student's argmax, p the teacher, ``collision`` the one of its 128 largest p_i  (VCRD, appendix 10.4).
    """
    log_raw = log_p_proposal.detach() - (collision.detach() + 1e-8).log()
    return (0.5 * log_raw).clamp(math.log(0.5), math.log(2.0)).exp()


def validity_weights(student: Tensor, teacher: Tensor, rule: str = "ratio") -> Tensor:
    """w from a judge's scores r_S = r(c, a_S), r_T = r(c, a_T) of both models' proposals at a prefix  (VCRD eq. 1)."""
    r_s, r_t = student.detach(), teacher.detach()
    ratio = r_s / (r_t + 1e-8)
    return {
        "ratio": ratio,
        "clamped_ratio": ratio.clamp(max=1.0),  # no amplification
        "difference": r_s - r_t,
        "student": r_s,
        "uniform": torch.ones_like(ratio),
    }[rule]


# ---- per response --------------------------------------------------------------------------------------------------


def opener(entropy_s: Tensor, share: float) -> Tensor:
    """The first m tokens, m the smallest with sum_{t <= m} H_s >= share * sum_t H_s; entropy_s [L] -> bool [L].

    Token m is included. A response without any entropy has m = 1  (TSD-KD, section 3.1).
    """
    cumulative = entropy_s.detach().double().cumsum(0)
    inside = cumulative.roll(1) < share * cumulative[-1]  # token t is in while the tokens before it fall short
    inside[0] = True
    return inside


def most_uncertain(entropy_s: Tensor, ratio: float) -> Tensor:
    """The n = max(1, floor(ratio * L + 0.5)) tokens of largest entropy, ties to the earlier; [L] -> bool [L]."""
    n = max(1, math.floor(ratio * len(entropy_s) + 0.5))
    chosen = entropy_s.detach().sort(descending=True, stable=True).indices[:n]
    return torch.zeros_like(entropy_s, dtype=torch.bool).index_fill(0, chosen, True)


def adaptive_shares(gaps: Tensor, history: Tensor, edges, shares, window: int) -> Tensor:
    """The opener's share c of each of R consecutive responses  (TSD-KD, appendix A.7).

    gaps [R] are the responses' mean(H_s - H_t), history [<= window] the gaps before them. A response's difficulty is
    the mean of its gap and the window - 1 gaps before it. Its c is the one of ``shares`` for the interval of ``edges``
    in which the difficulty lies; an edge belongs to the interval above it.
    """
    samples, chosen = history.detach().tolist(), []
    for gap in gaps.detach().tolist():
        samples = [*samples, gap][-window:]
        difficulty = sum(samples) / len(samples)
        chosen.append(shares[sum(difficulty >= edge for edge in edges)])
    return gaps.new_tensor(chosen)


# ---- objectives, one response at a time; z_s, z_t are lists of [L, V] -----------------------------------------------


def tsd_kd(
    z_s: list[Tensor],
    z_t: list[Tensor],
    beta=0.9,
    tau=1.0,
    k=10,
    opener_share: float | list[float] = 0.1,
    entropy_ratio=0.1,
    indirect_weight=0.1,
    direct_weight=1.0,
    entropy_weight=1.0,
    temperature=1.0,
) -> Tensor:
    """E over responses [ w_ind * L_ind + w_dir * L_dir + w_em * L_em ]  (TSD-KD eq. 13).

    L_dir = mean_t gate(t) JSD_beta(t);  L_ind = sum over the opener of the Plackett-Luce NLL (eq. 5);
    L_em = mean of H_s over the most uncertain tokens (eq. 12). The opener's share may differ per response (A.7).
    """
    losses = []
    shares = opener_share if isinstance(opener_share, list) else [opener_share] * len(z_s)
    for s, t, share in zip(z_s, z_t, shares, strict=True):
        h_s, h_t = entropy(s), entropy(t)
        direct = (gate(h_s, h_t, tau) * divergence(s, t, JSD(beta), temperature)).mean()
        proposed = candidates(s.detach(), k)
        order = teacher_order(t.gather(-1, proposed), t.max(-1).values)
        ranked = s.gather(-1, proposed.gather(-1, order))
        indirect = plackett_luce(ranked)[opener(h_s, share)].sum()
        uncertain = h_s[most_uncertain(h_s, entropy_ratio)].mean()
        losses.append(indirect_weight * indirect + direct_weight * direct + entropy_weight * uncertain)
    return torch.stack(losses).mean()


def gkd(z_s: list[Tensor], z_t: list[Tensor], beta=0.9, temperature=1.0) -> Tensor:
    """E over responses of mean_t JSD_beta(t)  (GKD eq. 2)."""
    return torch.stack([divergence(s, t, JSD(beta), temperature).mean() for s, t in zip(z_s, z_t, strict=True)]).mean()


def distillm2(
    z_s: list[Tensor],
    z_t: list[Tensor],
    from_teacher: list[bool],
    alpha_teacher=0.1,
    alpha_student=0.1,
    detach=False,
) -> Tensor:
    """E over responses of mean_t SKL(t) where the teacher wrote the response, mean_t SRKL(t) elsewhere (DistiLLM-2)."""
    by_author = {True: SkewKL(alpha_teacher), False: SkewReverseKL(alpha_student, detach)}
    means = [divergence(s, t, by_author[written]).mean() for s, t, written in zip(z_s, z_t, from_teacher, strict=True)]
    return torch.stack(means).mean()


def vcrd(
    z_s: list[Tensor],
    z_t: list[Tensor],
    from_teacher: list[bool],
    weights: list[Tensor] | None = None,
    alpha=0.1,
    lambda_teacher=1.0,
    lambda_student=1.0,
) -> Tensor:
    """[lambda_T sum_t w SKL over the teacher's responses + lambda_S sum_t w SRKL over the student's] / prompts.

    VCRD eqs. 2 - 4 and Algorithm 1. ``weights`` are each response's w [L]; by default w is the likelihood ratio. A
    prompt has one response by each author.
    """
    total = 0.0
    for i, (s, t, written) in enumerate(zip(z_s, z_t, from_teacher, strict=True)):
        if weights is None:
            log_p_proposal = t.log_softmax(-1).gather(-1, s.argmax(-1, keepdim=True))[:, 0]
            w = likelihood_ratio(log_p_proposal, collision(t, 128))
        else:
            w = weights[i].detach()
        d, factor = (SkewKL(alpha), lambda_teacher) if written else (SkewReverseKL(alpha), lambda_student)
        total = total + factor * (w * divergence(s, t, d)).sum()
    return total / max(sum(from_teacher), len(from_teacher) - sum(from_teacher))


def sft(z_s: list[Tensor], target: list[Tensor]) -> Tensor:
    """Mean over all tokens of -log q(target)."""
    return torch.cat([cross_entropy(s, y) for s, y in zip(z_s, target, strict=True)]).mean()
