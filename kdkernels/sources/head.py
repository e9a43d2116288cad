"""A distribution over the next word from hidden states and an lm_head. Axes: V vocabulary, H hidden; [...] leading."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from ..checks import check_count, check_positive
from ..tensors import check_floating, where_the_rows_are
from .base import Source, autocast_dtype, check_vocab_size
from .from_model import tail


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
        check_vocab_size(self.vocab_size, rows, "the rows of weight")

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
