"""Heads of several models, of which each position has one: several teachers in a batch.

Axes: N tokens of a call, n tokens of a chunk, V vocabulary, H hidden; [...] leading dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ..kernels import Backend
from ..tensors import check_integral
from .base import Costs, Producer, Source, take
from .head import Head


@dataclass(frozen=True, eq=False)
class Mixed(Source):
    """At each position the distribution of one of several heads, which may have different hidden sizes and dtypes.

    Args:
        choice: [..., 1] int64 or int32, the number of the head that each position has.
        heads: all over the leading dimensions of choice; what a head has at positions of others is not read.

    Raises:
        TypeError: a head is none, or has a group.
        ValueError: leading dimensions, devices or vocabularies differ.
    """

    choice: Tensor
    heads: tuple[Head, ...]

    names = ("choice",)
    axis = "1"

    def __post_init__(self):
        check_integral("choice", self.choice)
        if self.choice.dim() < 1 or self.choice.shape[-1] != 1:
            raise ValueError(f"choice: expected shape [..., 1], got {list(self.choice.shape)}")
        first = self.heads[0] if self.heads else None
        for head in self.heads:
            if type(head) is not Head or head.group is not None:
                raise TypeError(f"heads: expected kd.Head without a group, got {type(head).__name__}")
            got = head.shape, head.device, head.vocabulary
            if got != (self.shape, self.choice.device, first.vocabulary):
                expected = [*self.shape], self.choice.device, first.vocabulary
                raise ValueError(f"heads: expected shape, device and vocabulary {expected}, got {got}")
        if first is None:
            raise ValueError("heads: expected at least one")

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (self.choice, *(tensor for head in self.heads for tensor in head.tensors))

    @property
    def dtype(self) -> torch.dtype:
        """The widest of the heads'."""
        return reduce(torch.promote_types, [head.dtype for head in self.heads])

    @property
    def vocabulary(self) -> int:
        return self.heads[0].vocabulary

    @property
    def width(self) -> int:
        """The largest H."""
        return max(head.width for head in self.heads)

    def detach(self) -> Mixed:
        return self.trusted(choice=self.choice, heads=tuple(head.detach() for head in self.heads))

    def autocast(self) -> Mixed:
        return self.trusted(choice=self.choice, heads=tuple(head.autocast() for head in self.heads))

    @property
    def numbers(self) -> list[float]:
        """Of each head how many tensors and numbers it has, and these numbers."""
        found = []
        for head in self.heads:
            tensors, _, numbers = head.pack()
            found += [len(tensors), len(numbers), *numbers]
        return found

    @classmethod
    def unpack(cls, tensors: list[Tensor], numbers: list[float]) -> Mixed:
        """The source of these tensors and numbers."""
        choice, *tensors = tensors
        heads = []
        while numbers:
            of_tensors, of_numbers = int(numbers[0]), int(numbers[1])
            heads.append(Head.unpack(tensors[:of_tensors], numbers[2 : 2 + of_numbers]))
            tensors, numbers = tensors[of_tensors:], numbers[2 + of_numbers :]
        return cls.trusted(choice=choice, heads=tuple(heads))

    def part(self, entries: slice) -> Mixed:
        """See Source.part."""
        return self.trusted(choice=self.choice, heads=tuple(head.part(entries) for head in self.heads))

    def costs(self, backend: Backend, vocabulary: int, dtype: torch.dtype, largest: int, trained: bool) -> Costs:
        """See Source.costs."""
        each = [head.costs(backend, vocabulary, dtype, largest, trained) for head in self.heads]
        return Costs(sum(one.kept for one in each), max(one.fixed for one in each), max(one.row for one in each))

    def producer(self, backend, index, vocabulary, buffer, needs=None, pieces=1) -> MixedProducer:
        """See Source.producer."""
        return MixedProducer(self, backend, index, vocabulary, buffer)


class MixedProducer(Producer):
    """Each head multiplies the runs of tokens that are its own. Which these are is read once, a sync on GPUs."""

    def __init__(self, source: Mixed, backend: Backend, index: Tensor, vocabulary: int, buffer: Tensor):
        super().__init__(backend, index, vocabulary, buffer)
        self.parts = [head.producer(backend, index, vocabulary, buffer) for head in source.heads]
        self.choice = take(source.choice, index)[:, 0].tolist()

    def fill(self, tokens: slice, logits: Tensor) -> None:
        for number, run in runs(self.choice[tokens]):
            part, out = self.parts[number], logits[run]
            own = slice(tokens.start + run.start, tokens.start + run.stop)
            part.products.project(part.hidden(own), part.weight, part.bias, out)
            if part.scale != 1:
                out.mul_(part.scale)
            if part.softcap is not None:
                out.div_(part.softcap).tanh_().mul_(part.softcap)


def runs(values: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """(value, where) of each run of equal values."""
    start = 0
    for end in range(1, len(values) + 1):
        if end == len(values) or values[end] != values[start]:
            yield values[start], slice(start, end)
            start = end
