"""The gradient of all terms with respect to the student's logits: collected from the terms, written at once.

    d loss / dz = sum over divergences of c dD/dz + entropy dH/dz + softmax q + (entries added at ids)

One sweep writes one divergence with everything else over the student's logits. Each further divergence has written its
part over a copy of the logits (terms.View), which is then added.

Axes: n tokens, V vocabulary, S ids of a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..compute import fp16
from ..kernels import Backend, Coefficients, Rows
from ..sources import Comparison


class LogitGradient:
    """What the terms of some tokens add. Coefficients [n] are constants."""

    def __init__(self, student: Rows):
        self.student = student
        count = student.stats.shape[0]
        self.dense = student.stats.new_zeros(3, count)  # of a divergence, of the entropy, of the softmax
        self.ids: list[Tensor] = []  # [n, ...] each
        self.entries: list[Tensor] = []  # added there
        self.divergences: list[tuple[Comparison, Rows, Tensor]] = []

    def add_divergence(self, compared: Comparison, rows: Rows, c: Tensor) -> None:
        """``rows``: the student's own or a copy, over which this divergence's gradient will be written."""
        self.divergences.append((compared, rows, c.to(self.dense.dtype)))

    def add_entropy(self, c: Tensor) -> None:
        self.dense[1].add_(c)

    def add_softmax(self, c: Tensor) -> None:
        self.dense[2].add_(c)

    def add_entries(self, ids: Tensor, values: Tensor) -> None:
        self.ids.append(ids)
        self.entries.append(values.to(self.dense.dtype))

    def write(self, backend: Backend, temperature: float, out: Tensor) -> Tensor | None:
        """Writes the gradient into ``out`` [n, V] in the operands' dtype, which lies over the student's logits.

        Of fp16 operands it has still to be multiplied with what is returned [n].
        """
        ids, entries = side_by_side(*self.ids), side_by_side(*self.entries)
        if ids is None:
            ids, entries = self.student.top_indices[:, :0], self.student.top_values[:, :0]
        powers = None
        if out.dtype == torch.float16:
            divergences = [c[None] / temperature for *_, c in self.divergences]
            powers = fp16.power(torch.cat([*divergences, self.dense[1:], entries.t()]) * self.student.scale)
            self.dense, entries = self.dense / powers, entries / powers[:, None]
            self.divergences = [(compared, rows, c / powers) for compared, rows, c in self.divergences]
        main, added = None, []
        for compared, rows, c in self.divergences:
            if rows is self.student:
                main = compared
                self.dense[0] = c
                continue
            over = rows.logits.view(out.dtype)[:, : out.shape[1]]
            dense = torch.zeros_like(self.dense)
            dense[0] = c
            compared.write_gradient(rows, Coefficients(dense, ids[:, :0], entries[:, :0]), over)
            added.append(over)
        coefficients = Coefficients(self.dense, ids, entries)
        if main:
            main.write_gradient(self.student, coefficients, out)
        else:
            backend.gradient_(self.student, None, None, temperature, None, coefficients, out)
        for each in added:
            out.add_(each)
        return powers


def side_by_side(*columns: Tensor | None) -> Tensor | None:
    """Columns [n, ...] as one contiguous matrix, without those that are None; None where no other is there."""
    asked = [each for each in columns if each is not None]
    if len(asked) < 2:
        return asked[0].contiguous() if asked else None
    return torch.cat(asked, dim=1)
