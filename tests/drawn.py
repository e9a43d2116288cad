"""Random batches as hypothesis draws them, and objectives over them judged against dense autograd.

Axes: B responses, L length, V vocabulary, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import truth
from backends import EXAMPLES, INTERPRETED
from batches import positions, random_batch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import kdkernels as kd

F64 = torch.float64


@dataclass(frozen=True)
class Shape:
    """A batch as hypothesis draws it; ``numbers`` seeds what is inside the tensors."""

    numbers: int
    rows: int
    length: int
    density: float
    layout: str  # mask, gaps, segments or teacher_mask
    vocabulary: int
    hidden: tuple[int, int]
    padding: tuple[int, int]
    bias: bool
    softcap: float | None
    scale: float
    weights: bool

    def batch(self, dtype: torch.dtype) -> truth.Batch:
        generator = torch.Generator().manual_seed(self.numbers)
        shape = (self.rows, self.length)
        mask = torch.rand(shape, generator=generator) < self.density
        if self.layout in ("mask", "teacher_mask"):  # a bool mask of one response has no gaps
            places, start = torch.arange(self.length), mask.int().argmax(1, keepdim=True)
            mask = (places >= start) & (places < start + mask.sum(1, keepdim=True))
        batch = random_batch(
            self.numbers, mask, self.vocabulary, *self.hidden, *self.padding, self.bias, self.softcap, self.scale,
            self.weights, dtype,
        )  # fmt: skip
        if self.layout == "segments":
            ids = mask * torch.randint(1, 3, shape, generator=generator)
            rows = [
                [b * self.length + t for t in range(self.length) if ids[b, t] == i]
                for b in range(self.rows)
                for i in (1, 2)
            ]
            batch.mask = kd.Layout.from_segments(ids)
            batch.responses = batch.teacher_responses = [r for r in rows if r]
        elif self.layout == "gaps":
            batch.mask = kd.Layout.from_segments(mask.long())
        elif self.layout == "teacher_mask":  # the teacher reads a longer prompt
            wide = torch.zeros(self.rows, self.length + 3, dtype=torch.bool)
            wide[:, 3:] = mask
            batch.teacher_mask, batch.teacher_responses = wide, positions(wide)
            hidden = torch.randn(self.rows, self.length + 3, self.hidden[1]).to(dtype).double()
            batch.teacher = replace(batch.teacher, hidden=hidden)
        return batch


ROWS, LENGTH, DENSITY, VOCABULARY = (1, 4), (1, 12), [0.2, 0.7, 1.0], (12, 150)
if INTERPRETED:  # a few small batches, so none with hardly a token
    ROWS, LENGTH, DENSITY, VOCABULARY = (2, 3), (4, 6), [0.7, 1.0], (12, 40)
SHAPES = st.builds(
    Shape,
    numbers=st.integers(0, 10**6),
    rows=st.integers(*ROWS),
    length=st.integers(*LENGTH),
    density=st.sampled_from(DENSITY),
    layout=st.sampled_from(["mask", "gaps", "segments", "teacher_mask"]),
    vocabulary=st.integers(*VOCABULARY),
    hidden=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    padding=st.tuples(st.sampled_from([0, 5]), st.sampled_from([0, 64])),
    bias=st.booleans(),
    softcap=st.sampled_from([None, 3.0, 30.0]),
    scale=st.sampled_from([1.0, 0.5]),
    weights=st.booleans(),
)
DRAWN = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FEW = settings(DRAWN, max_examples=min(15, EXAMPLES))


class Comparison:
    """Losses and gradients of an objective against ``dense`` in fp64, and in the objective's own dtype as yardstick.

    Whose error is the smaller in a handful of numbers is chance. Batches are therefore judged together, one after
    another of a shape, until they have 32 tokens and 256 numbers in each gradient.
    """

    MOST = 2 if INTERPRETED else 32

    def __init__(self, dtype: torch.dtype, dense: Callable[..., torch.Tensor], count: Callable[[truth.Batch], int]):
        self.dtype, self.dense, self.count, self.tokens, self.batches = dtype, dense, count, 0, 0
        self.parts: dict[str, list[tuple[torch.Tensor, ...]]] = {}

    def wants_more(self) -> bool:
        if self.dtype == F64 or self.batches == self.MOST:
            return self.batches == 0
        numbers = [sum(part[0].numel() for part in parts) for name, parts in self.parts.items() if name != "loss"]
        return self.tokens < 32 or min(numbers) < 256

    def add(self, out: kd.objectives.Output, small: truth.Batch, batch: truth.Batch, *selection):
        """``out`` was computed over ``small``, the batch in the objective's dtype."""
        got = truth.gradients(out.loss, small.student)
        assert int(out.count) == self.count(batch)
        self.tokens, self.batches = self.tokens + sum(map(len, batch.responses)), self.batches + 1
        if not batch.responses:
            assert out.loss == 0 and all((g == 0).all() for g in got)
            return
        exact, eager = self.dense(batch, *selection), self.dense(small, *selection)
        truths, yardsticks = truth.gradients(exact, batch.student), truth.gradients(eager, small.student)
        self.parts.setdefault("loss", []).append(tuple(x.detach()[None] for x in (out.loss, eager, exact)))
        for name, *part in zip(("hidden", "weight", "bias"), got, yardsticks, truths, strict=False):
            assert part[0].dtype == self.dtype
            self.parts.setdefault(f"gradient of {name}", []).append(tuple(x.flatten() for x in part))

    def judge(self):
        for name, parts in self.parts.items():
            got, eager, exact = (torch.cat(part) for part in zip(*parts, strict=True))
            if self.dtype == F64:
                assert truth.relative(got, exact) < (1e-12 if name == "loss" else 1e-10), name
            else:  # a loss is one number a batch
                truth.assert_accurate(got, eager, exact, name, self.dtype, slack=4 if name == "loss" else 1)


def responses(batch: truth.Batch) -> int:
    return len(batch.responses)


def compare(dtype: torch.dtype, shape: Shape, measure, dense, count=responses):
    """An objective over batches of a shape against dense(batch, *selection).

    ``measure(small, batch)`` is its output over ``small``, the batch in ``dtype``, and whatever it selected there.
    """
    comparison = Comparison(dtype, dense, count)
    while comparison.wants_more():
        batch = replace(shape, numbers=shape.numbers + comparison.batches).batch(dtype)
        small = batch.to(dtype)
        out, *selection = measure(small, batch)
        comparison.add(out, small, batch, *selection)
    comparison.judge()
