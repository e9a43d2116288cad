"""A distribution over the next token from hidden states and an lm_head.

Axes: N tokens, n tokens of a chunk, V vocabulary, H hidden; [...] leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..checks import check_count, check_positive
from ..compute import fp16, gemm
from ..kernels import Backend, Rows
from ..tensors import check_floating, where_the_rows_are
from ..wrappers import refuse_unprepared
from .base import Costs, Gradient, Producer, Source, autocast_dtype, check_vocab_size, powers_like, row_bytes, take
from .from_model import multiplied, tail


@dataclass(frozen=True, eq=False)
class Head(Source):
    """The logits z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), never all of them at once.

    Args:
        hidden: [..., H] last hidden states, after the final norm.
        weight: [V, H] lm_head weight; a parameter or any tensor computed from parameters.
        bias: [V] or None.
        softcap: the soft-cap of the final logits (Gemma 2: 30); None for none.
        scale: a factor on the raw logits (Cohere's ``logit_scale``, Granite's ``1 / logits_scaling``).
        vocab_size: the real vocabulary where ``weight`` is padded; the padding has probability 0.

    Raises:
        TypeError: a tensor is quantized or a shard (the message says how to get a plain one), or hidden, weight and
            bias have different dtypes and autocast is off.
        ValueError: shapes or devices do not fit, softcap or scale is not positive, or vocab_size is outside [1, V].
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocab_size: int | None = None

    names = ("hidden", "weight", "bias")
    axis = "H"
    trainable = True

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
        entries, width = self.weight.shape
        if self.hidden.dim() < 1 or self.hidden.shape[-1] != width:
            raise ValueError(
                f"hidden: expected [..., {width}] to fit weight [{entries}, {width}], got {list(self.hidden.shape)}"
            )
        if self.bias is not None and self.bias.shape != (entries,):
            raise ValueError(f"bias: expected shape [{entries}], got {list(self.bias.shape)}")
        if self.softcap is not None:
            check_positive("softcap", self.softcap)
        check_positive("scale", self.scale)
        check_vocab_size(self.vocab_size, entries, "the rows of weight")

    @property
    def vocabulary(self) -> int:
        """How many entries have a probability: ``vocab_size``, or all of weight's."""
        return self.vocab_size or self.weight.shape[0]

    @property
    def width(self) -> int:
        """H, because logits are products."""
        return self.hidden.shape[-1]

    def autocast(self) -> Head:
        """The head in autocast's dtype where autocast is on. The casts are differentiable, so that gradients arrive in
        the parameters' own dtype.
        """
        dtype = autocast_dtype(self.hidden)
        if dtype is None:
            return self
        narrow = {name: getattr(self, name).to(dtype) for name in self.names if getattr(self, name) is not None}
        return replace(self, **narrow)

    @property
    def numbers(self) -> list[float]:
        """Soft-cap (0 for none), scale and vocabulary."""
        return [self.softcap or 0.0, self.scale, self.vocabulary]

    @classmethod
    def unpack(cls, tensors: list[Tensor], numbers: list[float]) -> Head:
        """The source of these tensors and numbers."""
        softcap, scale, vocabulary = numbers
        fields = dict(zip(cls.names, tensors, strict=False))
        return cls.trusted(**fields, softcap=softcap or None, scale=scale, vocab_size=int(vocabulary))

    def costs(self, backend: Backend, vocabulary: int, dtype: torch.dtype, largest: int, trained: bool) -> Costs:
        """See Source.costs."""
        width, operand = self.width, self.dtype
        kept = 0 if multiplies(self.weight) else vocabulary * width * operand.itemsize
        fixed, more = backend.products(self.device, operand).workspace(width, operand, dtype, trained)
        if trained and self.bias is not None:
            more += gemm.column_sums_row(vocabulary)
        row = row_bytes(vocabulary, self.device, dtype, largest)
        return Costs(kept, fixed, row + (1 + trained) * width * operand.itemsize + more)

    def producer(self, backend, index, vocabulary, buffer, needs=None, pieces=1) -> HeadProducer:
        """See Source.producer."""
        return HeadProducer(self, backend, index, vocabulary, buffer, needs or (False, False, False), pieces)

    @classmethod
    def from_model(cls, model, hidden: Tensor, vocab_size: int | None = None) -> Head:
        """The head of a transformers causal LM, with bias, soft-cap and scale as its own forward applies them.

        ``from_model.py`` says how these are found out. Every call notices a model that has changed. Code that
        torch.compile has compiled does not, because it has the numbers built in: after a change to the model's config,
        forward or hooks call ``torch.compiler.reset()``.

        PEFT's adapters on the output layer count as they do in the model's forward, and get their gradients
        (``output_layer.py``): a copy that is trained (modules_to_save), LoRA without making its full weight, any other
        that is linear in the hidden states (DoRA, IA3, trainable tokens) by its effective weight.

        Args:
            model: the causal LM; it may be wrapped by DDP, FSDP, DeepSpeed, torch.compile or PEFT.
            hidden: [..., H] the last hidden states of its base model.
            vocab_size: the real vocabulary (the tokenizer's) where the embedding is padded; by default the entries
                that the model's forward gives a logit.

        Raises:
            ValueError: vocab_size exceeds that default.
            RuntimeError: gradients are on, and the DDP around the model has never run: hidden did not come through it.
            TypeError: the model does something that no Head does, which the message names: its output embedding is more
                than a linear layer with PEFT's adapters or has hooks, its forward was replaced, it transforms the
                hidden states, or its logits are more than scaled and capped.
        """
        from .adapted import AdaptedHead  # a head itself

        refuse_unprepared(model, hidden)
        read = tail(model)
        if vocab_size is not None:
            check_count("vocab_size", vocab_size, 1, read.entries)
        used = multiplied(model, read.layer, hidden)
        bias = used.bias if used.bias is None or read.factor == 1 else used.bias / read.factor
        adapter = {} if used.inner is None else {"inner": used.inner, "outer": used.outer}
        return (AdaptedHead if adapter else cls)(
            hidden,
            used.weight,
            bias,
            softcap=read.softcap,
            scale=read.scale * read.factor,
            vocab_size=read.entries if vocab_size is None else vocab_size,
            **adapter,
        )


def multiplies(weight: Tensor) -> bool:
    """Whether products can read the weight in place, because one of its strides is 1."""
    return 1 in weight.stride()


class HeadProducer(Producer):
    """Multiplies hidden states into logits. Its gradients, where ``needs`` asks: of hidden, weight and bias."""

    def __init__(
        self,
        head: Head,
        backend: Backend,
        index: Tensor,
        vocabulary: int,
        buffer: Tensor,
        needs: tuple[bool, ...],
        pieces: int,
    ):
        super().__init__(backend, index, vocabulary, buffer)
        self.source = head.hidden
        weight = head.weight[:vocabulary]
        # not contiguous(), which leaves the strides of a weight of one number as they are
        self.weight = weight if multiplies(head.weight) else weight.clone(memory_format=torch.contiguous_format)
        self.bias = None if head.bias is None else head.bias[:vocabulary]
        self.scale, self.softcap = float(head.scale), head.softcap
        self.products = backend.products(head.device, head.dtype)
        self.d_hidden = self.d_weight = self.d_bias = None
        needs_hidden, needs_weight, needs_bias = needs
        if needs_hidden:
            self.d_hidden = torch.zeros_like(head.hidden, memory_format=torch.contiguous_format)
        if needs_weight:
            self.d_weight = gemm.WeightGradient(self.products, head.weight, vocabulary, pieces)
        if needs_bias:
            self.d_bias = torch.zeros_like(head.bias, dtype=torch.promote_types(head.dtype, torch.float32))
        self.powers = powers_like(head.hidden)

    def hidden(self, tokens: slice) -> Tensor:
        return take(self.source, self.index[tokens])

    def rows(self, tokens: slice, temperature: float, topk: int, gather: Tensor | None) -> Rows:
        logits = self.buffer[: tokens.stop - tokens.start]
        operands = self.hidden(tokens), self.weight, self.bias
        return self.backend.project(
            self.products, *operands, logits, self.scale, self.softcap, temperature, topk, gather
        )

    def add(self, tokens: slice, d_logits: Tensor, powers: Tensor | None) -> None:
        if self.d_hidden is not None:
            rows = self.products.multiply(d_logits, self.weight)
            self.d_hidden.view(-1, rows.shape[-1]).index_copy_(0, self.index[tokens], rows)
            if powers is not None:
                self.powers.view(-1).index_copy_(0, self.index[tokens], powers)
        if self.d_weight is not None:
            self.d_weight.add(d_logits, self.hidden(tokens), powers)
        if self.d_bias is not None:
            self.products.add_column_sums(d_logits, powers, self.d_bias[: self.vocabulary])

    def gradients(self) -> tuple[Gradient, ...]:
        weight = (self.d_weight.gradient, self.d_weight.factor) if self.d_weight else (None, 1.0)
        bias, factor = self.d_bias, 1.0
        if bias is not None:
            if self.source.dtype == torch.float16:
                factor = fp16.normalized(bias)
            bias = bias.to(self.source.dtype)
        return (self.d_hidden, self.powers), weight, (bias, factor)
