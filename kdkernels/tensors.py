"""Tensors whose storage holds their values, which is all that row kernels and products can read; parts of tensors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
READ_INSIDE = "read it inside the wrapped forward, kd.through(wrapper, function, ...)"
_WAYS_OUT = (
    f"pass kd.Head.from_model(model, hidden), which reads it right; or {READ_INSIDE}, where FSDP2 has gathered it; or, "
    "of tensor parallelism, kd.Head(hidden, weight.to_local(), vocab_size=..., group=weight.device_mesh.get_group())"
)


def sliced(values: Tensor, some: slice) -> Tensor:
    """values[some], which is ``values`` itself, without an operation, where the slice is all of it."""
    return values if some == slice(0, values.shape[0]) else values[some]


def check_floating(name: str, tensor: object) -> None:
    """Refuses what is no dense tensor of floating-point numbers, and says how to get one: a product over a shard or
    over packed bits fails much later, or does not fail at all.
    """
    if type(tensor) in _PLAIN and tensor.dtype in _DTYPES and tensor.layout is torch.strided:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a floating-point tensor, got {type(tensor).__name__}")
    kind = type(tensor)
    if kind not in _PLAIN and (way_out := _way_out(name, tensor)):
        raise TypeError(f"{name}: expected a plain tensor, got {kind.__module__}.{kind.__qualname__}{way_out}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"{name}: expected a floating-point tensor of 16, 32 or 64 bits, got {tensor.dtype}; quantized values have "
            "to be dequantized first"
        )
    if tensor.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense tensor, got {tensor.layout}; pass {name}.to_dense()")


def check_integral(name: str, ids: object) -> None:
    """Refuses what is no tensor of ids or positions, which are int64 or int32."""
    if not isinstance(ids, Tensor) or ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected an int64 or int32 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a torch.distributed.tensor.DTensor, found out without importing that."""
    return hasattr(type(tensor), "full_tensor")


def check_gradient(name: str, tensor: Tensor, group: object) -> None:
    """Refuses a tensor gathered from shards where nothing says how the gradients of all processes become one, and one
    that is a shard itself but has no ``group``.

    ``full_tensor()`` takes the gradient for the same on every process, and keeps this process's own: under FSDP2, where
    each has tokens of its own, the shards would get a part of it.
    """
    node = None if torch.compiler.is_compiling() else tensor.grad_fn
    while node is not None and type(node).__name__ != "_ToTorchTensorBackward":  # back over casts, views and the like
        before = [each for each, _ in node.next_functions if each is not None]
        node = before[0] if len(before) == 1 else None
    if node is None:
        return
    mesh, placements = node.dtensor_spec.mesh, node.dtensor_spec.placements
    if group is None and any(not each.is_replicate() and mesh.size(i) > 1 for i, each in enumerate(placements)):
        raise TypeError(f"{name}: got the shard of this process alone; {_WAYS_OUT}")
    if node.grad_placements is None and any(
        each.is_replicate() and mesh.size(i) > 1 for i, each in enumerate(placements)
    ):
        raise TypeError(
            f"{name}: it was gathered from shards without saying how its gradient is put together; pass "
            f"kd.Head.from_model(model, hidden), which knows, or {name}.full_tensor(grad_placements=...): "
            "[Partial('avg')] where each process has tokens of its own (FSDP2), [Replicate()] where all have the same "
            "(tensor parallelism), for each dimension of the mesh"
        )


def _way_out(name: str, tensor: Tensor) -> str | None:
    """What to do about a subclass of Tensor that does not hold its values as such, None where it does."""
    kind = type(tensor)
    if is_sharded(tensor):
        if name not in ("weight", "bias"):
            return f", of which this process holds a shard; pass {name}.full_tensor()"
        return f", of which this process holds a shard; {_WAYS_OUT}"
    if getattr(tensor, "quant_state", None) is not None:  # bitsandbytes packs 4 bits into any dtype
        return (
            f", which is quantized; pass bitsandbytes.functional.dequantize_4bit({name}.data, {name}.quant_state), or "
            "leave the lm_head out of the quantization"
        )
    if kind.dequantize is not Tensor.dequantize:  # torchao
        return f", which is quantized; pass {name}.dequantize(), or leave the lm_head out of the quantization"
    if hasattr(kind, "materialize"):
        return ", a lazy parameter that has no values yet; run the model once"
    # what torch itself computes with while it traces, and subclasses that only watch functions
    if kind.__module__.startswith("torch._subclasses") or kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        return None
    return f"; pass the tensor of its values ({name}.to(...) or what its class has for it)"


def check_still_there(weight: Tensor, width: int) -> None:
    """Refuses the weight [V, H] of a head that has outlived the forward in which ZeRO-3 or FSDP2 had gathered it."""
    if weight.shape[1:] != (width,) or (weight.numel() and not weight.untyped_storage().size()):
        raise RuntimeError(
            f"weight: it had its values when the head was made, and has none now; use the head where it was read, and "
            f"{READ_INSIDE}"
        )


def where_the_rows_are(weight: Tensor) -> str:
    """The way out for a weight [V, H] that has another shape because it is elsewhere; empty where nothing says so."""
    if hasattr(weight, "ds_id"):
        return (
            f"; ZeRO-3 holds its rows: {READ_INSIDE}; or outside under "
            "deepspeed.zero.GatheredParameters([weight]), the backward included"
        )
    if isinstance(weight, nn.Parameter) and weight.dim() < 2:
        return (
            f"; if FSDP shards it: {READ_INSIDE}; a frozen one also under FullyShardedDataParallel.summon_full_params"
        )
    return ""
