"""Tensors whose storage holds their values, which is all that row kernels and products can read."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)
_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


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


def _way_out(name: str, tensor: Tensor) -> str | None:
    """What to do about a subclass of Tensor that does not hold its values as such, None where it does."""
    kind = type(tensor)
    if hasattr(kind, "full_tensor"):  # torch.distributed.tensor.DTensor, without importing it
        return (
            f", of which this process holds a shard; pass {name}.full_tensor(), or compute {name} inside the forward "
            "that FSDP2 gathers it for"
        )
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


def where_the_rows_are(weight: Tensor) -> str:
    """The way out for a weight [V, H] that has another shape because it is elsewhere; empty where nothing says so."""
    if hasattr(weight, "ds_id"):
        return (
            "; ZeRO-3 holds its rows: read it under deepspeed.zero.GatheredParameters([weight]), or inside the forward "
            "of the module that the engine wraps"
        )
    if isinstance(weight, nn.Parameter) and weight.dim() < 2:
        return (
            "; if FSDP shards it: read it inside the forward of the module that FSDP wraps, or under "
            "FullyShardedDataParallel.summon_full_params"
        )
    return ""
