"""What a forward and a backward pass take beyond weights and gradients, found out without either: the model runs on the
meta device, whose tensors have sizes and no memory, and every tensor that it makes is counted while it lives.

So the figures are those of the model's own code, whatever its layers are, attention implementation and gradient
checkpointing included; nothing is fitted. Not seen is what a kernel takes inside itself.

Axes: B sequences, L positions, D entries of an attention head, S heads.
"""

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kdkernels.errors import InputError
from kdkernels.rollouts.local import evaluating
from kdkernels.sources.from_model import trunk


@dataclass(frozen=True)
class Pass:
    """A pass of a trunk (the model without its head). Bytes: `kept` for the backward pass, when the forward is over,
    the hidden states included; `forward`, `backward`: at most at a time. `flops`: of all products, a multiplication and
    an addition being two; `backward_flops`: those of the backward pass, what it computes again included. `written`:
    bytes of all tensors that both make.
    """

    kept: int
    forward: int
    backward: int
    flops: int
    backward_flops: int
    written: int


def forward_backward(model: PreTrainedModel, sequences: int, length: int) -> Pass:
    """A training step's pass over a micro-batch [B, L] of a model on the meta device. Its gradients are there already,
    from the micro-batch before.
    """
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
    with _Live(model) as live, _Attention(live):
        hidden = _hidden(model, sequences, length)
        kept, forward, flops = live.bytes, live.peak, live.flops
        live.peak = live.bytes
        gradient = torch.empty_like(hidden)
        hidden.backward(gradient)
    for parameter in model.parameters():
        parameter.grad = None
    return Pass(kept, forward, live.peak, flops, live.flops - flops, live.written)


@torch.no_grad()
def forward(model: PreTrainedModel, sequences: int, length: int) -> Pass:
    """A pass without gradients; `kept` are the hidden states."""
    with evaluating(model), _Live(model) as live, _Attention(live):
        hidden = _hidden(model, sequences, length)
        return Pass(hidden.nbytes, live.peak, 0, live.flops, 0, live.written)


@torch.no_grad()
def cache_bytes(model: PreTrainedModel) -> int:
    """Bytes of one token's keys and values in all layers."""
    with evaluating(model):  # with gradient checkpointing, a model in training keeps none
        cache = trunk(model)(input_ids=_ids(1, 1), use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def _ids(sequences: int, length: int) -> Tensor:
    return torch.zeros(sequences, length, dtype=torch.int64, device="meta")


def _hidden(model: PreTrainedModel, sequences: int, length: int) -> Tensor:
    """The last hidden states [B, L, H] of padded sequences. Raises InputError."""
    mask = torch.ones(sequences, 1, length, length, dtype=torch.bool, device="meta")
    try:
        return trunk(model)(input_ids=_ids(sequences, length), attention_mask=mask, use_cache=False).last_hidden_state
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise InputError(
            f"{type(model).__name__}: what it takes cannot be counted, because it does not run without weights "
            f"(kdkernels train --dry-run shows what needs no run): {error}"
        ) from error


class _Live(TorchDispatchMode):
    """`bytes` of the tensors made since it was entered that are still there, `peak` of them at a time; `flops` of the
    products; `written`: bytes of all.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.bytes = self.peak = self.flops = self.written = 0
        weights = list(model.parameters())
        there = [*weights, *model.buffers(), *(one.grad for one in weights if one.grad is not None)]
        self.seen: dict[int, object] = {one.untyped_storage()._cdata: one for one in there}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if count := flop_registry.get(function._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=out)
        for each in (out,) if isinstance(out, Tensor) else torch.utils._pytree.tree_leaves(out):
            if isinstance(each, Tensor):
                self._count(each.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def gone(_) -> None:
            del self.seen[key]
            self.bytes -= size

        self.seen[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.written += size
        self.peak = max(self.peak, self.bytes)


class _Attention:
    """Attention by a fused kernel, whose scores are never in memory, in place of transformers' sdpa: on the meta device
    PyTorch would take the kernel that writes them. Counted for it: 4 B S L^2 D in the forward pass, in the backward 5/2
    of that.
    """

    def __init__(self, live: _Live):
        self.live = live

    def __enter__(self) -> "_Attention":
        ALL_ATTENTION_FUNCTIONS["sdpa"] = self._attend  # for this process's interface, until it is deleted
        return self

    def __exit__(self, *_: object) -> None:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]

    def _attend(self, module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **_) -> tuple[Tensor, None]:
        """Of [B, S, L, D] (keys and values of fewer heads, which are repeated where there is a mask) [B, L, S, D]."""
        groups = query.shape[1] // key.shape[1]
        if groups > 1 and attention_mask is not None:
            key, value = (each.repeat_interleave(groups, dim=1) for each in (key, value))
        return _Fused.apply(query, key, value, self.live), None


class _Fused(torch.autograd.Function):
    """Keeps for its backward what fused kernels keep: queries, keys, values, output, and a number for each query."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, live: _Live) -> Tensor:
        ctx.live, ctx.flops = live, 4 * query.numel() * key.shape[-2]
        live.flops += ctx.flops
        batch, heads, length, _ = query.shape
        out = query.new_empty(batch, length, heads, value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(batch, heads, length, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple:
        ctx.live.flops += ctx.flops * 5 // 2  # the scores once more, and the four products of the gradients
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None
