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

SHIFT = (
    "target[b, t] is the token that position t predicts, labels of transformers hold the token at t: "
    "kd.Layout.targets(labels) shifts them"
)


@dataclass(frozen=True, eq=False)
class Layout:
    """The N scored tokens of a [B, L] batch, ordered response by response.

    Build it once, on the CPU, in the collator: then nothing about the batch's shape is read from the device.

    Attributes:
        index: [N] int64, flat positions b * L + t.
        lengths: tokens of each non-empty response, in order; they sum to N.
        shape: (B, L) of the batch.
        token: [N] int64, the token that each position predicts, where the layout was made from labels; else None.

    Raises:
        TypeError: index is not an int64 tensor [N], token neither that nor None. ValueError: lengths that are not
        positive or do not sum to N, positions that are not distinct or outside the batch.
    """

    index: Tensor
    lengths: tuple[int, ...]
    shape: tuple[int, int]
    token: Tensor | None = None

    def __post_init__(self):
        if not isinstance(self.index, Tensor) or self.index.dtype != torch.int64 or self.index.dim() != 1:
            got = (self.index.dtype, list(self.index.shape)) if isinstance(self.index, Tensor) else type(self.index)
            raise TypeError(f"index: expected an int64 tensor [N], got {got}")
        if self.token is not None and (
            not isinstance(self.token, Tensor)
            or self.token.dtype != torch.int64
            or self.token.shape != self.index.shape
        ):
            got = (self.token.dtype, list(self.token.shape)) if isinstance(self.token, Tensor) else type(self.token)
            raise TypeError(f"token: expected an int64 tensor {list(self.index.shape)} or None, got {got}")
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
    def trusted(
        cls, index: Tensor, lengths: tuple[int, ...], shape: tuple[int, int], token: Tensor | None = None
    ) -> Layout:
        """From parts that need no second look, which on a GPU would be a sync."""
        layout = cls.__new__(cls)
        layout.__dict__.update(index=index, lengths=lengths, shape=shape, token=token)
        return layout

    @classmethod
    def from_mask(cls, mask: Tensor) -> Layout:
        """One response per row of ``mask`` [B, L] bool, True where hidden[b, t] *predicts* a response token.

        The last prompt position is True, the position of the final token (EOS) False. Rows with several responses
        (packed texts, turns) need ``from_labels`` or ``from_segments``. A mask on a GPU costs one sync.

        Raises:
            TypeError: not a bool tensor. ValueError: not two-dimensional.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(f"mask: expected a bool tensor, got {getattr(mask, 'dtype', type(mask).__name__)}")
        if mask.dim() != 2:
            raise ValueError(f"mask: expected shape [B, L], got {list(mask.shape)}")
        rows = torch.arange(1, len(mask) + 1, device="cpu")
        return cls.from_segments(mask.cpu() * rows[:, None]).to(mask.device)

    @classmethod
    def from_spans(cls, starts: Sequence[int], lengths: Sequence[int], length: int) -> Layout:
        """One response per row, where a collator knows its place: row b's tokens are predicted by the ``lengths[b]``
        positions from ``starts[b]`` on. The same layout as ``from_mask`` of a mask that is True there.

        Args:
            starts: of each row, the position that predicts the response's first token (the last of the prompt).
            lengths: of each row, the tokens of the response; 0 where there is none.
            length: L, the positions of a row.

        Raises:
            ValueError: not as many starts as lengths, or a span that does not lie in its row.
        """
        if len(starts) != len(lengths):
            raise ValueError(f"lengths: expected {len(starts)} of them, as many as starts, got {len(lengths)}")
        for b, (start, count) in enumerate(zip(starts, lengths, strict=True)):
            if not 0 <= start <= start + count <= length:
                raise ValueError(
                    f"starts, lengths: expected positions in [0, {length}), got {start} ... {start + count - 1} in row "
                    f"{b}"
                )
        spans = [
            torch.arange(b * length + start, b * length + start + count, device="cpu")
            for b, (start, count) in enumerate(zip(starts, lengths, strict=True))
        ]
        index = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64, device="cpu")
        return cls.trusted(index, tuple(count for count in lengths if count), (len(starts), length))

    @classmethod
    def from_labels(cls, labels: Tensor, ignore_index: int = -100) -> Layout:
        """From Hugging Face labels [B, L] (the token *at* t, or ``ignore_index``), which it shifts for you.

        Labels that follow each other are one response; an ignored one between them (a prompt, the first token of the
        next packed text) begins another. So packed rows and conversations of several turns have as many responses as
        they were given, just as if each had a row of its own. Labels of two texts with nothing ignored between them
        cannot be told apart (the collators of transformers and TRL ignore each text's first label, which nothing in
        that text predicts), and an ignored token *inside* a response makes two of it: ``from_segments`` takes both as
        they are meant.

        The layout knows the tokens (``token``): an objective that needs a target takes them from it, and one that is
        given another target says so.
        """
        _check_integers("labels", labels)
        targets = cls.targets(labels.cpu(), ignore_index)
        scored = targets != ignore_index
        starts = scored & ~scored.roll(1, dims=1)  # the last position of a row is never scored
        layout = cls.from_segments(starts.cumsum(1) * scored)
        token = targets.flatten()[layout.index]
        return cls.trusted(layout.index, layout.lengths, layout.shape, token).to(labels.device)

    @staticmethod
    def targets(labels: Tensor, ignore_index: int = -100) -> Tensor:
        """``target`` [B, L] of Hugging Face ``labels`` [B, L]: the token that t predicts is the label at t + 1.

        The last position predicts nothing: ``ignore_index``. ``kd.cross_entropy(student, kd.Layout.targets(labels))``.

        Raises:
            TypeError: not an integer tensor. ValueError: not two-dimensional.
        """
        _check_integers("labels", labels)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
        targets = torch.full_like(labels, ignore_index, dtype=torch.int64)
        targets[:, :-1] = labels[:, 1:]
        return targets

    @classmethod
    def from_segments(cls, ids: Tensor) -> Layout:
        """From integer ids [B, L]: 0 is unscored, equal ids in a row are one response (packed or multi-turn rows).

        As in a mask, position t has the id of the response that hidden[b, t] *predicts* a token of. Ids on a GPU cost
        one sync: they are copied to the CPU, because finding responses takes a dozen launches and three syncs there.
        """
        _check_integers("ids", ids)
        flat = ids.cpu().flatten()
        index = flat.nonzero()[:, 0]
        keys = torch.stack([index // max(1, ids.shape[1]), flat[index]])  # responses are distinct (row, id) pairs
        _, response, counts = keys.unique(dim=1, return_inverse=True, return_counts=True)
        order = response.sort(stable=True).indices
        return cls.trusted(index[order], tuple(counts.tolist()), tuple(ids.shape)).to(ids.device)

    def __len__(self) -> int:
        return sum(self.lengths)

    @property
    def responses(self) -> int:
        """Number of non-empty responses."""
        return len(self.lengths)

    def part(self, first: int, last: int) -> Layout:
        """Responses first..last-1 as a layout of their own, the same one each time: what it has computed stays."""
        if (first, last) not in self._parts:
            self._parts[first, last] = self._part(first, last)
        return self._parts[first, last]

    @cached_property
    def _parts(self) -> dict[tuple[int, int], Layout]:
        return {}

    def _part(self, first: int, last: int) -> Layout:
        start, count = sum(self.lengths[:first]), sum(self.lengths[first:last])
        part = slice(start, start + count)
        token = None if self.token is None else self.token[part]
        return Layout.trusted(self.index[part], self.lengths[first:last], self.shape, token)

    def take(self, responses: Sequence[int]) -> Layout:
        """The numbered responses, in that order, as a layout of their own."""

        def taken(values: Tensor) -> Tensor:
            parts = values.split(self.lengths)
            return torch.cat([parts[i] for i in responses]) if responses else values[:0]

        token = None if self.token is None else taken(self.token)
        return Layout.trusted(taken(self.index), tuple(self.lengths[i] for i in responses), self.shape, token)

    def to(self, device) -> Layout:
        """The same layout with its tensors on ``device``; this one, with what it has computed, if they are there."""
        ahead = torch.device(device).type != "cpu"  # a copy from a GPU that nobody waited for has no numbers yet
        index = self.index.to(device, non_blocking=ahead)
        token = None if self.token is None else self.token.to(device, non_blocking=ahead)
        if index is self.index and token is self.token:
            return self
        return Layout.trusted(index, self.lengths, self.shape, token)

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

    def at(self, target: Tensor) -> Tensor:
        """[N] of ``target`` [B, L], the scored positions.

        Where the layout was made from labels and ``target`` says otherwise (labels that nobody shifted), that is a
        ValueError on CPUs. Elsewhere looking would be a sync: there such a token becomes -1, whose loss is NaN.
        """
        chosen = target.flatten()[self.index]
        if self.token is None:
            return chosen
        wrong = chosen != self.token
        if chosen.device.type != "cpu" or torch.compiler.is_compiling():
            return chosen.masked_fill(wrong, -1)
        if wrong.any():
            first = int(wrong.nonzero()[0])
            b, t = divmod(int(self.index[first]), self.shape[1])
            raise ValueError(
                f"target: expected at every scored position the token it predicts, as in the labels the mask was made "
                f"from ({int(self.token[first])} at [{b}, {t}], the label at [{b}, {t + 1}]), got "
                f"{int(chosen[first])} there and {int(wrong.sum())} such tokens of {len(self)}; {SHIFT}"
            )
        return chosen

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
    if not isinstance(values, Tensor) or values.dtype == torch.bool or values.is_floating_point():
        raise TypeError(f"{name}: expected an integer tensor, got {getattr(values, 'dtype', type(values).__name__)}")
    if values.dim() != 2:
        raise ValueError(f"{name}: expected shape [B, L], got {list(values.shape)}")
