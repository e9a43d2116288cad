"""Which positions are response tokens, and which of them belong to the same response."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from .tensors import check_integral

__all__ = ["Layout"]

SHIFT = (
    "target[b, t] is the token that position t predicts, labels of transformers hold the token at t: "
    "kd.Layout.targets(labels) shifts them, and kd.Layout.from_labels(labels) is the mask"
)


@dataclass(frozen=True, eq=False)
class Layout:
    """The N scored tokens of a [B, L] batch, ordered response by response.

    Build it once, on the CPU, in the collator: then nothing about the batch's shape has to be read from a GPU.

    Axes: B sequences of the batch, L positions of a sequence, N scored tokens, R responses that have any.

    Args:
        index: [N] int64 or int32, the flat positions b * L + t.
        lengths: the tokens of each response that has any, in order; they sum to N.
        shape: (B, L) of the batch.
        token: [N] int64 or int32, the token that each position predicts; None where the layout was not made from
            labels.
        parted: whether it is known where texts end. Labels alone do not show it of a sequence in which nothing stands
            before the first scored token: it may be one text or several that touch (``from_labels``).

    Raises:
        TypeError: index is neither int64 nor int32, or token is neither of them nor None.
        ValueError: index and token are no vectors of one length, or lengths are not positive or do not sum to N; on the
            CPU also positions that are not distinct or lie outside the batch.
    """

    index: Tensor
    lengths: tuple[int, ...]
    shape: tuple[int, int]
    token: Tensor | None = None
    parted: bool = True

    def __post_init__(self):
        for name in ("index", "token"):
            values = getattr(self, name)
            if name == "token" and values is None:
                continue
            check_integral(name, values)
            if values.dim() != 1 or len(values) != len(self.index):
                raise ValueError(f"{name}: expected shape [N] (that of index), got {list(values.shape)}")
            self.__dict__[name] = values.long()
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
        cls, index: Tensor, lengths: tuple[int, ...], shape: tuple[int, int], token: Tensor | None = None,
        parted: bool = True,
    ) -> Layout:  # fmt: skip
        """The layout of parts that are known to be right. Checking them on a GPU would cost a sync."""
        layout = cls.__new__(cls)
        layout.__dict__.update(index=index, lengths=lengths, shape=shape, token=token, parted=parted)
        return layout

    @classmethod
    def from_mask(cls, mask: Tensor) -> Layout:
        """The layout of sequences that have one response each.

        Sequences with several responses (packed texts, turns) need ``from_labels`` or ``from_segments``.

        ``labels != -100`` is *not* this mask but one position late, and nothing here can tell: a mask that is True at a
        sequence's last position is right for hidden states that were cut (``hidden[:, :-1]``, ``labels[:, 1:]``). What
        a mask cannot show, ``from_labels`` does right; with a target, a mask one position late is refused, because the
        token behind a response is none.

        Args:
            mask: [B, L] bool, True where hidden[b, t] *predicts* a response token: True at the last position of the
                prompt, False at the position of the final token (EOS). On a GPU it costs one sync.

        Raises:
            TypeError: mask is not a bool tensor.
            ValueError: mask has not two dimensions.
        """
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = getattr(mask, "dtype", type(mask).__name__)
            raise TypeError(
                f"mask: expected a bool tensor, got {got}; kd.Layout.from_labels(labels) makes a mask of labels"
            )
        if mask.dim() != 2:
            raise ValueError(f"mask: expected shape [B, L], got {list(mask.shape)}")
        numbers = torch.arange(1, len(mask) + 1, device="cpu")
        return cls.from_segments(mask.cpu() * numbers[:, None]).to(mask.device)

    @classmethod
    def from_spans(cls, starts: Sequence[int], lengths: Sequence[int], length: int) -> Layout:
        """The layout of sequences that have one response each, from where a collator put it.

        The ``lengths[b]`` positions from ``starts[b]`` on predict the tokens of sequence b's response. ``from_mask`` of
        a mask that is True at these positions gives the same layout.

        Args:
            starts: of each sequence, the position that predicts the response's first token (the last of the prompt).
            lengths: of each sequence, the tokens of its response; 0 where there is none.
            length: L, the positions of a sequence.

        Raises:
            ValueError: there are not as many starts as lengths, or a response does not lie in its sequence.
        """
        if len(starts) != len(lengths):
            raise ValueError(f"lengths: expected {len(starts)} of them, as many as starts, got {len(lengths)}")
        for b, (start, count) in enumerate(zip(starts, lengths, strict=True)):
            if not 0 <= start <= start + count <= length:
                raise ValueError(
                    f"starts, lengths: expected positions in [0, {length}), got {start} ... {start + count - 1} in "
                    f"sequence {b}"
                )
        spans = [
            torch.arange(b * length + start, b * length + start + count, device="cpu")
            for b, (start, count) in enumerate(zip(starts, lengths, strict=True))
        ]
        index = torch.cat(spans) if spans else torch.zeros(0, dtype=torch.int64, device="cpu")
        return cls.trusted(index, tuple(count for count in lengths if count), (len(starts), length))

    @classmethod
    def from_labels(cls, labels: Tensor, ignore_index: int = -100, *, position_ids: Tensor | None = None) -> Layout:
        """The layout of Hugging Face labels, which it shifts for you.

        Labels that follow each other are one response. An ignored label between them (a prompt, or the first token of
        the next packed text) starts another. So a packed sequence or a conversation has as many responses as texts or
        turns, just as if each of these had a sequence of its own.

        Packed texts that touch (no ignored label between them) need ``position_ids``: labels alone do not show where a
        text ends, and without them such texts are one response, in which the last token of a text predicts the first
        of the next. Objectives that select within responses refuse such a layout; others cannot tell. Give the
        ``position_ids`` of the batch wherever it is packed or free of padding; the collators of transformers and TRL
        make them by default. An ignored label *inside* a response makes two of it:
        that case needs ``from_segments``.

        The layout keeps the tokens (``token``, ``target``): an objective that needs a target takes them from there,
        and refuses a target that differs.

        Args:
            labels: [B, L] integers, the token *at* each position, or ``ignore_index``. On a GPU they cost one sync.
            ignore_index: the label of a token that is not scored.
            position_ids: [B, L] or [1, L] integers, the place of each token in its text. Where they do not go on, a
                text starts, whose first token nothing predicts. On a GPU they cost one more sync.

        Raises:
            TypeError: labels or position_ids are not integers, or ignore_index is not an int.
            ValueError: labels have not two dimensions or a negative one that is not ignore_index; position_ids have
                another shape or leave places out before a scored token.
        """
        _check_integers("labels", labels, signed=True)
        position_ids = position_ids.cpu() if isinstance(position_ids, Tensor) else position_ids
        device, labels = labels.device, labels.cpu()
        targets = cls.targets(labels, ignore_index, position_ids=position_ids)
        scored = targets != ignore_index
        first = scored & ~scored.roll(1, dims=1)  # the last position of a sequence is never scored
        layout = cls.from_segments(first.cumsum(1) * scored)
        token = targets.flatten()[layout.index]
        if len(token) and int(token.min()) < 0:
            raise ValueError(
                f"labels: expected ids of tokens, or {ignore_index} where a token is not scored, got "
                f"{int(token.min())}; say ignore_index={int(token.min())} if that is what it means"
            )
        parted = position_ids is not None or not bool((labels[:, :1] != ignore_index).any())
        return cls.trusted(layout.index, layout.lengths, layout.shape, token, parted).to(device)

    @staticmethod
    def targets(labels: Tensor, ignore_index: int = -100, *, position_ids: Tensor | None = None) -> Tensor:
        """The targets of Hugging Face labels: position t predicts the label at t + 1, the last one of a text nothing.

        ``kd.cross_entropy(student, kd.Layout.targets(labels))``. A layout has its own: ``layout.target``.

        Args:
            labels: [B, L] integers, the token *at* each position, or ``ignore_index``.
            ignore_index: the label of a token that is not scored.
            position_ids: [B, L] or [1, L] integers, which show where packed texts start, as for ``from_labels``.

        Returns:
            [B, L] int64, the token that each position predicts, or ``ignore_index``.

        Raises:
            TypeError, ValueError: as ``from_labels``.
        """
        _check_integers("labels", labels, signed=True)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
        targets = torch.full_like(labels, ignore_index, dtype=torch.int64)
        targets[:, :-1] = labels[:, 1:]
        if position_ids is not None:
            targets[:, :-1].masked_fill_(_text_starts(position_ids, labels, ignore_index)[:, 1:], ignore_index)
        return targets

    @classmethod
    def from_segments(cls, ids: Tensor) -> Layout:
        """The layout of sequences whose positions are numbered by response (packed texts, turns).

        Args:
            ids: [B, L] integers. Positions of one sequence with equal ids belong to one response, 0 is not scored. As
                in a mask, position t has the id of the response that hidden[b, t] *predicts* a token of. On a GPU they
                cost one sync: they are copied to the CPU, because finding responses on a GPU takes a dozen launches
                and three syncs.

        Raises:
            TypeError: ids are not integers.
            ValueError: ids have not two dimensions.
        """
        _check_integers("ids", ids)
        flat = ids.cpu().flatten()
        index = flat.nonzero()[:, 0]
        keys = torch.stack([index // max(1, ids.shape[1]), flat[index]])  # (sequence, id), a pair for each response
        _, response, counts = keys.unique(dim=1, return_inverse=True, return_counts=True)
        order = response.sort(stable=True).indices
        return cls.trusted(index[order], tuple(counts.tolist()), tuple(ids.shape)).to(ids.device)

    def __len__(self) -> int:
        return sum(self.lengths)

    @property
    def responses(self) -> int:
        """R, how many responses have tokens."""
        return len(self.lengths)

    def part(self, first: int, last: int) -> Layout:
        """Responses first to last - 1 as a layout. Asked again, it is the same object with what it has computed."""
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
        return Layout.trusted(self.index[part], self.lengths[first:last], self.shape, token, self.parted)

    def take(self, responses: Sequence[int]) -> Layout:
        """The responses of these numbers as a layout, in this order."""

        def taken(values: Tensor) -> Tensor:
            parts = values.split(self.lengths)
            return torch.cat([parts[i] for i in responses]) if responses else values[:0]

        token = None if self.token is None else taken(self.token)
        lengths = tuple(self.lengths[i] for i in responses)
        return Layout.trusted(taken(self.index), lengths, self.shape, token, self.parted)

    def to(self, device) -> Layout:
        """The layout with its tensors on ``device``: itself, with what it has computed, if they are there already."""
        if device == self.index.device and (self.token is None or device == self.token.device):
            return self
        ahead = torch.device(device).type != "cpu"  # a copy to the CPU has to be waited for before it is read
        index = self.index.to(device, non_blocking=ahead)
        token = None if self.token is None else self.token.to(device, non_blocking=ahead)
        if index is self.index and token is self.token:
            return self
        return Layout.trusted(index, self.lengths, self.shape, token, self.parted)

    @cached_property
    def response_lengths(self) -> Tensor:
        """[R] tokens of each response."""
        return torch.tensor(self.lengths, dtype=torch.int64, device="cpu").to(self.index.device, non_blocking=True)

    @cached_property
    def response(self) -> Tensor:
        """[N] the number of each token's response."""
        numbers = torch.arange(self.responses, device=self.index.device)
        return numbers.repeat_interleave(self.response_lengths, output_size=len(self))

    @cached_property
    def length(self) -> Tensor:
        """[N] tokens of each token's response."""
        return self.response_lengths.repeat_interleave(self.response_lengths, output_size=len(self))

    @cached_property
    def position(self) -> Tensor:
        """[N] place of each token in its response, from 0."""
        starts = self.response_lengths.cumsum(0) - self.response_lengths
        return torch.arange(len(self), device=self.index.device) - starts[self.response]

    @cached_property
    def sequence(self) -> Tensor:
        """[R] the number in the batch of each response's sequence."""
        return self.index[self.position == 0] // max(1, self.shape[1])

    @cached_property
    def target(self) -> Tensor:
        """[B, L] int64, the token that each scored position predicts, -100 elsewhere: ``kd.cross_entropy``'s target.

        Raises:
            ValueError: the layout was not made from labels, and knows no tokens.
        """
        if self.token is None:
            raise ValueError(
                "target: expected a layout that knows its tokens, got one made from a mask, spans or segments; "
                "kd.Layout.from_labels(labels) keeps them"
            )
        flat = self.index.new_full((math.prod(self.shape),), -100)
        return flat.index_copy_(0, self.index, self.token).view(self.shape)

    def at(self, target: Tensor) -> Tensor:
        """The target at the scored positions.

        A layout that was made from labels knows the tokens, and labels that nobody shifted are the usual mistake.

        Args:
            target: [B, L] int64 or int32, the token that each position predicts.

        Returns:
            [N] int64. On GPUs, where looking would cost a sync, a token that differs from the layout's is -1, and its
            loss NaN.

        Raises:
            ValueError: on CPUs, a token differs from the layout's.
        """
        chosen = target.flatten()[self.index].long()
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
        """Of each response, whether ``author`` [B] bool is True for its sequence."""
        return author.to(self.index.device)[self.sequence].tolist()

    @cached_property
    def tables(self) -> list[tuple[Tensor, Tensor]]:
        """Tables of responses of similar length, for what is computed response by response.

        All tables together have fewer than 2 N places; one table of all responses would be as wide as the longest.
        What is computed along a table's last axis, a NaN included, stays in its response.

        Returns:
            A list of (numbers [r] of responses, numbers [r, l] of their tokens). Behind the last token of a response
            stands N, which is the number of no token.
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
        """The sum [R] of token values [N] over each response."""
        out, padded = values.new_empty(self.responses), pad(values, (0, 1))
        for responses, tokens in self.tables:
            out[responses] = padded[tokens].sum(1)
        return out


def _check_integers(name: str, values: object, signed: bool = False) -> None:
    """signed: refuses unsigned integers, which hold no -100."""
    dtype = values.dtype if isinstance(values, Tensor) else None
    if dtype is None or dtype == torch.bool or dtype.is_floating_point or (signed and not dtype.is_signed):
        expected = "a signed integer tensor" if signed else "an integer tensor"
        raise TypeError(f"{name}: expected {expected}, got {dtype or type(values).__name__}")
    if values.dim() != 2:
        raise ValueError(f"{name}: expected shape [B, L], got {list(values.shape)}")


def _text_starts(position_ids: object, labels: Tensor, ignore_index: int) -> Tensor:
    """[B, L] bool: where a text starts, because the positions do not go on. A sequence starts one."""
    _check_integers("position_ids", position_ids)
    if position_ids.shape not in (labels.shape, (1, labels.shape[1])):
        raise ValueError(
            f"position_ids: expected shape {list(labels.shape)} (that of labels), got {list(position_ids.shape)}"
        )
    position_ids = position_ids.to(labels.device).expand(labels.shape)
    step = position_ids.long().diff(dim=1)
    jump = (step > 1) & (labels[:, 1:] != ignore_index)
    if jump.device.type == "cpu" and jump.any():
        b, t = jump.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids: expected positions that go on or start again, got {position_ids[b, t].item()} and then "
            f"{position_ids[b, t + 1].item()} at [{b}, {t + 1}], where a token is scored"
        )
    return pad(step != 1, (1, 0), value=True)
