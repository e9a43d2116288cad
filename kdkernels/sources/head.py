"""A distribution over the next token from hidden states and an lm_head.

Axes: N tokens, n tokens of a chunk, V vocabulary, H hidden; [...] leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import check_count, check_positive
from ..compute import fp16, gemm
from ..kernels import Backend, Rows
from ..tensors import check_floating, check_gradient, check_still_there, sliced, where_the_rows_are
from ..wrappers import refuse_unprepared
from .base import Costs, Gradient, Producer, Source, autocast_dtype, check_vocab_size, powers_like, row_bytes, take
from .from_model import multiplied, tail
from .hidden import hidden_states
from .parallel import check_group, packed_group, unpacked_group
from .sharded import divided

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


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
        group: a process group whose ranks divide the vocabulary (tensor parallelism, parallel.py): ``weight`` and
            ``bias`` are this rank's entries, those of all ranks in the order of ranks are the whole lm_head, and
            ``vocab_size``, which then has to be given, is of the whole. All ranks have the same hidden states, targets
            and options, and each gets the whole gradient of hidden and that of its own weights.

    Raises:
        TypeError: a tensor is quantized or a shard (the message says how to get a plain one), hidden, weight and bias
            have different dtypes and autocast is off, or group is no process group.
        ValueError: shapes or devices do not fit, softcap or scale is not positive, or vocab_size is outside [1, V].
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocab_size: int | None = None
    group: ProcessGroup | None = None

    names = ("hidden", "weight", "bias")
    entries = ("weight", "bias")  # those of ``names`` whose first dimension is the vocabulary
    axis = "H"
    trainable = True

    def __post_init__(self):
        for name, tensor in (("hidden", self.hidden), ("weight", self.weight), ("bias", self.bias)):
            if tensor is None and name == "bias":
                continue
            check_floating(name, tensor)
            if name != "hidden":
                check_gradient(name, tensor, self.group)
            if tensor.device != self.hidden.device:
                lost = "; it has no values there: load it first" if tensor.is_meta else ""
                raise ValueError(
                    f"{name}: expected device {self.hidden.device} (that of hidden), got {tensor.device}{lost}"
                )
            if not all(autocast_dtype(t) for t in (tensor, self.hidden)):
                _check_dtype(name, tensor, self.hidden.dtype)
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
        if self.group is None:
            check_vocab_size(self.vocab_size, entries, "the rows of weight")
        else:
            check_group(self.group, self.vocab_size)

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
            own = self.dtype
            for name, tensor in zip(self.names, self.tensors, strict=True):
                if tensor is not None:  # the head may have been made where autocast was on
                    _check_dtype(name, tensor, own)
            return self
        narrow = {name: getattr(self, name).to(dtype) for name in self.names if getattr(self, name) is not None}
        return replace(self, **narrow)

    @property
    def numbers(self) -> list[float]:
        """Soft-cap (0 for none), scale, vocabulary and, if there is a group, the bytes of its name."""
        return [self.softcap or 0.0, self.scale, self.vocabulary, *packed_group(self.group)]

    @classmethod
    def unpack(cls, tensors: list[Tensor], numbers: list[float]) -> Head:
        """The source of these tensors and numbers."""
        softcap, scale, vocabulary, *name = numbers
        fields = dict(zip(cls.names, tensors, strict=False))
        group = unpacked_group(name)
        return cls.trusted(**fields, softcap=softcap or None, scale=scale, vocab_size=int(vocabulary), group=group)

    def part(self, entries: slice) -> Head:
        """The rows of weight for these entries: all that this rank has, where the head itself has a group."""
        own = self.__dict__ | {"vocab_size": entries.stop - entries.start, "group": None}
        if self.group is None:
            own |= {name: None if (t := getattr(self, name)) is None else t[entries] for name in self.entries}
        return self.trusted(**own)

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

        ``from_model.py`` says how these are found out, in every call. Code that torch.compile has compiled has them
        built in: after a change to the model's config, forward or hooks call ``torch.compiler.reset()``.

        PEFT's adapters on the output layer count as in the model's forward, and get gradients (``output_layer.py``): a
        copy that is trained (modules_to_save), LoRA without making its full weight, any other that is linear (DoRA,
        IA3, trainable tokens) by its effective weight. Quantised weights that the layer multiplies with as they are
        (bitsandbytes' 4 bits, torchao's weight-only) are dequantised, all [V, H] of them, and get no gradient.

        Args:
            model: the causal LM; it may be wrapped by DDP, FSDP, DeepSpeed, torch.compile or PEFT. Weights that
                FSDP2 has sharded are gathered, and their gradients reduced; where a tensor-parallel plan divides the
                rows of the output layer, the head has the plan's group (``sharded.py``).
            hidden: [..., H] the last hidden states of its base model.
            vocab_size: the tokenizer's, where the embedding is padded; by default the entries that get a logit.

        Raises:
            ValueError: vocab_size exceeds that default.
            RuntimeError: gradients are on, and the DDP around the model has never run: hidden did not come through it.
            TypeError: the model does what no Head does, and the message names: its output layer is more than linear
                with PEFT's adapters, has hooks, is offloaded or quantises hidden states; its forward was replaced; it
                transforms the hidden states, or its logits are more than scaled and capped.
        """
        from .adapted import AdaptedHead  # a head itself

        if not isinstance(hidden, Tensor):
            raise TypeError(
                "hidden: expected last hidden states [..., H], such as kd.hidden_states(model, **inputs), got "
                f"{type(hidden).__name__}"
            )
        refuse_unprepared(model, hidden)
        read = tail(model)
        if vocab_size is not None:
            check_count("vocab_size", vocab_size, 1, read.entries)
        hidden, group = divided(read.layer, hidden)
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
            group=group,
            **adapter,
        )

    @classmethod
    def of(cls, model, /, *, vocab_size: int | None = None, **inputs) -> Head:
        """The head of a transformers model over the last hidden states that it has for ``inputs``.

            with torch.no_grad():
                teacher = kd.Head.of(teacher_model, input_ids=ids, attention_mask=attention)

        ``from_model`` and ``kd.hidden_states`` in one call: they say which models, and what they raise. Gradients are
        those of the mode that it is called in: a teacher's forward needs no graph.

        Args:
            model, vocab_size: as for ``from_model``.
            inputs: what the model's forward takes, as for ``kd.hidden_states``.
        """
        return cls.from_model(model, hidden_states(model, **inputs), vocab_size=vocab_size)

    def verify(self, model, /, tokens: int = 8, **inputs) -> float:
        """Compares this head's logits with those of the model's own forward, at a few tokens.

        For once, before a long training: with a model that ``from_model`` has not seen before, weights or wrappers of
        one's own, a head that was made by hand. The model's forward runs once over all of ``inputs``, without
        gradients, and makes all of their logits: a short batch is enough.

            head = kd.Head.of(model, **inputs)
            head.verify(model, **inputs)

        Args:
            model: the model, in the mode (train, eval) and under the wrappers that made the hidden states.
            tokens: how many are compared, spread over the positions that ``attention_mask`` counts.
            inputs: what the model's forward takes; the head's hidden states are of the same.

        Returns:
            The largest difference between two logits, as a part of their token's largest logit.

        Raises:
            ValueError: they part, further than rounding in their dtype explains (fp64 1e-9, fp32 1e-4, fp16 5e-3, bf16
                3e-2), at the position and entry that the message names; or the hidden states are not of these inputs.
        """
        from .verify import verify

        return verify(self, model, tokens, inputs)


def _check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(
            f"{name}: expected dtype {dtype} (that of hidden), got {tensor.dtype}; they may differ only where autocast "
            "is on, for the head as for the loss"
        )


def multiplies(weight: Tensor) -> bool:
    """Whether products can read the weight in place, because one of its strides is 1."""
    return 1 in weight.stride()


class StateGradient:
    """The gradient of hidden states [..., H] whose products with a weight [V, H] are logits: d_logits @ weight.

    Where a group divides the vocabulary, those of all ranks are added up, in fp32 before they are rounded.
    """

    def __init__(self, states: Tensor, backend: Backend, products: gemm.Torch, index: Tensor):
        self.products, self.index, self.shards = products, index, backend.shards
        self.gradient = torch.zeros_like(states, memory_format=torch.contiguous_format)
        self.powers = powers_like(states)
        self.parts = None  # [N, H] of this rank
        if self.shards:
            wide = torch.promote_types(states.dtype, torch.float32)
            self.parts = states.new_empty((len(index), states.shape[-1]), dtype=wide)

    def add(self, tokens: slice, d_logits: Tensor, weight: Tensor, powers: Tensor | None) -> None:
        """See Producer.add."""
        if self.parts is None:
            self._put(sliced(self.index, tokens), self.products.multiply(d_logits, weight))
        else:
            self.parts[tokens] = self.products.multiply(d_logits, weight, self.parts.dtype)
        if powers is not None:
            self.powers.view(-1).index_copy_(0, self.index[tokens], powers)

    def _put(self, at: Tensor, rows: Tensor) -> None:
        self.gradient.view(-1, rows.shape[-1]).index_copy_(0, at, rows)

    def finished(self) -> Gradient:
        """The gradient of all tokens that were added."""
        if self.parts is not None:
            self.shards.add_up_(self.parts)
            self._put(self.index, self.parts.to(self.gradient.dtype))
        return self.gradient, self.powers


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
        check_still_there(head.weight, head.width)
        super().__init__(backend, index, vocabulary, buffer)
        self.source = head.hidden
        weight = sliced(head.weight, slice(0, vocabulary))
        # not contiguous(), which leaves the strides of a weight of one number as they are
        self.weight = weight if multiplies(head.weight) else weight.clone(memory_format=torch.contiguous_format)
        self.bias = None if head.bias is None else head.bias[:vocabulary]
        self.scale, self.softcap = float(head.scale), head.softcap
        self.products = backend.products(head.device, head.dtype)
        self.d_hidden = self.d_weight = self.d_bias = None
        needs_hidden, needs_weight, needs_bias = needs
        if needs_hidden:
            self.d_hidden = StateGradient(head.hidden, backend, self.products, index)
        if needs_weight:
            self.d_weight = gemm.WeightGradient(self.products, head.weight, vocabulary, pieces)
        if needs_bias:
            self.d_bias = torch.zeros_like(head.bias, dtype=torch.promote_types(head.dtype, torch.float32))

    def hidden(self, tokens: slice) -> Tensor:
        return take(self.source, sliced(self.index, tokens))

    def rows(self, tokens: slice, temperature: float, topk: int, gather: Tensor | None) -> Rows:
        logits = sliced(self.buffer, slice(0, tokens.stop - tokens.start))
        operands = self.hidden(tokens), self.weight, self.bias
        return self.backend.project(
            self.products, *operands, logits, self.scale, self.softcap, temperature, topk, gather
        )

    def add(self, tokens: slice, d_logits: Tensor, powers: Tensor | None) -> None:
        if self.d_hidden is not None:
            self.d_hidden.add(tokens, d_logits, self.weight, powers)
        if self.d_weight is not None:
            self.d_weight.add(d_logits, self.hidden(tokens), powers)
        if self.d_bias is not None:
            self.products.add_column_sums(d_logits, powers, self.d_bias[: self.vocabulary])

    def gradients(self) -> tuple[Gradient, ...]:
        hidden = self.d_hidden.finished() if self.d_hidden else (None, 1.0)
        weight = (self.d_weight.gradient, self.d_weight.factor) if self.d_weight else (None, 1.0)
        bias, factor = self.d_bias, 1.0
        if bias is not None:
            if self.source.dtype == torch.float16:
                factor = fp16.normalized(bias)
            bias = bias.to(self.source.dtype)
        return hidden, weight, (bias, factor)


def plain(source: object, name: str) -> Head:
    """`source`, if it is a kd.Head of hidden states and whole weights and no more. Raises TypeError, naming `name`."""
    if type(source) is not Head or source.group is not None:
        raise TypeError(
            f"{name}: expected a kd.Head whose whole weight is here, got {type(source).__name__}; merge its adapter, "
            "or give it to one process"
        )
    return source
