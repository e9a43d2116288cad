"""What TSD-KD selected in the engine, and whether rounding alone explains where it differs from exact arithmetic."""

from __future__ import annotations

import math

import torch
import truth
from truth import Batch, Selection

from kdkernels import reference
from kdkernels.engine import terms


class Recorder:
    """Records the candidates, the teacher's order of them and the chosen tokens while an objective runs forward."""

    def __init__(self, monkeypatch, objective):
        self.orders, self.tokens = [], []
        rank, coefficients = terms.plackett_luce, objective.coefficients

        def recording_rank(student_logits, teacher_logits, teacher_top):
            self.orders.append(reference.teacher_order(teacher_logits, teacher_top))
            return rank(student_logits, teacher_logits, teacher_top)

        def recording_coefficients(tokens):
            self.tokens.append(tokens)
            return coefficients(tokens)

        monkeypatch.setattr(terms, "plackett_luce", recording_rank)
        objective.coefficients = recording_coefficients

    def selection(self) -> Selection:
        order = torch.cat(self.orders)
        proposed = torch.cat([t.top_indices for t in self.tokens])
        opener, uncertain = (torch.cat([t.selected[key] for t in self.tokens]) > 0 for key in ("opener", "uncertain"))
        return Selection(proposed.gather(-1, order), opener, uncertain)


def assert_within_rounding(batch: Batch, got: Selection, opener: float, ratio: float, tolerance: float):
    """The rules of the paper on exact logits, each comparison with ``tolerance`` (nats) of slack."""
    z_s, z_t = (z.detach() for z in truth.token_logits(batch))
    h = truth.entropy(z_s)
    chosen = torch.zeros_like(z_s, dtype=torch.bool).scatter(-1, got.ranked, True)
    assert (chosen.sum(-1) == got.ranked.shape[1]).all(), "candidates are distinct"
    rest = z_s.masked_fill(chosen, -math.inf).max(-1).values
    assert (z_s.gather(-1, got.ranked).min(-1).values >= rest - tolerance).all(), "the student's top k"
    assert (z_t.gather(-1, got.ranked).diff(dim=-1) <= tolerance).all(), "the teacher's order"
    for r in truth.slices(batch):
        here, m = h[r], int(got.opener[r].sum())
        slack = tolerance * len(here)
        assert got.opener[r].tolist() == [True] * m + [False] * (len(here) - m), "an opener is a prefix"
        assert m == 1 or here[: m - 1].sum() < opener * here.sum() + slack, "the opener is the shortest"
        assert here[:m].sum() >= opener * here.sum() - slack, "the opener holds its share"
        uncertain = got.uncertain[r]
        assert uncertain.sum() == max(1, math.floor(ratio * len(here) + 0.5))
        if not uncertain.all():
            assert here[uncertain].min() >= here[~uncertain].max() - tolerance, "the most uncertain tokens"
