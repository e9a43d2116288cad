"""The protocol of sources and producers: all that the chunk loop, the checks and the operators know of a distribution.

A new kind of teacher or head is one file, with a ``Source`` and the ``Producer`` that it makes. No code outside this
package asks for the class of a source.

Axes: N tokens of a call, n tokens of a chunk, V vocabulary, H hidden, K stored entries; [...] leading dimensions.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..checks import check_count
from ..compute import memory
from ..divergences import Divergence
from ..kernels import Backend, Coefficients, Rows

# A gradient and what it still has to be multiplied with, where fp16 does not hold the product: a number or, for
# gradients [..., H], one for each [..., 1].
Gradient = tuple[Tensor | None, Tensor | float]
# What a teacher's producer gave of some tokens: ``Producer.rows``, or ``Producer.entries`` where it knows no more.
Known = Rows | tuple[Tensor, Tensor]


class Costs(NamedTuple):
    """Bytes that a source and its producer need, without the tensors that the source holds."""

    kept: int  # during the whole call
    fixed: int  # at times, whatever the size of a chunk
    row: int  # for each token of a chunk


class Source:
    """What gives a distribution over the next token: kd.Head, kd.Logits, kd.TopK or a class of your own.

    A subclass is a frozen dataclass that sets the class attributes below and implements ``costs`` and ``producer``. One
    that is ``complete`` also has a ``vocabulary``. One with fields that are no tensors also has ``numbers`` and
    ``unpack``; without them a TypeError names the fields that packing would lose. Nothing else is needed: defining the
    class registers it for ``unpack``.
    """

    names: tuple[str, ...]  # the fields that hold tensors. The first has the leading dimensions, the last may be None
    axis: str  # what error messages call the last dimension of the first tensor
    complete: bool = True  # whether it knows all entries of its vocabulary, or K of each token (Producer.entries)
    trainable: bool = False  # whether it may be a student, so that its producer gives gradients of its tensors
    group = None  # the process group whose ranks divide the vocabulary (kd.Head), where one does
    key: str  # the name that the class is registered under

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        _check_fields(cls)
        name = f"{cls.__module__}.{cls.__qualname__}"
        others = sum(key.partition("#")[0] == name for key in _CLASSES)  # defined again, as in a notebook: both stay
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
        """How many entries have a probability. Only read where the source is ``complete``."""
        raise NotImplementedError(f"{type(self).__name__}.vocabulary")

    @property
    def width(self) -> int:
        """H, where the first two tensors are hidden states and weights, whose products are the logits. Else 0."""
        return 0

    def logits_dtype(self, asked: torch.dtype | None) -> torch.dtype:
        """The dtype of the chunk buffer when this source is the student.

        The default on GPUs is fp32 where logits are products. It is the dtype of the source's own tensors where logits
        exist already, and on CPUs, where fp32 logits would halve the chunks of a budget and cost a fifth of the time.

        Args:
            asked: the caller's ``logits_dtype``; None for the default.

        Raises:
            ValueError: ``asked`` is neither the tensors' dtype nor a wider fp32.
        """
        own = self.dtype
        if asked is None:
            return torch.float32 if self.width and self.device.type != "cpu" and own.itemsize < 4 else own
        if asked != own and (asked != torch.float32 or own.itemsize > 4):
            raise ValueError(f"logits_dtype: expected {own} (the operands') or float32, got {asked}")
        return asked

    def fits_dtype(self, student: Source) -> bool:
        """Whether this source may be the teacher of a student of that dtype.

        Both multiply and are read in their own dtypes: the teacher's logits are at least as wide as the student's. Only
        fp64 would lose digits, in statistics that have the student's dtype.
        """
        return self.dtype == student.dtype or self.dtype != torch.float64

    def check_temperature(self, temperature: float) -> None:
        """Checks that the source has a distribution at this temperature.

        Raises:
            ValueError: it has none.
        """

    # ---- copies and packing ----

    @classmethod
    def trusted(cls, **fields) -> Source:
        """A source of fields that are known to be right, and the defaults of all others."""
        source = cls.__new__(cls)
        source.__dict__.update(fields)
        return source

    def detach(self) -> Source:
        detached = {name: t.detach() for name in self.names if (t := getattr(self, name)) is not None}
        return self.trusted(**self.__dict__ | detached)

    def autocast(self) -> Source:
        """This source in autocast's dtype. Only a head changes, because only a head multiplies matrices."""
        return self

    @property
    def numbers(self) -> list[float]:
        """What ``unpack`` needs besides the tensors."""
        return []

    def pack(self) -> tuple[list[Tensor], str, list[float]]:
        """Tensors, key and numbers: PyTorch operators take nothing else."""
        return [t for t in self.tensors if t is not None], self.key, self.numbers

    @classmethod
    def unpack(cls, tensors: list[Tensor], numbers: list[float]) -> Source:
        """The source that ``pack`` took apart, which needs no second check."""
        return cls.trusted(**dict(zip(cls.names, tensors, strict=False)))

    # ---- in the chunk loop ----

    def part(self, entries: slice) -> Source:
        """What the chunk loop reads of this source where the ranks of a group divide the vocabulary: these ``entries``
        alone, which are this rank's. A source that is not ``complete`` keeps its ids, which are those of the whole.

        Raises:
            TypeError: the class has no way to be divided.
        """
        if self.complete:
            raise TypeError(f"{type(self).__name__}: expected a part method of its own beside a head with a group")
        return self

    def costs(self, backend: Backend, vocabulary: int, dtype: torch.dtype, largest: int, trained: bool) -> Costs:
        """The memory that its producer will need.

        Args:
            backend: the row kernels of the call.
            vocabulary: V, of student and teacher.
            dtype: of the logits in the chunk buffer.
            largest: how many of each token's largest entries are asked for.
            trained: whether it is a student whose tensors get gradients.
        """
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
        """What gives this distribution to the chunk loop.

        Args:
            backend: the row kernels of the call.
            index: [N] the flat positions of the call's tokens in the leading dimensions.
            vocabulary: V, of student and teacher.
            buffer: [n, V] for the logits of one chunk; None where the source is not ``complete``.
            needs: of a student, which of its ``tensors`` get a gradient; None for a teacher.
            pieces: how many times a student's ``Producer.add`` will be called.
        """
        raise NotImplementedError(f"{type(self).__name__}.producer")


class Producer:
    """Fills the chunk buffer from a source and, where that is the student, takes the gradient of the logits back.

    A ``complete`` source's producer implements ``fill``. One that knows K entries of each token implements ``entries``
    and ``divergence``. A student's implements ``add`` and ``gradients`` too.
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
        """Adds what these tokens contribute to the gradients.

        Args:
            tokens: which of the call's tokens.
            d_logits: [n, V] the gradient of their logits.
            powers: [n] what each token's d_logits still has to be multiplied with; None unless d_logits is fp16.
        """
        raise NotImplementedError(f"{type(self).__name__}.add")

    def gradients(self) -> tuple[Gradient, ...]:
        """The gradients of the source's tensors, in their order."""
        raise NotImplementedError(f"{type(self).__name__}.gradients")

    def entries(self, tokens: slice) -> tuple[Tensor, Tensor]:
        """The entries that are known of these tokens: ids [n, K], and log-probabilities [n, K] in fp64."""
        raise NotImplementedError(f"{type(self).__name__}.entries")

    def divergence(self, student: Rows, teacher: Known, divergence: Divergence, temperature: float) -> Comparison:
        """The divergence of this teacher from the student at tokens of which ``teacher`` is known.

        Of a teacher that knows entries, ``student.gathered`` begins with the student's z at their ids, and the
        student's logits may be used up.
        """
        value, sums = self.backend.divergence(student, teacher, divergence, temperature)
        return _Complete(self.backend, teacher, divergence, temperature, sums, value)


class Comparison(Protocol):
    """A divergence of some tokens that has been evaluated."""

    value: Tensor  # [n]

    def write_gradient(self, student: Rows, coefficients: Coefficients, out: Tensor) -> None:
        """Writes the gradient of all terms into ``out`` [n, V], which lies over the student's logits.

        Where K entries are all that is known of the teacher, only that of the divergence.
        """


@dataclass(eq=False)
class _Complete:
    """A divergence over all entries of the vocabulary."""

    backend: Backend
    teacher: Rows
    divergence: Divergence
    temperature: float
    sums: Tensor  # Backend.divergence_sums
    value: Tensor

    def write_gradient(self, student: Rows, coefficients: Coefficients, out: Tensor) -> None:
        self.backend.gradient_(student, self.teacher, self.divergence, self.temperature, self.sums, coefficients, out)


_CLASSES: dict[str, type[Source]] = {}


def packed(source: Source | None) -> tuple[list[Tensor], str, list[float]]:
    """``Source.pack``, or an empty key where there is no teacher."""
    return source.pack() if source else ([], "", [])


def unpacked(tensors: list[Tensor], key: str, numbers: list[float]) -> Source | None:
    """The source, or None, that ``packed`` was given."""
    if key and key not in _CLASSES:
        raise RuntimeError(f"{key}: expected a source that is defined here; import its module first")
    return _CLASSES[key].unpack(tensors, numbers) if key else None


def _check_fields(cls: type[Source]) -> None:
    own = {name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)}
    lost = sorted(own - {*getattr(cls, "names", ()), *inspect.get_annotations(Source)})
    if lost and "unpack" not in vars(cls):
        raise TypeError(f"{cls.__name__}: expected numbers and unpack of its own for its fields {lost}")


def row_bytes(vocabulary: int, device: torch.device, dtype: torch.dtype, largest: int) -> int:
    """The bytes of one token's logits in a buffer and of its ``largest`` entries."""
    # 64 bytes an entry: its id, its value and what is computed from them
    return memory.padded(vocabulary, device) * dtype.itemsize + 64 * largest


def take(source: Tensor, at: Tensor) -> Tensor:
    """What source [..., X] has at flat positions [n]: [n, X].

    A source that is not contiguous is not flattened, which would copy all of it, unless it is one vector.
    """
    if source.is_contiguous() or source.dim() == 1:
        return source.view(-1, source.shape[-1]).index_select(0, at)
    places = []  # the index in each leading dimension
    for size in reversed(source.shape[:-1]):
        places.insert(0, at % size)
        at = at // size
    return source[tuple(places)]


def powers_like(values: Tensor) -> Tensor | float:
    """Ones, to be overwritten by the powers of two (fp16.py) of fp16 values [..., H]: fp32 [..., 1]."""
    return values.new_ones((*values.shape[:-1], 1), dtype=torch.float32) if values.dtype == torch.float16 else 1.0


def check_vocab_size(vocab_size: int | None, most: int, what: str) -> None:
    if vocab_size is None:
        return
    check_count("vocab_size", vocab_size, 1)
    if vocab_size > most:
        raise ValueError(f"vocab_size: expected at most {most} ({what}), got {vocab_size}")


def autocasts(device: torch.device) -> bool:
    """Whether ``torch.autocast`` is on for that device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives a tensor: None where it is off, and for fp64, which it leaves alone."""
    if tensor.dtype == torch.float64 or not autocasts(tensor.device):
        return None
    return torch.get_autocast_dtype(tensor.device.type)
