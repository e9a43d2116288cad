"""What is known of tokens: statistics of student and teacher, values of the terms.

Axes: n tokens, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels import Summary


@dataclass(eq=False)
class Tokens(Summary):
    """Per-token vectors [n]; None where nothing asked for them (``Needs``) or the call does not have them."""

    stats: Tensor  # [n, ...]: entropy, lse
    top_indices: Tensor  # [n, K] the student's candidates, or the most probable entry alone: argmax
    top_log_probs: Tensor | None = None  # [n, K]
    cross_entropy: Tensor | None = None  # -log q(target)
    collision: Tensor | None = None  # sum of the largest squared probabilities
    teacher: Tokens | None = None  # the teacher's entropy, lse, argmax, cross_entropy at the same positions
    at_student_argmax: Tensor | None = None  # of ``teacher``: its log p(argmax q)
    length: Tensor | None = None  # tokens of the token's response, where coefficients are asked of the program
    weight: Tensor | None = None  # the caller's per-token weight, likewise
    selected: dict[str, Tensor] = field(default_factory=dict)  # Program.select of these tokens
    values: dict[str, Tensor] = field(default_factory=dict)  # of the program's terms, by their names

    def __getitem__(self, tokens: slice) -> Tokens:
        """Of the student alone, before anything is selected or evaluated."""
        if tokens == slice(0, self.stats.shape[0]):
            return self
        return Tokens(**{name: each[tokens] for name, each in vars(self).items() if isinstance(each, Tensor)})


def concatenated(parts: list):
    """Consecutive tokens' tensors, dicts or Tokens as one, None where the parts are. Takes dicts and Tokens apart, so
    that no more than one tensor is there twice at a time."""
    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: concatenated([part.pop(key) for part in parts]) for key in list(first)}
    return Tokens(**concatenated([vars(part) for part in parts]))
