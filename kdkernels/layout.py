"""Which positions are response tokens, and which of them belong to the same response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Layout"]


@dataclass(frozen=True, eq=False)
class Layout:
    """The N scored tokens of a [B, L] batch, ordered response by response.

    Build it once, on the CPU, in the collator: then nothing about the batch's shape is read from the device.

    Attributes:
        index: [N] int64, flat positions b * L + t.
        lengths: tokens of each non-empty response, in order; they sum to N.
        shape: (B, L) of the batch.

    Raises:
        TypeError: index is not an int64 tensor [N]. ValueError: lengths that are not positive or do not sum to N.
    """

    index: Tensor
    lengths: tuple[int, ...]
    shape: tuple[int, int]

    def __post_init__(self):
        if not isinstance(self.index, Tensor) or self.index.dtype != torch.int64 or self.index.dim() != 1:
            got = (self.index.dtype, list(self.index.shape)) if isinstance(self.index, Tensor) else type(self.index)
            raise TypeError(f"index: expected an int64 tensor [N], got {got}")
        if any(length < 1 for length in self.lengths) or sum(self.lengths) != len(self.index):
            raise ValueError(
                f"lengths: expected positive lengths that sum to the {len(self.index)} positions of index, got "
                f"{list(self.lengths)}"
            )

        if self.index.device.type == "cpu" and len(self.index):
            low, high, count = int(self.index.min()), int(self.index.max()), math.prod(self.shape)
            if not 0 <= low <= high < count or int(self.index.bincount().max()) > 1:
                raise ValueError(f"index: expected distinct positions in [0, {count}), got {self.index.tolist()}")

    @classmethod
    def trusted(cls, index: Tensor, lengths: tuple[int, ...], shape: tuple[int, int]) -> Layout:
        """From parts that need no second look, which on a GPU would be a sync."""
        layout = cls.__new__(cls)
        layout.__dict__.update(index=index, lengths=lengths, shape=shape)
        return layout

    @classmethod
    def from_mask(cls, mask: Tensor) -> Layout:
        """One response per row of ``mask`` [B, L] bool, True where hidden[b, t] *predicts* a response token.

        The last prompt position is True, the position of the final token (EOS) False. A mask on a GPU costs one sync.

        Raises:
            TypeError: not a bool tensor. ValueError: not two-dimensional.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.dim() != 2:
            raise ValueError(f"mask: expected shape [B, L], got {list(mask.shape)}")
        rows = torch.arange(1, len(mask) + 1, device=mask.device)
        return cls.from_segments(mask * rows[:, None])

    @classmethod
    def from_labels(cls, labels: Tensor, ignore_index: int = -100) -> Layout:
        """From Hugging Face labels [B, L] (the token *at* t, or ``ignore_index``), which it shifts for you."""
        _check_integers("labels", labels)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
        mask = torch.zeros_like(labels, dtype=torch.bool)
        mask[:, :-1] = labels[:, 1:] != ignore_index
        return cls.from_mask(mask)

    @classmethod
    def from_segments(cls, ids: Tensor) -> Layout:
        """From integer ids [B, L]: 0 is unscored, equal ids in a row are one response (packed or multi-turn rows)."""
        _check_integers("ids", ids)
        flat = ids.flatten()
        index = flat.nonzero()[:, 0]
        keys = torch.stack([index // max(1, ids.shape[1]), flat[index]])  # responses are distinct (row, id) pairs
        _, response, counts = keys.unique(dim=1, return_inverse=True, return_counts=True)
        order = response.sort(stable=True).indices
        return cls.trusted(index[order], tuple(counts.tolist()), tuple(ids.shape))

    def __len__(self) -> int:
        return sum(self.lengths)

    @property
    def responses(self) -> int:
        """Number of non-empty responses."""
        return len(self.lengths)

    def part(self, first: int, last: int) -> Layout:
        """Responses first..last-1 as a layout of their own."""
        start, count = sum(self.lengths[:first]), sum(self.lengths[first:last])
        return Layout.trusted(self.index[start : start + count], self.lengths[first:last], self.shape)

    def take(self, responses: Sequence[int]) -> Layout:
        """The numbered responses, in that order, as a layout of their own."""
        parts = self.index.split(self.lengths)
        index = torch.cat([parts[i] for i in responses]) if responses else self.index[:0]
        return Layout.trusted(index, tuple(self.lengths[i] for i in responses), self.shape)

    def to(self, device) -> Layout:
        """The same layout with its tensors on ``device``."""
        return Layout.trusted(self.index.to(device, non_blocking=True), self.lengths, self.shape)

    @cached_property
    def response_lengths(self) -> Tensor:
        """[responses] length of each response."""
        return torch.tensor(self.lengths, dtype=torch.int64, device="cpu").to(self.index.device, non_blocking=True)

    @cached_property
    def response(self) -> Tensor:
        """[N] number of each token's response."""
        numbers = torch.arange(self.responses, device=self.index.device)
        return numbers.repeat_interleave(self.response_lengths, output_size=len(self))

    @cached_property
    def length(self) -> Tensor:
        """[N] length of each token's response."""
        return self.response_lengths.repeat_interleave(self.response_lengths, output_size=len(self))

    @cached_property
    def position(self) -> Tensor:
        """[N] position of each token within its response."""
        starts = self.response_lengths.cumsum(0) - self.response_lengths
        return torch.arange(len(self), device=self.index.device) - starts[self.response]

    @cached_property
    def row(self) -> Tensor:
        """[responses] batch row of each response."""
        return self.index[self.position == 0] // max(1, self.shape[1])

    def written_by(self, author: Tensor) -> list[bool]:
        """Whether each response is in a row where ``author`` [B] bool is True."""
        return author.to(self.index.device)[self.row].tolist()

    @cached_property
    def tables(self) -> list[tuple[Tensor, Tensor]]:
        """Responses of similar length side by side: (numbers [r] of responses, numbers [r, l] of their tokens).

        Rows end with the number N, which is no token. The tables have fewer than 2 N places together, where one table
        of all responses would be as wide as the longest. What is computed a row at a time stays in its response.
        """
        alike: dict[int, list[int]] = {}
        for number, length in enumerate(self.lengths):
            alike.setdefault((length - 1).bit_length(), []).append(number)
        starts, out = self.response_lengths.cumsum(0) - self.response_lengths, []
        for numbers in alike.values():
            responses = torch.tensor(numbers, device="cpu").to(self.index.device, non_blocking=True)
            places = torch.arange(max(self.lengths[i] for i in numbers), device=self.index.device)
            beyond = places >= self.response_lengths[responses, None]
            out.append((responses, (starts[responses, None] + places).masked_fill_(beyond, len(self))))
        return out

    def sums(self, values: Tensor) -> Tensor:
        """[responses] sums of token values [N] over each response."""
        out, padded = values.new_empty(self.responses), pad(values, (0, 1))
        for responses, tokens in self.tables:
            out[responses] = padded[tokens].sum(1)
        return out


def _check_integers(name: str, values: object) -> None:
    if not isinstance(values, Tensor) or values.is_floating_point():
        raise TypeError(f"{name}: expected an integer tensor, got {getattr(values, 'dtype', type(values).__name__)}")
    if values.dim() != 2:
        raise ValueError(f"{name}: expected shape [B, L], got {list(values.shape)}")
