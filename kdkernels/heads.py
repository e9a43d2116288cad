"""Where a model's distribution over the next word comes from: a head over hidden states, logits, or stored top-k words.

Axes: V vocabulary, H hidden, K stored words; [...] are any leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import check_count, check_positive
from .from_model import tail
from .tensors import check_floating, where_the_rows_are

__all__ = ["Head", "Logits", "TopK"]


class Source:
    """What heads, logits and stored words have in common. ``names`` are the fields that hold tensors."""

    names: tuple[str, ...]

    @classmethod
    def trusted(cls, **fields) -> Source:
        """From fields that need no second look; the others have their defaults."""
        source = cls.__new__(cls)
        source.__dict__.update(fields)
        return source

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return tuple([getattr(self, name) for name in self.names])

    def detach(self) -> Source:
        detached = [None if t is None else t.detach() for t in self.tensors]
        return self.trusted(**self.__dict__ | dict(zip(self.names, detached, strict=True)))

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

    def autocast(self) -> Source:
        """This source as autocast wants it: only a head multiplies matrices."""
        return self


@dataclass(frozen=True, eq=False)
class Head(Source):
    """Logits that are never materialised: z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    Args:
        hidden: [..., H] last hidden states, after the final norm.
        weight: [V, H] lm_head weight; a parameter or any tensor computed from parameters.
        bias: [V] or None.
        softcap: final logit soft-cap (Gemma2: 30); None for no soft-cap.
        scale: factor on the raw logits (Cohere ``logit_scale``, Granite ``1 / logits_scaling``).
        vocab_size: real vocabulary where ``weight`` is padded beyond it; the padding rows have probability 0.

    Raises:
        TypeError: a tensor of the wrong kind (quantized, a shard: the message says how to get a plain one), or hidden,
            weight and bias of different dtypes (autocast makes them one).
        ValueError: shapes or devices that do not fit, a soft-cap that is not positive, a vocab_size outside [1, V].
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocab_size: int | None = None

    names = ("hidden", "weight", "bias")

    def __post_init__(self):
        for name, tensor in (("hidden", self.hidden), ("weight", self.weight), ("bias", self.bias)):
            if tensor is None and name == "bias":
                continue
            check_floating(name, tensor)
            if tensor.device != self.hidden.device:
                lost = "; it has no values there: load it first" if tensor.is_meta else ""
                raise ValueError(
                    f"{name}: expected device {self.hidden.device} (that of hidden), got {tensor.device}{lost}"
                )
            if tensor.dtype != self.hidden.dtype and not all(autocast_dtype(t) for t in (tensor, self.hidden)):
                raise TypeError(f"{name}: expected dtype {self.hidden.dtype} (that of hidden), got {tensor.dtype}")
        if self.weight.dim() != 2 or 0 in self.weight.shape:
            way_out = where_the_rows_are(self.weight)
            kind = TypeError if way_out else ValueError
            raise kind(f"weight: expected shape [V, H], got {list(self.weight.shape)}{way_out}")
        rows, width = self.weight.shape
        if self.hidden.dim() < 1 or self.hidden.shape[-1] != width:
            raise ValueError(
                f"hidden: expected [..., {width}] to fit weight [{rows}, {width}], got {list(self.hidden.shape)}"
            )
        if self.bias is not None and self.bias.shape != (rows,):
            raise ValueError(f"bias: expected shape [{rows}], got {list(self.bias.shape)}")
        if self.softcap is not None:
            check_positive("softcap", self.softcap)
        check_positive("scale", self.scale)
        _check_vocab_size(self.vocab_size, rows, "the rows of weight")

    @property
    def vocabulary(self) -> int:
        """Number of words with a probability: ``vocab_size`` or the rows of weight."""
        return self.vocab_size or self.weight.shape[0]

    def autocast(self) -> Head:
        """In autocast's dtype where that is on; differentiable: gradients come in the parameters' dtype."""
        dtype = autocast_dtype(self.hidden)
        if dtype is None:
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    @classmethod
    def from_model(cls, model, hidden: Tensor, vocab_size: int | None = None) -> Head:
        """The head of a transformers causal LM over ``hidden`` [..., H], the last hidden states of its base model, with
        its bias, soft-cap and logit scale as the model's own forward applies them (``from_model.py``).

        ``vocab_size`` is the real vocabulary (the tokenizer's) where the embedding is padded; default: the words that
        the model's forward gives a logit.

        Every call notices a model that has changed. Not so code that torch.compile has compiled, which has the numbers
        built in: after a change to the model's config, forward or hooks call ``torch.compiler.reset()``.

        Raises:
            ValueError: a vocab_size beyond that.
            TypeError: naming what a Head cannot say of this model: an output embedding that is more than a linear
                layer (an adapter whose effect reading ``.weight`` would lose) or has hooks, a replaced forward, a
                transform between base model and output embedding, logits that are more than scaled and capped.
        """
        read = tail(model)
        if vocab_size is not None:
            check_count("vocab_size", vocab_size, 1, read.words)
        return cls(
            hidden,
            read.layer.weight,
            read.layer.bias,
            softcap=read.softcap,
            scale=read.scale,
            vocab_size=read.words if vocab_size is None else vocab_size,
        )


@dataclass(frozen=True, eq=False)
class Logits(Source):
    """Logits that exist already, as teacher or as student (the gradient then goes to them).

    They are copied into the chunk buffers, never written to. A teacher's may be of another dtype than the student's
    operands (stored in bf16, say); both sides are computed from their own values.

    Args:
        logits: [..., V], after scale and soft-cap: what the softmax is taken of.
        vocab_size: real vocabulary where V is padded beyond it; the padding has probability 0.

    Raises:
        TypeError: not a floating-point tensor, or a vocab_size that is not an int.
        ValueError: no last dimension, or a vocab_size outside [1, V].
    """

    logits: Tensor
    vocab_size: int | None = None

    names = ("logits",)

    def __post_init__(self):
        check_floating("logits", self.logits)
        if self.logits.dim() < 1 or self.logits.shape[-1] == 0:
            raise ValueError(f"logits: expected shape [..., V], got {list(self.logits.shape)}")
        _check_vocab_size(self.vocab_size, self.logits.shape[-1], "the columns of logits")

    @property
    def vocabulary(self) -> int:
        """Number of words with a probability."""
        return self.vocab_size or self.logits.shape[-1]


@dataclass(frozen=True, eq=False)
class TopK(Source):
    """A teacher known at K words per token, stored or served. Divergences take it; what needs more raises TypeError.

    Both distributions are coarsened to K + 1 outcomes, the K words and one bucket for all others: the teacher's
    bucket has the missing mass 1 - sum p, the student's the mass of its other words. ``renormalize=True`` drops the
    bucket: teacher and student are normalised over the K words. A temperature other than 1 needs that, because a bucket
    has no temperature. With K = V there is no bucket.

    Each token's ids must be distinct words of the shared vocabulary. A log-probability of -inf (probability 0) may pad
    a list, its id must still be such a word. Probabilities may sum to 1 + 1e-3 (16-bit: 1 + 2e-2) through rounding and
    are then normalised. On CPUs anything else is a ValueError at the call; asking a GPU would cost a sync: there such
    a token's divergence is NaN and metrics count it. The bucket has at least 2^-23, what fp32 lists lose in rounding:
    with 0 one confident token would make a reverse KL infinite.

    Args:
        indices: [..., K] int64 token ids.
        log_probs: [..., K] log p of these words, natural logarithm, at temperature 1.
        renormalize: drop the bucket of all other words.

    Raises:
        TypeError: dtypes other than int64 and floating point, or renormalize not a bool.
        ValueError: shapes or devices that do not fit.
    """

    indices: Tensor
    log_probs: Tensor
    renormalize: bool = False

    names = ("log_probs", "indices")

    def __post_init__(self):
        check_floating("log_probs", self.log_probs)
        if not isinstance(self.indices, Tensor) or self.indices.dtype != torch.int64:
            got = getattr(self.indices, "dtype", type(self.indices).__name__)
            raise TypeError(f"indices: expected an int64 tensor, got {got}")
        if self.log_probs.dim() < 1 or self.log_probs.shape[-1] == 0:
            raise ValueError(f"log_probs: expected shape [..., K], got {list(self.log_probs.shape)}")
        if self.indices.shape != self.log_probs.shape:
            raise ValueError(
                f"indices: expected shape {list(self.log_probs.shape)} (that of log_probs), got "
                f"{list(self.indices.shape)}"
            )
        if self.indices.device != self.log_probs.device:
            raise ValueError(
                f"indices: expected device {self.log_probs.device} (that of log_probs), got {self.indices.device}"
            )
        if not isinstance(self.renormalize, bool):
            raise TypeError(f"renormalize: expected a bool, got {self.renormalize!r}")


def _check_vocab_size(vocab_size: int | None, most: int, what: str) -> None:
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


def shared_vocabulary(student: Head | Logits, teacher: Source | None) -> int:
    """The words both can score: min over both sides of ``vocab_size`` or all words; stored words are the student's.

    Raises:
        ValueError: the teacher has fewer words than the student. Cutting the student to the teacher's size must be
            asked for, by passing that ``vocab_size`` to the student.
    """
    if teacher is None or isinstance(teacher, TopK):
        return student.vocabulary
    if teacher.vocabulary < student.vocabulary:
        raise ValueError(
            f"teacher: expected a vocabulary of at least the student's {student.vocabulary} words, got "
            f"{teacher.vocabulary}; if the student's rest is padding, say vocab_size={teacher.vocabulary} there"
        )
    return student.vocabulary
