"""Divergences from a teacher known at K entries of each token.

Both distributions then have K + 1 outcomes: the K entries, and a bucket of all other entries.

The student's bucket needs care, because 1 - sum q has no correct digit where the bucket is small. So the K entries are
taken out of the row of logits: the last K columns move into their places, and the backend's statistics of the V - K
columns that remain *are* the bucket. The gradient is written over the same columns, as a softmax with the bucket's own
log-sum. Nothing cancels in it, because the K entries take no part.

Axes: n tokens, K entries, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import reference
from ..divergences import Divergence
from ..kernels import Backend, Coefficients, Rows


@dataclass
class Outcomes:
    """Value [n] of the divergence and its gradient with respect to the outcomes' log-masses [n, K (+ 1)], fp64."""

    backend: Backend
    value: Tensor
    gradient: Tensor
    ids: Tensor  # [n, K]
    rest: Bucket | None  # None: there is none, or it was dropped

    def write_gradient(self, student: Rows, coefficients: Coefficients, out: Tensor) -> None:
        """See sources.Comparison; of the coefficients, the divergence's."""
        d_outcomes, ids, rest = coefficients.dense[0, :, None] * self.gradient, self.ids, self.rest
        if rest is None:
            out.zero_()
        else:
            dense = rest.rows.stats.new_zeros(3, len(ids))
            dense[2] = d_outcomes[:, -1]
            nothing = rest.rows.top_values[:, :0]
            coefficients = Coefficients(dense, ids[:, :0].contiguous(), nothing.contiguous())
            self.backend.gradient_(rest.rows, None, None, 1.0, None, coefficients, out[:, : rest.count])
            rest.restore(out)
        z = student.gathered[:, : ids.shape[1]].double()
        slope = student.scale * (1.0 if student.softcap is None else 1 - (z / student.softcap).square())
        _put(out, ids, (d_outcomes[:, : ids.shape[1]] * slope).to(out.dtype))


def _put(matrix: Tensor, columns: Tensor, values: Tensor) -> None:
    """Writes values [n, K] into matrix [n, V] at columns [n, K].

    Floats are written as integers, because scatter_ of 16-bit floats on CPUs makes an fp32 copy of the whole matrix.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[matrix.itemsize]
    matrix.view(bits).scatter_(1, columns, values.view(bits))


class Bucket:
    """All entries but K of each token, as the first V - K columns of the student's logits, in place."""

    def __init__(self, backend: Backend, student: Rows, ids: Tensor):
        logits = student.logits
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
        rows = backend.statistics(logits[:, :count], student.scale, student.softcap, 1.0, 1, None)
        self.lse = rows.max.double() + rows.log_sum.double()
        empty = rows.top_values[:, 0].isneginf()  # every entry masked
        self.lse.masked_fill_(empty, -math.inf)
        # Such a bucket gets one certain entry instead: its softmax is finite, as is its product with a gradient of 0.
        logits[:, 0].masked_fill_(empty, 0)
        certain = backend.statistics(logits.new_zeros((1, 1)), student.scale, student.softcap, 1.0, 1, None)
        self.rows = replace(rows, stats=torch.where(empty[:, None], certain.stats, rows.stats))

    def restore(self, values: Tensor) -> None:
        """Moves what stands in the holes of values [n, V] back to the last columns."""
        _put(values, self.last, values.gather(1, self.holes))


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
    outcomes, shares = z.masked_fill(unlisted, -math.inf), None
    if not renormalize:
        own = z.new_full((len(z),), -math.inf)
        if ids.shape[1] < student.logits.shape[1]:
            rest = Bucket(backend, student, ids)
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
    return Outcomes(backend, value.to(student.stats.dtype), gradient, ids, rest)
