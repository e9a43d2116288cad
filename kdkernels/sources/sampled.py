"""Entries that a teacher draws, and divergences estimated from them.

Of a token, all entries with p >= tau are there, and each of the others with probability p / tau, where tau makes K
entries of them. A drawn entry stands for the mass tau, so that any sum over the vocabulary that the teacher weights
with p has its exact value in the mean over the draws (reference.sampled_masses, reference.sampled_divergence).

Axes: N tokens, n tokens of a part, K entries, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import reference
from ..compute import memory
from ..divergences import Divergence
from ..kernels import Backend, Coefficients, Rows, backend_for
from .base import Source
from .topk_divergence import Columns

_BYTES = 1 << 24  # of fp32 logits at a time, beside which eight times as much is needed


@dataclass
class Estimate:
    """Value [n] of the divergence, and mass_i h'_i [n, K] in fp64."""

    backend: Backend
    value: Tensor
    gradient: Tensor
    columns: Columns

    def write_gradient(self, student: Rows, coefficients: Coefficients, out: Tensor) -> None:
        """See sources.Comparison; of the coefficients, the divergence's.

        dD/dz_i = [i drawn] mass_i h'_i - q_i sum_j mass_j h'_j, in fp64 where i is drawn: there the two nearly cancel.
        """
        columns, at_ids = self.columns, coefficients.dense[0, :, None] * self.gradient
        total = at_ids.sum(1)
        dense = torch.zeros_like(coefficients.dense)
        dense[2] = -total
        no_ids = Coefficients(dense, columns.at[:, :0].contiguous(), dense.new_zeros(len(total), 0))
        q = _log_q(student, columns.z).exp()
        self.backend.gradient_(student, None, None, 1.0, None, no_ids, out)
        columns.write(student, columns.of(at_ids) - total[:, None] * q, out)


def divergence(backend: Backend, student: Rows, ids: Tensor, log_p: Tensor, divergence: Divergence) -> Estimate:
    """``student.gathered`` begins with z at ``ids``; log_p [n, K] fp64. Leaves the student's logits as they are."""
    z = student.gathered[:, : ids.shape[1]].double()
    h, slope = reference.sampled_terms(_log_q(student, z), log_p, divergence)
    masses = reference.sampled_masses(log_p)
    value = reference.sampled_slope(divergence) + _product(masses, h).sum(1)
    columns = Columns.found(backend.shards, student, ids, z)
    return Estimate(backend, value.to(student.stats.dtype), _product(masses, slope), columns)


def _log_q(student: Rows, z: Tensor) -> Tensor:
    return z - student.max[:, None].double() - student.log_sum[:, None].double()


def _product(masses: Tensor, values: Tensor) -> Tensor:
    return torch.where(masses == 0, 0, masses * values)


def draw(teacher: Source, index: Tensor, k: int, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """ids [N, K] int64 and log p [N, K] of the entries that the teacher draws at flat positions ``index`` [N].

    Systematic sampling: the entries lie side by side on a line, each as long as it is probable, and are those under K
    points at equal distances, of which ``offsets`` [N] in [0, 1) says where the first one is.
    """
    dtype = torch.promote_types(teacher.dtype, torch.float32)
    vocabulary = teacher.vocabulary
    size = max(1, min(len(index), _BYTES // (vocabulary * dtype.itemsize)))
    (buffer,) = memory.matrices([((size, vocabulary), dtype)], teacher.device)
    backend = backend_for(teacher.device, dtype, teacher.dtype)
    producer = teacher.producer(backend, index, vocabulary, buffer)
    found = [
        _drawn(producer.rows(slice(start, min(start + size, len(index))), 1.0, k, None), offsets[start : start + size])
        for start in range(0, len(index), size)
    ]
    none = index.new_empty(0, k), index.new_empty(0, k, dtype=torch.float64)
    return tuple(map(torch.cat, zip(none, *found, strict=True)))


def _drawn(rows: Rows, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows of one part."""
    top, k = rows.top_indices, rows.top_indices.shape[1]
    z = rows.scale * rows.logits.double()
    z = z if rows.softcap is None else rows.softcap * torch.tanh(z / rows.softcap)
    log_p = z.log_softmax(-1)
    p, at = log_p.exp(), torch.arange(k, device=top.device)
    largest = p.gather(1, top)
    others = p.scatter(1, top, 0)
    left = largest.flip(1).cumsum(1).flip(1) + others.sum(1, keepdim=True)  # without the c likeliest, c = 0 to K - 1
    # Those that would be drawn with probability 1 up to rounding are certain too, and so are all where nothing is left.
    certain = ((largest > left / (k - at) * (1 - 1e-6)) | (largest == 0)).to(torch.uint8)
    certain = certain.cumprod(1).sum(1, keepdim=True)
    rest = others.scatter(1, top, torch.where(at < certain, 0, largest)).cumsum(1)
    count = k - certain
    points = (at + offsets[:, None]) * (rest[:, -1:] / count.clamp(min=1))
    drawn = torch.searchsorted(rest, points, right=True).clamp(max=rest.shape[1] - 1)
    ids = torch.where(at < certain, top, drawn.gather(1, (at - certain).clamp(min=0)))
    ids = torch.where(rest[:, -1:].isnan(), at, ids)  # any distinct ones: a divergence from them is NaN
    return ids, log_p.gather(1, ids)
