"""What row kernels take and give, and what a backend has to implement.

A row is the logits of one token over the vocabulary, or over a part of it. Kernels go over the rows of a chunk in three
sweeps: statistics, divergence, gradient.

Axes: C tokens of a chunk, V vocabulary, H hidden, K candidates, J or S ids per token.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..compute import gemm
from ..divergences import Divergence

if TYPE_CHECKING:
    from .divided import Shards

STATS = 7  # numbers of a row, see Rows
SUMS = 5  # likewise, see Backend.divergence_sums


class Summary:
    """What ``stats`` and ``top_indices`` (see Rows) say about each token."""

    stats: Tensor
    top_indices: Tensor

    @property
    def max(self) -> Tensor:
        return self.stats[:, 0]

    @property
    def log_sum(self) -> Tensor:
        return self.stats[:, 1]

    @property
    def entropy(self) -> Tensor:
        return self.stats[:, 2]

    @property
    def lse(self) -> Tensor:
        return self.max + self.log_sum

    @property
    def argmax(self) -> Tensor:
        return self.top_indices[:, 0]

    def log_prob(self, z: Tensor) -> Tensor:
        """log-probabilities of logits z [C, J] of these tokens."""
        return (z - self.stats[:, :1]) - self.stats[:, 1:2]


@dataclass(eq=False)
class Rows(Summary):
    """The logits of a chunk with their statistics; ``rows[a:b]`` are those of tokens a to b.

    ``logits`` [C, V] is what the lm_head GEMM wrote. Everything is computed from z = softcap * tanh(scale * logits /
    softcap), or z = scale * logits without a soft-cap. ``stats`` [C, STATS] is float32, or float64 of float64 logits:

        0  max z
        1  log sum exp(z - max)
        2  entropy (nats)
        3  log sum exp((z - max) / temperature)
        4  sum exp(z - max)
        5  sum exp((z - max) / temperature)
        6  E_q[z - max]

    Columns 0 and 1 are kept apart because their rounded sum loses the entropy at |z| ~ 1e4. Columns 4 and 5 are there
    because from a rounded logarithm of 10, every probability would be off by 4 ulp.

    A row whose entries are all masked (-inf) has no distribution: its columns are NaN, except that the sums 4 and 5
    are 0. A row with a NaN has NaN there too. Columns 0, 4, 5 and 6 of the parts of a vocabulary give those of the
    whole (``merged``).
    """

    logits: Tensor
    scale: float
    softcap: float | None
    stats: Tensor
    top_values: Tensor  # [C, K] largest z, descending, ties to the smaller index; K >= 1
    top_indices: Tensor  # [C, K]
    gathered: Tensor | None  # [C, J] z at the ids asked for

    @classmethod
    def empty(cls, logits: Tensor, scale: float, softcap: float | None, topk: int, gather: Tensor | None) -> Rows:
        """The rows of ``logits`` with uninitialised statistics, which a backend then writes."""
        count, dtype = len(logits), torch.float64 if logits.dtype == torch.float64 else torch.float32
        stats = logits.new_empty((count, STATS), dtype=dtype)
        values, indices = stats.new_empty(count, topk), stats.new_empty((count, topk), dtype=torch.int64)
        return cls(
            logits, scale, softcap, stats, values, indices, None if gather is None else stats.new_empty(gather.shape)
        )

    def __getitem__(self, tokens: slice) -> Rows:
        if tokens == slice(0, self.stats.shape[0]):
            return self
        gathered = None if self.gathered is None else self.gathered[tokens]
        stats, values, indices = self.stats[tokens], self.top_values[tokens], self.top_indices[tokens]
        return Rows(self.logits[tokens], self.scale, self.softcap, stats, values, indices, gathered)


def merged(parts: Tensor, temperature: float) -> Tensor:
    """The statistics [C, STATS] of a whole vocabulary, from those [parts, C, STATS] of its parts at this temperature.

    A part in which every entry of a row is masked contributes nothing. A row that is masked in all parts has the
    statistics of such a row.
    """
    stats = parts.double()
    masked = stats[..., 4] == 0
    maxima = stats[..., 0].masked_fill(masked, -torch.inf)
    highest = maxima.amax(0)
    behind = maxima - highest
    totals = stats[..., 4] * behind.exp()
    total, tempered = totals.sum(0), (stats[..., 5] * (behind / temperature).exp()).sum(0)
    mean = (stats[..., 6] + behind).masked_fill(masked, 0).mul(totals).sum(0) / total
    log_sum = total.log()
    out = torch.stack([highest, log_sum, log_sum - mean, tempered.log(), total, tempered, mean], dim=1)
    return torch.where(masked.all(0)[:, None], stats[0], out).to(parts.dtype)


def finished(parts: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The divergence [C] of each token in ``dtype``, and its sums [C, SUMS] over the whole vocabulary, which
    ``Backend.gradient_`` takes.

    ``parts`` are the sums over each part of the vocabulary (``Backend.divergence_sums``): one, where it is not divided.
    """
    sums = functools.reduce(torch.add, parts)
    value = sums.select(1, 0)
    return value.float() if dtype == torch.float32 else value.clone(), sums  # a view would keep all of the sums


@dataclass(eq=False)
class Coefficients:
    """What each token's gradients are multiplied with, and what is added to them:

        d loss / dz = divergence * dD/dz + entropy * dH/dz + softmax * q + (scatter at ids)

    ``dense`` [3, C] holds the numbers divergence, entropy and softmax of each token. ``scatter`` [C, S] is added at the
    entries ``ids`` [C, S]: the -1 at the target of a cross-entropy, the gradient of Plackett-Luce at the candidates.
    """

    dense: Tensor
    ids: Tensor
    scatter: Tensor


class Request(NamedTuple):
    """The device and dtypes that a backend is asked to compute with."""

    device: str  # the type of a torch.device: cpu, cuda, ...
    logits: torch.dtype
    operand: torch.dtype  # of hidden states and weights, and so of gradients; that of logits or a narrower one


def refused_dtype(request: Request, computes: Callable[[torch.dtype], bool]) -> str:
    """Why a backend that ``computes`` with some dtypes alone refuses; empty if it does not."""
    for what, dtype in (("logits", request.logits), ("gradients", request.operand)):  # gradients are of operands
        if not computes(dtype):
            return f"it does not compute with {dtype} {what}"
    return ""


class Backend(ABC):
    """The row kernels for one type of device. They know rows and coefficients, but no sources and no objectives.

    A backend is one object, which registry.py lists. Everybody else uses these methods alone.
    """

    name: ClassVar[str]  # its name in KDKERNELS_BACKEND and kd.info()
    shards: Shards | None = None  # which entries each rank has, where a group divides the vocabulary (divided.py)

    @property
    def of_own_entries(self) -> Backend:
        """The same kernels over this rank's entries alone, where a group divides the vocabulary."""
        return self

    @abstractmethod
    def refusal(self, request: Request) -> str:
        """Why it cannot compute this; empty if it can. registry.py has checked that it runs on the device."""

    @abstractmethod
    def workspace(self, rows: int, vocabulary: int) -> int:
        """Bytes that it allocates at most, beside its outputs, for so many rows of logits."""

    @abstractmethod
    def statistics(
        self, logits: Tensor, scale: float, softcap: float | None, temperature: float, topk: int, gather: Tensor | None
    ) -> Rows:
        """Sweep 1: the statistics of logits [C, V], the ``topk`` >= 1 largest z, and z at the ids ``gather`` [C, J]."""

    def project(
        self,
        products: gemm.Torch,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        logits: Tensor,
        scale: float,
        softcap: float | None,
        temperature: float,
        topk: int,
        gather: Tensor | None,
    ) -> Rows:
        """Writes logits [C, V] = hidden [C, H] @ weight [V, H].T + bias [V], and returns their statistics.

        It is one call so that a backend may compute statistics while it multiplies. Here they are computed afterwards.
        """
        products.project(hidden, weight, bias, logits)
        return self.statistics(logits, scale, softcap, temperature, topk, gather)

    @abstractmethod
    def divergence_sums(self, student: Rows, teacher: Rows, divergence: Divergence, temperature: float) -> Tensor:
        """Sweep 2: sums [C, SUMS] over the entries of each row, in float64, with p and q at the temperature:

            0  the divergence: a p log(p/m) + b q log(q/m)
            1  b q log(q/m)
            2  q (q - p) / m
            3  q p / m
            4  q

        Columns 1 to 3 divided by column 4 are the means with which the gradient is centred. A backend may leave out
        those that its ``gradient_`` does not need, and multiply columns 1 to 4 by one factor, which cancels there.

        Where the logits are a part of the vocabulary, the statistics of both rows are those of the whole (``merged``).
        The sums of all parts, added, are then those of the whole: see ``finished``.
        """

    def divergence(
        self, student: Rows, teacher: Rows, divergence: Divergence, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Sweep 2 of a whole vocabulary: the divergence [C] of each token, and its sums, for ``gradient_``."""
        return finished([self.divergence_sums(student, teacher, divergence, temperature)], student.stats.dtype)

    @abstractmethod
    def gradient_(
        self,
        student: Rows,
        teacher: Rows | None,
        divergence: Divergence | None,
        temperature: float,
        sums: Tensor | None,
        coefficients: Coefficients,
        out: Tensor,
    ) -> None:
        """Sweep 3: the gradient of all terms (``Coefficients``) with respect to the student's logits.

        Args:
            student: rows whose logits are overwritten.
            teacher, divergence, sums: what ``divergence`` was given and returned; None without a divergence.
            temperature: that of the divergence. Entropy and softmax are at 1.
            coefficients: of the terms.
            out: [C, V] in the operands' dtype, over the student's logits: each of its rows begins where theirs does.

        Where the logits are a part of the vocabulary, ``sums`` and the statistics of both rows are those of the whole.
        """

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        """gradient *= factor, a tensor [] on its device; multiplied in at least fp32, then rounded."""
        gradient.mul_(factor[None])  # a factor without dimensions would be rounded to the gradient's dtype first

    def traits(self) -> frozenset[str]:
        """What decides whose matrix products are used on this CPU (gemm.who_multiplies); empty without its own."""
        return frozenset()

    def isa(self) -> str | None:
        """The instruction set that it uses, if it was compiled for several."""
        return None

    def products(self, device: torch.device, operand: torch.dtype) -> gemm.Torch:
        """Whose matrix products are used for operands of this dtype."""
        return gemm.products(self.traits(), device, operand)
