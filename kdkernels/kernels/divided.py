"""A vocabulary that the ranks of a process group divide (tensor parallelism), and the row kernels over it.

Each rank has the logits of its own entries. A sweep runs over these. What it sums up is then gathered from all ranks
and added in the order of ranks, so that all have bitwise the same numbers and select the same tokens.

Axes: C tokens of a chunk, P ranks, K candidates, J or S ids per token.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..divergences import Divergence
from .interface import STATS, Backend, Coefficients, Request, Rows, finished, merged


class Shards:
    """Which entries each rank of a group has: rank r those from ``borders[r]`` up to ``borders[r + 1]``.

    Args:
        group: the process group.
        rank: this process's in it.
        sizes: of each rank, how many entries it has: at least one.
        device: of the tensors that the ranks exchange.
    """

    def __init__(self, group, rank: int, sizes: list[int], device: torch.device):
        self.group, self.sizes, self.device = group, sizes, device
        self.borders = [0, *accumulate(sizes)]
        self.vocabulary = self.borders[-1]
        self.entries = slice(*list(pairwise(self.borders))[rank])
        self.count = sizes[rank]
        self._inner_borders = torch.tensor(self.borders[1:-1], dtype=torch.int64, device=device)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The columns of ids in this rank's logits, 0 where they are another's, and which are this rank's."""
        columns = ids - self.entries.start
        mine = (columns >= 0) & (columns < self.count)
        return torch.where(mine, columns, 0), mine

    def owners(self, ids: Tensor) -> Tensor:
        """The rank that has each id."""
        return torch.bucketize(ids, self._inner_borders, right=True)

    def gathered(self, own: Tensor) -> Tensor:
        """What each rank has, in the order of ranks: [P, ...]."""
        return gathered(self.group, own)

    def add_up_(self, own: Tensor) -> None:
        """own = the sum of what all ranks have."""
        from torch import distributed

        distributed.all_reduce(own, group=self.group)

    def row_bytes(self, largest: int) -> int:
        """Bytes for each token of a chunk that exchanging its statistics and ``largest`` entries takes at most."""
        return 2 * 8 * len(self.sizes) * (STATS + 1 + 3 * largest)


def gathered(group, own: Tensor) -> Tensor:
    """What each rank of the group has, of the same shape on all, in the order of ranks: [P, ...]."""
    from torch import distributed

    parts = own.new_empty((group.size(), *own.shape))
    distributed.all_gather(list(parts), own.contiguous(), group=group)
    return parts


class Divided(Backend):
    """The kernels of ``inner`` over logits [C, V/P] of this rank's entries, with what is known of the whole vocabulary.

    Ids that it takes and gives are those of the whole vocabulary.
    """

    name = "divided"

    def __init__(self, inner: Backend, shards: Shards):
        self.inner, self.shards = inner, shards

    @property
    def of_own_entries(self) -> Backend:
        return self.inner

    def refusal(self, request: Request) -> str:
        return self.inner.refusal(request)

    def workspace(self, rows: int, vocabulary: int) -> int:
        return self.inner.workspace(rows, vocabulary)

    def statistics(
        self, logits: Tensor, scale: float, softcap: float | None, temperature: float, topk: int, gather: Tensor | None
    ) -> Rows:
        """Sweep 1; everything known of a token travels in one exchange."""
        shards, largest = self.shards, min(topk, self.shards.count)
        columns = None if gather is None else shards.local(gather)[0]
        own = self.inner.statistics(logits, scale, softcap, temperature, largest, columns)
        top_ids = own.top_indices + shards.entries.start
        padding = own.top_values.new_zeros(len(logits), topk - largest)
        known = [own.stats, own.top_values, padding, top_ids, padding, *([] if gather is None else [own.gathered])]
        parts = shards.gathered(torch.cat([each.double() for each in known], dim=1))  # fp64 holds ids exactly
        # Equal values are in the order of ids: so they are on each rank, and among ranks.
        counts = [min(topk, size) for size in shards.sizes]
        values, ids = (
            torch.cat([part[:, start : start + n] for part, n in zip(parts, counts, strict=True)], dim=1)
            for start in (STATS, STATS + topk)
        )
        order = values.sort(dim=1, descending=True, stable=True).indices[:, :topk]
        z = None
        if gather is not None:
            at_ids = parts[:, :, STATS + 2 * topk :]
            z = at_ids.gather(0, shards.owners(gather)[None])[0].to(own.stats.dtype)
        return replace(
            own,
            stats=merged(parts[:, :, :STATS], temperature).to(own.stats.dtype),
            top_values=values.gather(1, order).to(own.stats.dtype),
            top_indices=ids.gather(1, order).long(),
            gathered=z,
        )

    def divergence_sums(self, student: Rows, teacher: Rows, divergence: Divergence, temperature: float) -> Tensor:
        """Those of this rank's entries."""
        return self.inner.divergence_sums(student, teacher, divergence, temperature)

    def divergence(
        self, student: Rows, teacher: Rows, divergence: Divergence, temperature: float
    ) -> tuple[Tensor, Tensor]:
        sums = self.shards.gathered(self.divergence_sums(student, teacher, divergence, temperature))
        return finished(sums.unbind(), student.stats.dtype)

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
        columns, mine = self.shards.local(coefficients.ids)
        here = Coefficients(coefficients.dense, columns, torch.where(mine, coefficients.scatter, 0))
        self.inner.gradient_(student, teacher, divergence, temperature, sums, here, out)

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        self.inner.scale_(gradient, factor)

    def traits(self) -> frozenset[str]:
        return self.inner.traits()

    def isa(self) -> str | None:
        return self.inner.isa()
