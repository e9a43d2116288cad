"""The protocol of sources and producers: what the chunk loop, the checks and the operators know of a distribution.

A new kind of teacher or head is one file: a ``Source`` and the ``Producer`` that it makes. Nobody else asks of what
class a source is.

Axes: N tokens of a call, n tokens of a chunk, V vocabulary, H hidden, K stored entries; [...] leading dimensions.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_count
from ..compute import memory
from ..kernels import Backend, Rows

# A gradient and what it still has to be multiplied with, where fp16 does not hold the product: a number or, for
# gradients [..., H], one for each [..., 1].
Gradient = tuple[Tensor | None, Tensor | float]


class Costs(NamedTuple):
    """Bytes that a source and its producer take beside the tensors that the source holds."""

    kept: int  # throughout the call
    fixed: int  # at some time, whatever the chunk
    row: int  # for each token of a chunk


class Source:
    """Where a distribution over the next token comes from: kd.Head, kd.Logits, kd.TopK or a class of your own.

    A subclass is a frozen dataclass. It names its tensors, says what the class attributes below ask, and implements
    ``vocabulary`` (if ``complete``), ``numbers`` and ``unpack`` (if it has fields that are no tensors), ``costs`` and
    ``producer``. Defining it is all: it registers itself for ``unpack``, and a TypeError names the fields that it would
    lose.
    """

    names: tuple[str, ...]  # the fields that hold tensors; the first has the leading dimensions, None may come last
    axis: str  # what error messages call the last dimension of the first tensor
    complete: bool = True  # it knows every entry of its vocabulary; False: K of them per token, see Producer.entries
    trainable: bool = False  # it may be a student: its producer gives gradients of its tensors
    key: str  # what the class is registered under

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        _check_fields(cls)
        name = f"{cls.__module__}.{cls.__qualname__}"
        others = sum(key.partition("#")[0] == name for key in _CLASSES)  # made anew, as in a notebook: both are in use
        cls.key = f"{name}#{others}" if others else name
        _CLASSES[cls.key] = cls

    # ---- what it is ----

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple([getattr(self, name) for name in self.names])

    @property
    def shape(self) -> torch.Size:
        """The leading dimensions."""
        return getattr(self, self.names[0]).shape[:-1]

    @property
    def device(self) -> torch.device:
        return getattr(self, self.names[0]).device

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self, self.names[0]).dtype

    @property
    def vocabulary(self) -> int:
        """How many entries have a probability. Only asked of a ``complete`` source."""
        raise NotImplementedError(f"{type(self).__name__}.vocabulary")

    @property
    def width(self) -> int:
        """H, where logits are products of hidden states with weights: its first two tensors then. Else 0."""
        return 0

    def logits_dtype(self, asked: torch.dtype | None) -> torch.dtype:
        """Of the chunk buffer when it is the student; ``asked`` by the caller or None.

        By default fp32 for products on GPUs. The operands' own on CPUs, where logits twice as large would halve the
        chunks of a budget and cost a fifth of the time, and where logits exist already.

        Raises:
            ValueError: another dtype was asked for than the operands' own or a wider fp32.
        """
        own = self.dtype
        if asked is None:
            return torch.float32 if self.width and self.device.type != "cpu" and own.itemsize < 4 else own
        if asked != own and (asked != torch.float32 or own.itemsize > 4):
            raise ValueError(f"logits_dtype: expected {own} (the operands') or float32, got {asked}")
        return asked

    def fits_dtype(self, student: Source) -> bool:
        """Whether it may be the teacher of a student of that dtype.

        Logits are read as they are: only fp64 would lose digits beside a narrower student.
        """
        return self.dtype == student.dtype or self.dtype != torch.float64

    def check_temperature(self, temperature: float) -> None:
        """Raises a ValueError where it has no distribution at this temperature."""

    # ---- copies and packing ----

    @classmethod
    def trusted(cls, **fields) -> Source:
        """From fields that need no second look; the others have their defaults."""
        source = cls.__new__(cls)
        source.__dict__.update(fields)
        return source

    def detach(self) -> Source:
        detached = [None if t is None else t.detach() for t in self.tensors]
        return self.trusted(**self.__dict__ | dict(zip(self.names, detached, strict=True)))

    def autocast(self) -> Source:
        """This source as autocast wants it: only a head multiplies matrices."""
        return self

    @property
    def numbers(self) -> list[float]:
        """What ``unpack`` needs beside the tensors."""
        return []

    def pack(self) -> tuple[list[Tensor], str, list[float]]:
        """Tensors, key and numbers: PyTorch operators take nothing else."""
        return [t for t in self.tensors if t is not None], self.key, self.numbers

    @classmethod
    def unpack(cls, tensors: list[Tensor], numbers: list[float]) -> Source:
        """The source that ``pack`` took apart; it has been checked."""
        return cls.trusted(**dict(zip(cls.names, tensors, strict=False)))

    # ---- in the chunk loop ----

    def costs(self, backend: Backend, vocabulary: int, dtype: torch.dtype, largest: int, trained: bool) -> Costs:
        """What its producer will take: of logits in ``dtype``, of which the ``largest`` entries are asked for, and of
        gradients where it is ``trained``."""
        raise NotImplementedError(f"{type(self).__name__}.costs")

    def producer(
        self,
        backend: Backend,
        index: Tensor,
        vocabulary: int,
        buffer: Tensor | None,
        needs: tuple[bool, ...] | None = None,
        pieces: int = 1,
    ) -> Producer:
        """What gives the chunk loop this distribution.

        Args:
            backend: the row kernels of this call.
            index: [N] flat positions in the leading dimensions.
            vocabulary: V, of student and teacher.
            buffer: [n, V] for the logits of one chunk; None unless ``complete``.
            needs: of a student, which of ``tensors`` want a gradient; None of a teacher.
            pieces: how often a student's ``Producer.add`` will be called.
        """
        raise NotImplementedError(f"{type(self).__name__}.producer")


class Producer:
    """Gives logits of some tokens, and takes their gradient back where the source is the student.

    A teacher that computes logits implements ``fill``, one that knows K entries of each token ``entries`` and
    ``divergence``, a student also ``add`` and ``gradients``.
    """

    def __init__(self, backend: Backend, index: Tensor, vocabulary: int, buffer: Tensor | None):
        self.backend, self.index, self.vocabulary, self.buffer = backend, index, vocabulary, buffer

    def fill(self, tokens: slice, logits: Tensor) -> None:
        """Writes the logits [n, V] of these tokens of the call."""
        raise NotImplementedError(f"{type(self).__name__}.fill")

    def rows(self, tokens: slice, temperature: float, topk: int, gather: Tensor | None) -> Rows:
        """Logits of these tokens in the buffer, with their statistics."""
        logits = self.buffer[: tokens.stop - tokens.start]
        self.fill(tokens, logits)
        return self.backend.statistics(logits, 1.0, None, temperature, topk, gather)

    def add(self, tokens: slice, d_logits: Tensor, powers: Tensor | None) -> None:
        """Adds these tokens' part of the gradients; d_logits [n, V], of fp16 to be multiplied with powers [n]."""
        raise NotImplementedError(f"{type(self).__name__}.add")

    def gradients(self) -> tuple[Gradient, ...]:
        """Of the source's tensors, in their order."""
        raise NotImplementedError(f"{type(self).__name__}.gradients")

    def entries(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """Ids [n, K] of the entries that are known of these tokens, and their log-probabilities [n, K] in fp64."""
        raise NotImplementedError(f"{type(self).__name__}.entries")

    def divergence(self, student: Rows, ids: Tensor, log_p: Tensor, divergence, temperature: float):
        """The divergence from what ``entries`` gave, with its gradient: see topk_divergence.Outcomes.

        ``student.gathered`` begins with the student's z at ``ids``. It may use the student's logits up.
        """
        raise NotImplementedError(f"{type(self).__name__}.divergence")


_CLASSES: dict[str, type[Source]] = {}


def packed(source: Source | None) -> tuple[list[Tensor], str, list[float]]:
    """``Source.pack``; of no teacher, an empty key."""
    return source.pack() if source else ([], "", [])


def unpacked(tensors: list[Tensor], key: str, numbers: list[float]) -> Source | None:
    """What ``packed`` was given."""
    if key and key not in _CLASSES:
        raise RuntimeError(f"{key}: expected a source that is defined here; import its module first")
    return _CLASSES[key].unpack(tensors, numbers) if key else None


def _check_fields(cls: type[Source]) -> None:
    own = {name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)}
    lost = sorted(own - {*getattr(cls, "names", ()), *inspect.get_annotations(Source)})
    if lost and "unpack" not in vars(cls):
        raise TypeError(f"{cls.__name__}: expected numbers and unpack of its own for its fields {lost}")


def row_bytes(vocabulary: int, device: torch.device, dtype: torch.dtype, largest: int) -> int:
    """Bytes of one token's logits in a buffer and of its ``largest`` entries."""
    # 64: ids, values and what is computed from them
    return memory.padded(vocabulary, device) * dtype.itemsize + 64 * largest


def take(source: Tensor, at: Tensor) -> Tensor:
    """Rows [n, X] of source [..., X] at flat positions [n]. Flattening what is not contiguous would copy all of it,
    unless it is a single row."""
    if source.is_contiguous() or source.dim() == 1:
        return source.view(-1, source.shape[-1]).index_select(0, at)
    places = []  # in each leading dimension
    for size in reversed(source.shape[:-1]):
        places.insert(0, at % size)
        at = at // size
    return source[tuple(places)]


def powers_like(values: Tensor) -> Tensor | float:
    """Room for the powers (fp16.py) of the rows of fp16 values [..., H]: fp32 [..., 1]."""
    return values.new_ones((*values.shape[:-1], 1), dtype=torch.float32) if values.dtype == torch.float16 else 1.0


def check_vocab_size(vocab_size: int | None, most: int, what: str) -> None:
    if vocab_size is None:
        return
    check_count("vocab_size", vocab_size, 1)
    if vocab_size > most:
        raise ValueError(f"vocab_size: expected at most {most} ({what}), got {vocab_size}")


def autocasts(device: torch.device) -> bool:
    """Whether ``torch.autocast`` is on."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast makes of a tensor: None where it is off, and for fp64, which it leaves alone."""
    if tensor.dtype == torch.float64 or not autocasts(tensor.device):
        return None
    return torch.get_autocast_dtype(tensor.device.type)
