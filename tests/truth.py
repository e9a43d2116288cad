"""What the engine is compared with: dense PyTorch and its autograd, from the papers' formulas, in any dtype.

In fp64 it is the truth; in the engine's own dtype it is the yardstick. Axes: N tokens, V vocabulary, H hidden,
K candidates, B rows, L length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import kdkernels as kd

# ---- the error rule --------------------------------------------------------------------------------------------------


def relative(x: Tensor, truth: Tensor) -> float:
    """|x - truth| / |truth|."""
    assert x.shape == truth.shape, f"shape {list(x.shape)} instead of {list(truth.shape)}"
    return float((x.double() - truth.double()).norm() / truth.double().norm())


def assert_accurate(got: Tensor, eager: Tensor, truth: Tensor, what: str, dtype: torch.dtype | None = None, slack=1):
    """Norm-relative error at most twice that of eager PyTorch in the same dtype, or 4 ulp; ``slack`` times that."""
    assert truth.norm() > 0, f"{what}: a truth of zero proves nothing"
    error, yardstick = relative(got, truth), relative(eager, truth)
    allowed = slack * max(2 * yardstick, 4 * torch.finfo(dtype or got.dtype).eps)
    assert error <= allowed, f"{what}: error {error:.3g}, eager PyTorch {yardstick:.3g}, allowed {allowed:.3g}"


# ---- per token -------------------------------------------------------------------------------------------------------


def dense_logits(head: kd.Head, vocabulary: int) -> Tensor:
    z = torch.nn.functional.linear(head.hidden, head.weight, head.bias)[..., :vocabulary] * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def entropy(z: Tensor) -> Tensor:
    log_q = z.log_softmax(-1)
    return -(log_q.exp() * log_q).sum(-1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def mixture(log_a: Tensor, log_b: Tensor, share: float) -> Tensor:
    return torch.logaddexp(log_a + math.log(share), log_b + math.log(1 - share))


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """GKD's convention; p, q log-probabilities."""
    if beta in (0, 1):
        return kl(q, p) if beta else kl(p, q)
    m = mixture(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


# name -> (the library's divergence, the formula on log-probabilities p, q)
DIVERGENCES = {
    "forward": (kd.ForwardKL(), kl),
    "reverse": (kd.ReverseKL(), lambda p, q: kl(q, p)),
    "jsd.1": (kd.JSD(0.1), lambda p, q: jsd(p, q, 0.1)),
    "jsd.5": (kd.JSD(0.5), lambda p, q: jsd(p, q, 0.5)),
    "jsd.9": (kd.JSD(0.9), lambda p, q: jsd(p, q, 0.9)),
    "jsd0": (kd.JSD(0.0), kl),
    "jsd1": (kd.JSD(1.0), lambda p, q: kl(q, p)),
    "skl": (kd.SkewKL(0.1), lambda p, q: kl(p, mixture(p, q, 0.1))),
    "srkl": (kd.SkewReverseKL(0.1), lambda p, q: kl(q, mixture(p, q, 0.9))),
}


def divergence(z_s: Tensor, z_t: Tensor, name: str, temperature: float = 1.0) -> Tensor:
    return DIVERGENCES[name][1]((z_t / temperature).log_softmax(-1), (z_s / temperature).log_softmax(-1))


def cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    return -z.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def plackett_luce(ranked: Tensor) -> Tensor:
    """ranked [N, K]: the student's logits of the candidates in the teacher's order."""
    return sum(ranked[:, j:].logsumexp(-1) - ranked[:, j] for j in range(ranked.shape[1]))


# ---- objectives ------------------------------------------------------------------------------------------------------


@dataclass
class Selection:
    """What TSD-KD selects: candidates [N, K] in the teacher's order, tokens of the openers and most uncertain ones."""

    ranked: Tensor
    opener: Tensor
    uncertain: Tensor


@dataclass
class Batch:
    """Heads over [B, L, H] and what goes with them; ``responses`` are lists of flat positions, per model."""

    student: kd.Head
    teacher: kd.Head
    mask: Tensor | kd.Layout
    responses: list[list[int]]
    teacher_mask: Tensor | None
    teacher_responses: list[list[int]]
    target: Tensor
    weights: Tensor | None
    from_teacher: Tensor  # [B]

    def to(self, dtype: torch.dtype) -> Batch:
        weights = None if self.weights is None else self.weights.to(torch.promote_types(dtype, torch.float32))
        return replace(self, student=to(self.student, dtype), teacher=to(self.teacher, dtype), weights=weights)

    @property
    def vocabulary(self) -> int:
        return min(self.student.vocabulary, self.teacher.vocabulary)

    @property
    def written(self) -> list[bool]:
        """Whether the teacher wrote each response."""
        length = self.student.hidden.shape[1]
        return [bool(self.from_teacher[r[0] // length]) for r in self.responses]

    @property
    def prompts(self) -> int:
        return max(self.written.count(True), self.written.count(False))


def to(head: kd.Head, dtype: torch.dtype) -> kd.Head:
    """The same numbers in another dtype, as leaves of their own."""

    def leaf(t):
        return None if t is None else t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)

    return replace(head, hidden=leaf(head.hidden), weight=leaf(head.weight), bias=leaf(head.bias))


def leaves(head: kd.Head) -> list[Tensor]:
    return [t for t in (head.hidden, head.weight, head.bias) if t is not None and t.requires_grad]


def gradients(loss: Tensor, head: kd.Head) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves(head)))


def token_logits(batch: Batch) -> tuple[Tensor, Tensor]:
    """z_s, z_t [N, V] of the response tokens, response by response."""
    index = torch.tensor([i for r in batch.responses for i in r], dtype=torch.int64)
    teacher_index = torch.tensor([i for r in batch.teacher_responses for i in r], dtype=torch.int64)
    student = replace(batch.student, hidden=batch.student.hidden.flatten(0, -2)[index])
    teacher = replace(batch.teacher, hidden=batch.teacher.hidden.detach().flatten(0, -2)[teacher_index])
    return dense_logits(student, batch.vocabulary), dense_logits(teacher, batch.vocabulary).detach()


def token_weights(batch: Batch, z: Tensor) -> Tensor:
    if batch.weights is None:
        return z.new_ones(len(z))
    index = torch.tensor([i for r in batch.responses for i in r], dtype=torch.int64)
    return batch.weights.flatten()[index]


def slices(batch: Batch) -> list[slice]:
    ends = torch.tensor([0] + [len(r) for r in batch.responses]).cumsum(0).tolist()
    return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]


def select(batch: Batch, k: int, opener: float, ratio: float) -> Selection:
    """The selection by the rules as the paper states them, one token at a time."""
    with torch.no_grad():
        z_s, z_t = token_logits(batch)
        h = entropy(z_s).tolist()
    ranked = []
    for s, t in zip(z_s.tolist(), z_t.tolist(), strict=True):
        proposed = sorted(range(len(s)), key=lambda v: -s[v])[:k]
        ranked.append(sorted(proposed, key=lambda v: -t[v]))
    in_opener, uncertain = torch.zeros(len(h), dtype=torch.bool), torch.zeros(len(h), dtype=torch.bool)
    for r in slices(batch):
        here, total = h[r], sum(h[r])
        m = next((i + 1 for i in range(len(here)) if sum(here[: i + 1]) >= opener * total), len(here))
        in_opener[r.start : r.start + m] = True
        n = max(1, math.floor(ratio * len(here) + 0.5))
        for i in sorted(range(len(here)), key=lambda i: -here[i])[:n]:
            uncertain[r.start + i] = True
    return Selection(torch.tensor(ranked, dtype=torch.int64).view(-1, k), in_opener, uncertain)


def tsd_kd(
    batch: Batch,
    selection: Selection,
    beta=0.9,
    tau=1.0,
    temperature=1.0,
    indirect_weight=0.1,
    direct_weight=1.0,
    entropy_weight=1.0,
) -> dict[str, Tensor]:
    """The three terms of eq. 13 as they enter the loss, which is their sum."""
    z_s, z_t = token_logits(batch)
    w, h_s = token_weights(batch, z_s), entropy(z_s)
    gate = torch.sigmoid((h_s.detach() - entropy(z_t)) / tau)
    d = jsd((z_t / temperature).log_softmax(-1), (z_s / temperature).log_softmax(-1), beta) * gate * w
    pl = plackett_luce(z_s.gather(-1, selection.ranked)) * w
    h_s = h_s * w
    parts = slices(batch)
    direct = sum(d[r].mean() for r in parts)
    indirect = sum(pl[r][selection.opener[r]].sum() for r in parts)
    uncertain = sum(h_s[r][selection.uncertain[r]].mean() for r in parts)
    scaled = {
        "direct": direct_weight * direct,
        "indirect": indirect_weight * indirect,
        "entropy_minimisation": entropy_weight * uncertain,
    }
    return {name: term / len(parts) for name, term in scaled.items()}


def gkd(batch: Batch, beta=0.9, temperature=1.0) -> Tensor:
    z_s, z_t = token_logits(batch)
    d = jsd((z_t / temperature).log_softmax(-1), (z_s / temperature).log_softmax(-1), beta) * token_weights(batch, z_s)
    return torch.stack([d[r].mean() for r in slices(batch)]).mean()


def by_author(batch: Batch, alpha_teacher: float, alpha_student: float, detach: bool = False) -> list[Tensor]:
    """Each response's SKL [L] where the teacher wrote it, its SRKL [L] elsewhere."""
    z_s, z_t = token_logits(batch)
    q, p, out = z_s.log_softmax(-1), z_t.log_softmax(-1), []
    for r, written in zip(slices(batch), batch.written, strict=True):
        if written:
            out.append(kl(p[r], mixture(p[r], q[r], alpha_teacher) if alpha_teacher else q[r]))
        else:
            m = mixture(q[r], p[r], alpha_student) if alpha_student else p[r]
            out.append(kl(q[r], m.detach() if detach else m))
    return out


def distillm2(batch: Batch, alpha_teacher=0.1, alpha_student=0.1, detach=False) -> Tensor:
    values = by_author(batch, alpha_teacher, alpha_student, detach)
    w = token_weights(batch, torch.cat(values))
    return torch.stack([(w[r] * d).mean() for r, d in zip(slices(batch), values, strict=True)]).mean()


def vcrd_weight(z_t: Tensor, proposal: Tensor) -> Tensor:
    """w [N] of the student's proposals [N], token by token as the paper states it."""
    out = []
    for p, a in zip(z_t.softmax(-1), proposal.tolist(), strict=True):
        collision = sum(x * x for x in sorted(p.tolist(), reverse=True)[:128])
        raw = float(p[a]) / (collision + 1e-8)
        out.append(math.exp(min(max(0.5 * math.log(raw), math.log(0.5)), math.log(2.0))) if raw > 0 else 0.5)
    return z_t.new_tensor(out)


def vcrd(
    batch: Batch, proposal: Tensor | None = None, alpha=0.1, lambda_teacher=1.0, lambda_student=1.0, means=False
) -> Tensor:
    """With the students' proposals [N] the likelihood-ratio weights, on top of the caller's."""
    values = by_author(batch, alpha, alpha)
    w = token_weights(batch, torch.cat(values))
    if proposal is not None:
        w = w * vcrd_weight(token_logits(batch)[1], proposal)
    total = 0.0
    for r, d, written in zip(slices(batch), values, batch.written, strict=True):
        term = (w[r] * d).mean() if means else (w[r] * d).sum()
        total = total + (lambda_teacher if written else lambda_student) * term
    return total / (len(values) if means else batch.prompts)


def sft(batch: Batch) -> Tensor:
    index = torch.tensor([i for r in batch.responses for i in r], dtype=torch.int64)
    student = replace(batch.student, hidden=batch.student.hidden.flatten(0, -2)[index])
    z = dense_logits(student, student.vocabulary)
    return (cross_entropy(z, batch.target.flatten()[index]) * token_weights(batch, z)).mean()
