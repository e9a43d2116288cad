"""What is evaluated and what comes of it: the program of an objective, a call of it, its result.

A *program* (an objective, or a per-token function) has terms (terms.py) by name and says with which coefficients they
count at each token:

    loss = sum_t sum_name coefficient[name](t) * terms[name](t)

Axes: N tokens, n tokens of a part, V vocabulary, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..layout import Layout
from ..sources import Source
from .terms import Needs, Term, Terms
from .tokens import Tokens


class Program:
    """What the chunk loop asks of an objective. The defaults are a program without terms: statistics only."""

    terms: Mapping[str, Term] = {}  # an attribute or a property; read once per call
    reads: Needs = Needs()  # what select and coefficients read, beyond what the terms need
    selects: bool = False  # select() needs whole responses
    selects_by_teacher: bool = False  # ... and the statistics of a teacher of all entries: one more product

    def current_terms(self) -> Terms:
        """The terms as they are now, with what is to be known of each token."""
        reads = self.reads | Needs(teacher=True, all_entries=True) if self.selects_by_teacher else self.reads
        return Terms(self.terms, reads)

    @property
    def needs(self) -> Needs:
        """What is to be known of each token."""
        return self.current_terms().needs

    def select(self, tokens: Tokens, layout: Layout) -> dict[str, Tensor]:
        """Constants [n] that depend on whole responses, from the statistics of the tokens in ``layout``; once per
        response, in order. ``tokens.teacher`` is there for a program that ``selects_by_teacher``."""
        return {}

    def coefficients(self, tokens: Tokens) -> dict[str, Tensor]:
        """For each of ``terms`` [n]: what multiplies its value at each token in the loss of the token's response.
        Constants to the gradient."""
        return {}


@dataclass(eq=False)
class Call:
    """One evaluation of a program. ``student`` and ``teacher`` hold detached tensors; [N] tensors follow ``layout``."""

    program: Program
    terms: Terms  # the program's, at the time of the call
    selects: bool  # likewise
    student: Source
    teacher: Source | None
    layout: Layout
    teacher_index: Tensor | None = None  # [N] flat positions in the teacher's leading dimensions
    target: Tensor | None = None  # [N] token ids
    weight: Tensor | None = None  # [N]
    groups: tuple[tuple[str, int], ...] = ()  # names of the groups that the tokens come in, and their tokens
    coefficients: dict[str, Tensor] | None = None  # by term, [N]: given (or {}: none), not asked of the program
    scale: float | Tensor = 1.0  # on the loss: one over what it is a mean of; a tensor [] on the student's device
    by_length: bool = False  # a response counts once for each of its tokens, not once
    memory_budget: int | None = None
    logits_dtype: torch.dtype | None = None


@dataclass(eq=False)
class Result:
    tokens: Tokens
    coefficients: dict[str, Tensor]  # by term; Call.scale and what a response counts included
    gradients: tuple[Tensor | None, ...]  # of the student's tensors
    factors: tuple[Tensor | float, ...]  # what they still have to be multiplied with: fp16 does not hold it

    @cached_property
    def terms(self) -> dict[str, Tensor]:
        """The sum of coefficient * value, in fp64; a token without a coefficient does not count, NaN or not."""
        out = {}
        for name, coefficient in self.coefficients.items():
            each = coefficient.double() * self.tokens.values[name].double()
            out[name] = each.masked_fill_(coefficient == 0, 0).sum()
        return out

    def nonfinite(self) -> Tensor:
        """[] tokens of which a term's value or coefficient, an entropy or a likelihood of the target is not finite."""
        seen = [*self.coefficients.values(), *self.tokens.values.values()]
        for known in (self.tokens, self.tokens.teacher):
            if known is not None:
                seen += [known.entropy, known.cross_entropy]
        zeros = torch.stack([each for each in seen if each is not None]).mul_(0)  # NaN where it is not finite
        return zeros.sum(0).isnan().sum()

    def loss(self) -> Tensor:
        """The sum of all terms."""
        return sum(self.terms.values()).to(self.tokens.stats.dtype)  # a new one: terms are metrics, without graph
