"""What an output layer multiplies: a linear layer's own tensors, or those of PEFT's adapters over it.

    modules_to_save     the active adapter's copy of the layer; the original where there is none
    LoRA, rsLoRA        two products, z = h W^T + u B^T with u = scaling * dropout(h) A^T: W + scaling B A is never made
    any other adapter   the effective weight, by the layer's own arithmetic: what it makes of the unit vectors

PEFT is not imported: its layers are known by the package that they come from.

Axes: V vocabulary, H hidden, R ranks of all active adapters together; [...] leading dimensions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

# Variants of LoRA that are linear in the hidden states and depend on nothing else. Others route tokens (Arrow), begin
# at a position (aLoRA), draw random numbers (MonteCLoRA) or replace the gradient (VeLoRA).
_LINEAR_VARIANTS = {"DoraLinearVariant", "MiCALinearVariant", "KasaLinearVariant"}


class Product(NamedTuple):
    """logits = hidden @ weight.T + inner @ outer.T + bias"""

    weight: Tensor  # [V, H]
    bias: Tensor | None  # [V]
    inner: Tensor | None = None  # [..., R], of these hidden states
    outer: Tensor | None = None  # [V, R]


class NotLinear(Exception):
    """Why an output layer is no product with a weight."""


def is_adapter(layer: object) -> bool:
    """Whether it is a layer that PEFT has put in place of another."""
    return any(each.__module__.partition(".")[0] == "peft" for each in type(layer).__mro__)


def innermost(layer: nn.Module) -> nn.Module:
    """The layer below PEFT's whose sizes they have: the one that is used, where there are copies."""
    layer = _used(layer)
    return layer.get_base_layer() if is_adapter(layer) else layer


def product(layer: nn.Module, hidden: Tensor) -> Product:
    """What ``layer`` multiplies hidden states [..., H] with, differentiable in its parameters.

    Raises:
        NotLinear: it is no such product, or not at the moment.
    """
    layer = _used(layer)
    if not is_adapter(layer):
        return Product(layer.weight, layer.bias)
    base, kind = layer.get_base_layer(), f"{type(layer).__module__}.{type(layer).__qualname__}"
    if layer.merged or layer.disable_adapters:
        if layer.merged and layer.disable_adapters:
            raise NotLinear("its adapters are disabled but still merged: call unmerge_adapter() on the PEFT model")
        return Product(base.weight, base.bias)
    variants = {type(v).__name__ for name, v in getattr(layer, "lora_variant", {}).items() if name in _active(layer)}
    if variants - _LINEAR_VARIANTS:
        raise NotLinear(f"its output layer has an adapter of the kind {', '.join(sorted(variants - _LINEAR_VARIANTS))}")
    if kind == "peft.tuners.lora.layer.Linear" and not variants and layer.base_layer is base:
        return _low_rank(layer, base, hidden)
    return _effective(layer, base, hidden, kind)


def _used(layer: nn.Module) -> nn.Module:
    """The layer that runs where PEFT trains a copy (modules_to_save) or some of the rows (trainable tokens)."""
    if not is_adapter(layer):
        return layer
    if hasattr(layer, "token_adapter"):
        return layer.token_adapter
    if not hasattr(layer, "modules_to_save"):
        return layer
    names, copies = layer.active_adapters, layer.modules_to_save
    if layer.disable_adapters or not names or any(name not in copies for name in names):
        return layer.original_module
    return copies[names[0]]


def _active(layer: nn.Module) -> list[str]:
    """The names of the active adapters."""
    names = layer.active_adapters
    return [names] if isinstance(names, str) else names


def _low_rank(layer: nn.Module, base: nn.Module, hidden: Tensor) -> Product:
    """Of LoRA. The adapters' own modules make u, so that dropout is the one that the layer itself would have."""
    inner, outer, bias = [], [], base.bias
    for name in _active(layer):
        if name not in layer.lora_A:
            continue
        a, b, scaling = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
        u = scaling * a(layer.lora_dropout[name](hidden.to(a.weight.dtype)))
        inner.append(u.to(hidden.dtype))
        outer.append(b.weight.to(hidden.dtype))
        if b.bias is not None:
            shift = (scaling * b.bias).to(hidden.dtype)
            bias = shift if bias is None else bias + shift
    if not inner:
        return Product(base.weight, bias)
    one = len(inner) == 1
    return Product(
        base.weight, bias, inner[0] if one else torch.cat(inner, -1), outer[0] if one else torch.cat(outer, -1)
    )


def _effective(layer: nn.Module, base: nn.Module, hidden: Tensor, kind: str) -> Product:
    """Of any adapter, by what the layer makes of the unit vectors: as much work as H tokens."""
    dropped = [
        name for name, each in layer.named_modules() if isinstance(each, nn.Dropout) and each.p and each.training
    ]
    if dropped:
        raise NotLinear(f"its output layer, {kind}, has a dropout ({dropped[0]}); set it to 0 or call .eval()")
    width = hidden.shape[-1]
    biases = [name for name, each in layer.named_parameters() if each is base.bias]
    without = {name: torch.zeros_like(base.bias) for name in biases}
    try:
        unit = torch.eye(width, dtype=hidden.dtype, device=hidden.device)
        weight = torch.func.functional_call(layer, without, (unit,)).t()
        bias = layer(hidden.new_zeros(1, width))[0] if biases else None
        linear_too = hidden.is_meta or _is_linear(layer, base, weight, bias)
    except Exception as error:  # a layer may do anything with its input, and need other arguments
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise NotLinear(f"its output layer, {kind}, cannot be read ({said})") from error
    if not linear_too:
        raise NotLinear(f"its output layer, {kind}, is not linear in the hidden states")
    return Product(weight, bias)


@torch.no_grad()
def _is_linear(layer: nn.Module, base: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the effective weight is all that the layer does, by some hidden states: what is left over has to be small
    beside what the adapter changes, which is nothing at first, or be rounding.
    """
    width = weight.shape[1]
    some = (torch.arange(4 * width, device=weight.device).reshape(4, width) * 37 % 65 - 32).to(weight.dtype) / 16
    own, before = layer(some).double(), base(some).double()
    left, changed = (own - linear(some, weight, bias).double()).norm(), (own - before).norm()
    rounding = 8 * torch.finfo(weight.dtype).eps * (own.norm() + before.norm())
    return bool(left <= 0.05 * changed + rounding)
