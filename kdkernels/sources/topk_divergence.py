"""Divergences from a teacher known at K entries of each token.

Both distributions then have K + 1 outcomes: the K entries, and a bucket of all other entries.

The student's bucket needs care, because 1 - sum q has no correct digit where the bucket is small. So the K entries are
taken out of the row of logits: the last K columns move into their places, and the backend's statistics of the V - K
columns that remain *are* the bucket. The gradient is written over the same columns, as a softmax with the bucket's own
log-sum. Nothing cancels in it, because the K entries take no part.

Where the ranks of a group divide the vocabulary, each rank takes as many columns out of its row: first the K entries
that are its own, then any others, which stay in the bucket (``Columns``). V then are the columns of one rank.

Axes: n tokens, K entries, V vocabulary, M columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import reference
from ..divergences import Divergence
from ..kernels import Backend, Coefficients, Rows, Shards


@dataclass
class Outcomes:
    """Value [n] of the divergence and its gradient with respect to the outcomes' log-masses [n, K (+ 1)], fp64."""

    backend: Backend
    value: Tensor
    gradient: Tensor
    columns: Columns
    rest: Bucket | None  # None: there is none, or it was dropped

    def write_gradient(self, student: Rows, coefficients: Coefficients, out: Tensor) -> None:
        """See sources.Comparison; of the coefficients, the divergence's."""
        d_outcomes, columns, rest = coefficients.dense[0, :, None] * self.gradient, self.columns, self.rest
        d_columns = columns.of(d_outcomes)
        if rest is None:
            out.zero_()
        else:
            dense = rest.rows.stats.new_zeros(3, len(out))
            dense[2] = d_outcomes[:, -1] * rest.share
            nothing = rest.rows.top_values[:, :0].contiguous()
            coefficients = Coefficients(dense, columns.at[:, :0].contiguous(), nothing)
            self.backend.gradient_(rest.rows, None, None, 1.0, None, coefficients, out[:, : rest.count])
            rest.restore(out)
            if columns.mine is not None:
                d_columns += d_outcomes[:, -1:] * rest.q_columns
        columns.write(student, d_columns, out)


def _put(matrix: Tensor, columns: Tensor, values: Tensor) -> None:
    """Writes values [n, K] into matrix [n, V] at columns [n, K].

    Floats are written as integers, because scatter_ of 16-bit floats on CPUs makes an fp32 copy of the whole matrix.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.itemsize]
    matrix.view(bits).scatter_(1, columns, values.view(bits))


@dataclass
class Columns:
    """The columns [n, M] that are taken out of the student's logits, and their z in fp64.

    They are the K ids themselves where the vocabulary is not divided. Elsewhere ``mine`` says which of them are ids,
    and ``ids`` which ones: M = min(K, V) columns hold all that this rank has.
    """

    at: Tensor
    z: Tensor
    mine: Tensor | None = None
    ids: Tensor | None = None  # [n, M] into K

    @classmethod
    def found(cls, shards: Shards | None, student: Rows, ids: Tensor, z: Tensor) -> Columns:
        """Of ids [n, K], whose z is known."""
        if shards is None:
            return cls(ids, z)
        columns, mine = shards.local(ids)
        most = min(ids.shape[1], shards.count)
        mine, order = (each[:, :most] for each in mine.to(torch.uint8).sort(dim=1, descending=True, stable=True))
        columns, mine = columns.gather(1, order), mine.bool()
        # The j-th column that is no id gets the j-th of the first M columns that is no id either: there are enough.
        taken = torch.zeros((len(ids), most + 1), dtype=torch.uint8, device=ids.device)
        taken.scatter_(1, torch.where(mine & (columns < most), columns, most), 1)
        free = taken[:, :-1].sort(dim=1, stable=True).indices
        j = (torch.arange(most, device=ids.device) - mine.sum(1, keepdim=True)).clamp(min=0)
        columns = torch.where(mine, columns, free.gather(1, j))
        z = student.scale * student.logits.gather(1, columns).double()
        z = z if student.softcap is None else student.softcap * torch.tanh(z / student.softcap)
        return cls(columns, z, mine, order)

    def of(self, outcomes: Tensor) -> Tensor:
        """What the first K outcomes [n, K or more] have, at these columns; 0 where a column is no id."""
        if self.mine is None:
            return outcomes[:, : self.at.shape[1]]
        return torch.where(self.mine, outcomes.gather(1, self.ids), 0)

    def write(self, student: Rows, d_z: Tensor, out: Tensor) -> None:
        """Puts the gradient of the student's logits into out [n, V] at these columns: d_z [n, M] is that of z."""
        slope = student.scale * (1.0 if student.softcap is None else 1 - (self.z / student.softcap).square())
        _put(out, self.at, (d_z * slope).to(out.dtype))


class Bucket:
    """All entries but K of each token. Of the student's logits they are the first V - M columns, in place, and those of
    the M ``columns`` that are no ids."""

    def __init__(self, backend: Backend, student: Rows, columns: Columns):
        logits, ids = student.logits, columns.at
        self.count = count = logits.shape[1] - ids.shape[1]
        inside = ids < count
        spare = torch.where(inside, ids.shape[1], ids - count)  # which of the last K columns are ids themselves
        taken = torch.zeros((len(ids), ids.shape[1] + 1), dtype=torch.uint8, device=ids.device)
        taken = taken.scatter_(1, spare, 1)[:, :-1]
        # The j-th hole gets the j-th of those last columns that are no ids; there are as many of these as holes. The
        # pairs after them consist of ids among the last columns, which are not read.
        self.holes = ids.gather(1, inside.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices)
        self.last = count + taken.sort(dim=1, stable=True).indices
        _put(logits, self.holes, logits.gather(1, self.last))
        shards, backend = backend.shards, backend.of_own_entries
        rows = backend.statistics(logits[:, :count], student.scale, student.softcap, 1.0, 1, None)
        self.lse = rows.max.double() + rows.log_sum.double()
        empty = rows.top_values[:, 0].isneginf()  # every entry masked
        self.lse.masked_fill_(empty, -math.inf)
        # Such a bucket gets one certain entry instead: its softmax is finite, as is its product with a gradient of 0.
        logits[:, 0].masked_fill_(empty, 0)
        certain = backend.statistics(logits.new_zeros((1, 1)), student.scale, student.softcap, 1.0, 1, None)
        self.rows = replace(rows, stats=torch.where(empty[:, None], certain.stats, rows.stats))

        self.share, self.q_columns = 1.0, None  # of the bucket's mass: that of the V - M columns, those of the others
        if shards:
            of_rows, z = self.lse, columns.z.masked_fill(columns.mine, -math.inf)
            own = torch.logaddexp(of_rows, z.logsumexp(1))
            self.lse = shards.gathered(own).logsumexp(0)
            self.share, self.q_columns = _shares(of_rows, self.lse), _shares(z, self.lse[:, None])

    def restore(self, values: Tensor) -> None:
        """Moves what stands in the holes of values [n, V] back to the last columns."""
        _put(values, self.last, values.gather(1, self.holes))


def _shares(log_mass: Tensor, total: Tensor) -> Tensor:
    return torch.where(log_mass.isneginf(), 0, (log_mass - total).exp())


def _vocabulary(shards: Shards | None, student: Rows, listed: int) -> int:
    if shards is None:
        return student.logits.shape[1]
    if min(shards.sizes) <= listed < shards.vocabulary:
        raise ValueError(
            f"indices: expected at most {min(shards.sizes) - 1} entries for each token, fewer than each rank of the "
            f"student's group has ({shards.sizes}), got {listed}"
        )
    return shards.vocabulary


def divergence(
    backend: Backend,
    student: Rows,
    ids: Tensor,
    log_p: Tensor,
    divergence: Divergence,
    temperature: float,
    renormalize: bool,
) -> Outcomes:
    """``student.gathered`` begins with z at ``ids``; log_p [n, K] fp64. Uses up the student's logits."""
    z, unlisted, rest = student.gathered[:, : ids.shape[1]].double(), log_p.isneginf(), None
    columns = Columns.found(backend.shards, student, ids, z)
    outcomes, shares = z.masked_fill(unlisted, -math.inf), None
    if not renormalize:
        own = z.new_full((len(z),), -math.inf)
        if ids.shape[1] < _vocabulary(backend.shards, student, ids.shape[1]):
            rest = Bucket(backend, student, columns)
            own = rest.lse
        inside = torch.cat([z.masked_fill(~unlisted, -math.inf), own[:, None]], dim=1)
        lse = inside.logsumexp(1, keepdim=True)
        none = lse.isneginf()
        shares = (inside - lse).exp().masked_fill(none, 0)  # of the bucket's mass
        missing = reference.missing_mass(log_p)
        outcomes = torch.cat([outcomes, lse], dim=1)
        log_p = torch.cat([log_p, missing if rest else missing.masked_fill(none, -math.inf)], dim=1)
    value = reference.divergence(outcomes, log_p, divergence, temperature)
    gradient = reference.divergence_gradient(outcomes, log_p, divergence, temperature)
    if shares is not None:
        shared = gradient[:, -1:] * shares
        gradient = torch.cat([gradient[:, :-1] + shared[:, :-1], shared[:, -1:]], dim=1)
    return Outcomes(backend, value.to(student.stats.dtype), gradient, columns, rest)
