"""The terms of a loss: one number per token each, and its gradient with respect to the student's logits.

    term              reads                                  costs                          in the gradient
    DivergenceTerm    all logits of student and teacher      sweep 2; from the second on    dD/dz
                                                             also a copy of the student's
                                                             logits and a sweep 3
    EntropyTerm       the student's entropy                  -                              dH/dz
    CrossEntropyTerm  the student's logit of the target      -                              q, and -1 at the target
    PlackettLuceTerm  both models' logits of the student's   finding these                  K numbers at their ids
                      K largest

A new term is one class here. Whatever it reads that is not always there, it says in ``needs``.

Axes: n tokens, V vocabulary, K candidates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import or_
from typing import NamedTuple

from torch import Tensor

from ..checks import check_count, check_temperature
from ..divergences import Divergence
from ..kernels import Rows, plackett_luce
from ..sources import Known, Producer, Source
from .gradient import LogitGradient
from .tokens import Tokens


class Needs(NamedTuple):
    """What is to be known of each token beyond its statistics; ``a | b`` is what both need."""

    candidates: int = 0  # the student's most probable entries, and with a teacher its probability of the first
    collision: int = 0  # how many of each model's largest probabilities its collision sums up
    teacher_collision: int = 0  # the same of the teacher alone; all entries where there are fewer
    target: bool = False  # the token that each position predicts
    teacher: bool = False  # a teacher
    all_entries: bool = False  # ... and its distribution over all entries: a kd.TopK will not do

    def __or__(self, other: Needs) -> Needs:
        return Needs(*map(max, self, other))


@dataclass(eq=False)
class View:
    """Some tokens of a chunk, as terms see them."""

    tokens: Tokens
    student: Rows
    teacher: Known | None  # what its producer gave of these tokens
    producer: Producer | None  # the teacher's
    target: Tensor | None  # [n, 1] ids inside the vocabulary
    copies: list[Tensor]  # room for copies of the student's logits [n, V]
    spare: bool  # whether a divergence may also use up the student's logits themselves

    def logits_to_use_up(self) -> Rows:
        """The student's logits for a divergence, whose gradient is written over them: copies while there are any.

        Raises:
            RuntimeError: terms ask for more than their ``divergences``.
        """
        if not self.copies:
            if not self.spare:
                raise RuntimeError("divergences: expected each term to say how many it evaluates, got one more")
            self.spare = False
            return self.student
        copy = self.copies.pop()[: len(self.student.logits)]
        return replace(self.student, logits=copy.copy_(self.student.logits))


class Evaluated(NamedTuple):
    """A term's value [n], and what adds its gradient times coefficients [n]."""

    value: Tensor
    add: Callable[[LogitGradient, Tensor], None]


class Term(ABC):
    """One number per token. A subclass is a frozen dataclass, so that two of the same options are the same term."""

    needs = Needs()
    group: str | None = None  # the group of tokens that it is a term of; None: all. Elsewhere its value is 0
    divergences = 0  # how many it evaluates, at its ``temperature``: each uses up logits (View.logits_to_use_up)

    @abstractmethod
    def evaluated(self, view: View) -> Evaluated:
        """Its value at these tokens, of which nothing is used up but ``View.logits_to_use_up``."""


@dataclass(frozen=True)
class DivergenceTerm(Term):
    """D(p, q) of teacher p and student q in nats (divergences.py); all of a loss have the same temperature."""

    divergence: Divergence
    temperature: float = 1.0
    group: str | None = None
    needs = Needs(teacher=True)
    divergences = 1

    def __post_init__(self):
        if not isinstance(self.divergence, Divergence):
            raise TypeError(f"divergence: expected one such as kd.JSD(0.9), got {self.divergence!r}")
        check_temperature(self.temperature)

    def evaluated(self, view: View) -> Evaluated:
        rows = view.logits_to_use_up()
        compared = view.producer.divergence(rows, view.teacher, self.divergence, self.temperature)
        return Evaluated(compared.value, lambda gradient, c: gradient.add_divergence(compared, rows, c))


@dataclass(frozen=True)
class EntropyTerm(Term):
    """H(q) = -sum_v q_v log q_v in nats."""

    group: str | None = None

    def evaluated(self, view: View) -> Evaluated:
        return Evaluated(view.tokens.entropy, LogitGradient.add_entropy)


@dataclass(frozen=True)
class CrossEntropyTerm(Term):
    """-log q(target) in nats."""

    group: str | None = None
    needs = Needs(target=True)

    def evaluated(self, view: View) -> Evaluated:
        def add(gradient: LogitGradient, c: Tensor) -> None:
            gradient.add_softmax(c)
            gradient.add_entries(view.target, -c[:, None])

        return Evaluated(view.tokens.cross_entropy, add)


@dataclass(frozen=True)
class PlackettLuceTerm(Term):
    """NLL of the teacher's order of the student's k most probable entries (TSD-KD eq. 4)."""

    k: int
    group: str | None = None

    def __post_init__(self):
        check_count("k", self.k, 1)

    @property
    def needs(self) -> Needs:
        return Needs(candidates=self.k, teacher=True, all_entries=True)

    def evaluated(self, view: View) -> Evaluated:
        student, teacher = view.student, view.teacher
        value, slope = plackett_luce(student.top_values[:, : self.k], teacher.gathered[:, : self.k], teacher.max)
        ids = view.tokens.top_indices[:, : self.k]
        return Evaluated(value, lambda gradient, c: gradient.add_entries(ids, c[:, None].to(slope.dtype) * slope))


class Group(NamedTuple):
    """The terms of the tokens of a group."""

    by_name: dict[str, Term]
    divergences: int  # how many they evaluate
    others: bool  # whether some evaluate none

    def copies(self, teacher: Source | None) -> int:
        """Copies of the student's logits that the divergences use up. One may use up the logits themselves, unless
        other terms share these with a teacher that knows K entries (sources.Comparison)."""
        return max(0, self.divergences - (teacher.complete or not self.others)) if self.divergences else 0


class Terms:
    """The terms of a loss by name, and what they need together with what else ``reads`` asks for.

    Raises:
        TypeError: something else than terms by name.
        ValueError: divergences of several temperatures: the statistics of a token hold one.
    """

    def __init__(self, terms: Mapping[str, Term], reads: Needs):
        _check_terms(terms)
        self.by_name = dict(terms)
        self.needs = reduce(or_, [term.needs for term in terms.values()], reads)
        temperatures = {term.temperature for term in terms.values() if term.divergences}
        if len(temperatures) > 1:
            raise ValueError(
                f"temperature: expected the same for all divergences of a loss, got {sorted(temperatures)}"
            )
        self.has_divergence = bool(temperatures)
        self.temperature = temperatures.pop() if temperatures else 1.0
        self._groups: dict[str | None, Group] = {}

    def of(self, group: str | None) -> Group:
        """Those of the tokens of a group."""
        if group not in self._groups:
            of = {name: term for name, term in self.by_name.items() if term.group is None or term.group == group}
            each = [term.divergences for term in of.values()]
            self._groups[group] = Group(of, sum(each), 0 in each)
        return self._groups[group]


def _check_terms(terms: object) -> None:
    if not isinstance(terms, Mapping):
        raise TypeError(f"terms: expected a dict of terms by name, got {terms!r}")
    for name, term in terms.items():
        if not isinstance(term, Term):
            raise TypeError(f"terms: expected a term such as DivergenceTerm(kd.JSD(0.9)) for {name!r}, got {term!r}")
