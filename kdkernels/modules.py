"""The per-token functions as modules that keep their options. functional.py says what the options mean."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import divergences, functional
from .layout import Layout
from .sources import Source

__all__ = ["CrossEntropy", "Divergence", "Entropy", "PlackettLuce"]


class _Options(nn.Module):
    def __init__(self, memory_budget: int | None, logits_dtype: torch.dtype | None):
        super().__init__()
        self.limits = {"memory_budget": memory_budget, "logits_dtype": logits_dtype}


class CrossEntropy(_Options):
    """``kd.cross_entropy`` with its ``ignore_index``."""

    def __init__(self, ignore_index: int = -100, *, memory_budget=None, logits_dtype=None):
        super().__init__(memory_budget, logits_dtype)
        self.ignore_index = ignore_index

    def forward(self, student: Source, target: Tensor, *, rows: Tensor | Layout | None = None) -> Tensor:
        return functional.cross_entropy(student, target, self.ignore_index, rows=rows, **self.limits)


class Entropy(_Options):
    """``kd.entropy``."""

    def __init__(self, *, memory_budget=None, logits_dtype=None):
        super().__init__(memory_budget, logits_dtype)

    def forward(self, student: Source, *, rows: Tensor | Layout | None = None) -> Tensor:
        return functional.entropy(student, rows=rows, **self.limits)


class Divergence(_Options):
    """``kd.divergence`` with its divergence, such as ``kd.JSD(0.9)``, and temperature."""

    def __init__(
        self, divergence: divergences.Divergence, temperature: float = 1.0, *, memory_budget=None, logits_dtype=None
    ):
        super().__init__(memory_budget, logits_dtype)
        self.divergence, self.temperature = divergence, temperature

    def forward(self, student: Source, teacher: Source, *, rows: Tensor | Layout | None = None) -> Tensor:
        return functional.divergence(student, teacher, self.divergence, self.temperature, rows=rows, **self.limits)


class PlackettLuce(_Options):
    """``kd.plackett_luce`` with its number of candidates."""

    def __init__(self, k: int = 10, *, memory_budget=None, logits_dtype=None):
        super().__init__(memory_budget, logits_dtype)
        self.k = k

    def forward(self, student: Source, teacher: Source, *, rows: Tensor | Layout | None = None) -> Tensor:
        return functional.plackett_luce(student, teacher, self.k, rows=rows, **self.limits)
