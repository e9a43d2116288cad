"""What is evaluated and what comes of it: per-token values, the program of an objective, a call of it, its result.

A *program* (an objective, or a per-token function) says which terms each token has and with which coefficients:

    loss = sum_t sum_term coefficient[term](t) * value[term](t)

over the terms divergence, entropy, cross_entropy and plackett_luce. A program may have another divergence for responses
that the teacher wrote: these tokens come first, and the row kernels see one kind at a time.

Axes: N tokens, n tokens of a part, V vocabulary, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..divergences import Divergence
from ..kernels import Summary
from ..layout import Layout
from ..sources import Head, Logits, Source


@dataclass(eq=False)
class Tokens(Summary):
    """Per-token vectors [n]; None where the program or the inputs do not have it."""

    stats: Tensor  # [n, ...]: entropy, lse
    top_indices: Tensor  # [n, K] the student's candidates, or the first alone: argmax
    top_log_probs: Tensor | None = None  # [n, K]
    cross_entropy: Tensor | None = None  # -log q(target)
    collision: Tensor | None = None  # sum of the largest squared probabilities
    teacher: Tokens | None = None  # the teacher's entropy, lse, argmax, cross_entropy at the same positions
    at_student_argmax: Tensor | None = None  # the teacher's log p(argmax q)
    divergence: Tensor | None = None
    divergence_from_teacher: Tensor | None = None  # 0 where the student wrote, as divergence is where the teacher did
    plackett_luce: Tensor | None = None
    length: Tensor | None = None  # tokens of the token's response, where coefficients are asked of the program
    weight: Tensor | None = None  # the caller's per-token weight
    selected: dict[str, Tensor] = field(default_factory=dict)  # Program.select of these tokens


def concatenated(parts: list):
    """Consecutive tokens' tensors, dicts or Tokens as one, None where the parts are. Takes dicts and Tokens apart, so
    that no more than one tensor is there twice at a time."""
    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: concatenated([part.pop(key) for part in parts]) for key in list(first)}
    return Tokens(**concatenated([vars(part) for part in parts]))


class Program:
    """What the chunk loop asks of an objective. The defaults are a program without terms: statistics only."""

    divergence: Divergence | None = None
    divergence_from_teacher: Divergence | None = None  # a term of its own, of the responses that the teacher wrote
    temperature: float = 1.0
    topk: int = 0  # the student's candidates per token; with a teacher also its probability of the first
    plackett_luce: bool = False  # the likelihood of the teacher's order of the candidates
    collision: int = 0  # how many of the largest probabilities each side's collision sums up
    teacher_collision: int = 0  # the same of the teacher alone; all words where there are fewer
    selects: bool = False  # select() needs whole responses
    selects_by_teacher: bool = False  # ... and the teacher's entropies: one more product with its head
    all_entries: bool = False  # needs the teacher's distribution over all entries: kd.TopK will not do

    def select(self, entropy: Tensor, teacher_entropy: Tensor | None, layout: Layout) -> dict[str, Tensor]:
        """Constants [n] that depend on whole responses, from entropies [n] in ``layout``; once per response, in order.

        ``teacher_entropy`` is there for a program that ``selects_by_teacher``.
        """
        return {}

    def coefficients(self, tokens: Tokens) -> dict[str, Tensor]:
        """term -> [n]: what multiplies the term's value at each token. Constants to the gradient."""
        return {}


@dataclass(eq=False)
class Call:
    """One evaluation of a program. ``student`` and ``teacher`` hold detached tensors; [N] tensors follow ``layout``."""

    program: Program
    student: Head | Logits
    teacher: Source | None
    layout: Layout
    teacher_index: Tensor | None = None  # [N] flat positions on the teacher's side
    target: Tensor | None = None  # [N] token ids
    weight: Tensor | None = None  # [N]
    from_teacher: int = 0  # so many tokens come first that are of responses the teacher wrote
    coefficients: dict[str, Tensor] | None = None  # term -> [N]: given (or {}: none), not asked of the program
    scale: float = 1.0  # on the loss: one over what it is a mean of
    memory_budget: int | None = None
    logits_dtype: torch.dtype | None = None


@dataclass(eq=False)
class Result:
    tokens: Tokens
    coefficients: dict[str, Tensor]  # Call.scale included
    gradients: tuple[Tensor | None, ...]  # of the student's tensors
    factors: tuple[Tensor | float, ...]  # what they still have to be multiplied with: fp16 does not hold it

    @cached_property
    def terms(self) -> dict[str, Tensor]:
        """The sum of coefficient * value, in fp64; a token without a coefficient does not count, NaN or not."""
        out = {}
        for name, coefficient in self.coefficients.items():
            c = coefficient.double()
            out[name] = torch.where(c == 0, 0, c * getattr(self.tokens, name).double()).sum()
        return out

    def nonfinite(self) -> Tensor:
        """[] tokens of which a term's value or coefficient, an entropy or a likelihood of the target is not finite."""
        seen = list(self.coefficients.values())
        for side in (self.tokens, self.tokens.teacher):
            if side is not None:
                seen += [side.entropy, side.cross_entropy, side.divergence, side.divergence_from_teacher]
                seen.append(side.plackett_luce)
        return sum(~each.isfinite() for each in seen if each is not None).count_nonzero()

    def loss(self) -> Tensor:
        """The sum of all terms."""
        return sum(self.terms.values()).to(self.tokens.stats.dtype)
