"""What an output layer multiplies: a linear layer's own tensors, or those of PEFT's adapters over it.

    modules_to_save     the active adapter's copy of the layer; the original where there is none
    LoRA, rsLoRA        two products, z = h W^T + u B^T with u = scaling * dropout(h) A^T: W + scaling B A is never made
    any other adapter   the effective weight, by the layer's own arithmetic: what it makes of the unit vectors

None of these packages is imported: layers are known by the package that they come from.

Axes: V vocabulary, H hidden, R ranks of all active adapters together; [...] leading dimensions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from .sharded import class_of

# Packages of peft.tuners whose layers are linear in the hidden states, each at its own position, draw no random numbers
# but in dropouts and leave the gradient to autograd. Lily routes, PVeRA draws, OSF projects gradients.
_LINEAR = "adalora boft deft fourierft hira hra ia3 loha lokr lora miss oft randlora shira trainable_tokens vera"
# The same of LoRA's variants. Arrow routes, aLoRA begins at a position, MonteCLoRA draws, VeLoRA replaces the gradient.
_LINEAR_VARIANTS = {"DoraLinearVariant", "KasaLinearVariant"}
# Its layers whose product is the base layer's and B A's.
_LOW_RANK = {
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.torchao.TorchaoLoraLinear",
}
# How torchao names what quantizes a layer's input, in the fields of its weight.
_OF_INPUTS = ("act_", "activation_", "input_")

Read = Callable[[Tensor], Tensor]


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
    return _is_from(layer, "peft")


def innermost(layer: nn.Module) -> nn.Module:
    """The layer below PEFT's whose sizes they have: the one that is used, where there are copies."""
    layer = _used(layer)
    return layer.get_base_layer() if is_adapter(layer) else layer


def product(layer: nn.Module, hidden: Tensor, read: Read) -> Product:
    """What ``layer`` multiplies hidden states [..., H] with, differentiable in its parameters.

    ``read`` makes a plain tensor of a parameter (``sharded.whole``).

    Raises:
        NotLinear: it is no such product, or not at the moment.
    """
    layer, base = _used(layer), innermost(layer)
    _check_values(base, hidden)
    if not is_adapter(layer):
        return _own(base, hidden, read)
    if layer.merged or layer.disable_adapters:
        if layer.merged and layer.disable_adapters:
            raise NotLinear("its adapters are disabled but still merged: call unmerge_adapter() on the PEFT model")
        return _own(base, hidden, read)
    if not _is_linear(layer) or layer.base_layer is not base:
        raise NotLinear(f"its output layer, {_kind(layer)}, is not known to be linear in the hidden states")
    variants = {type(v).__name__ for name, v in getattr(layer, "lora_variant", {}).items() if name in _active(layer)}
    if variants - _LINEAR_VARIANTS:
        raise NotLinear(f"its output layer has an adapter of the kind {', '.join(sorted(variants - _LINEAR_VARIANTS))}")
    low_rank = _kind(layer) in _LOW_RANK and not variants
    try:
        return _low_rank(layer, base, hidden, read) if low_rank else _effective(layer, base, hidden)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        raise NotLinear(f"its output layer, {_kind(layer)}, does not run on these hidden states ({said})") from error


def _is_linear(layer: nn.Module) -> bool:
    package, _, tuner = class_of(layer).__module__.rpartition(".")[0].rpartition(".")
    return package == "peft.tuners" and tuner in _LINEAR.split()


def _kind(layer: nn.Module) -> str:
    return f"{class_of(layer).__module__}.{class_of(layer).__qualname__}"


def _own(layer: nn.Module, hidden: Tensor, read: Read) -> Product:
    """Of a linear layer. Quantised weights are frozen: all of their values are made, in the dtype of the products."""
    four_bit = is_four_bit(layer)
    if four_bit:
        functional = sys.modules["bitsandbytes"].functional
        weight = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).detach().to(hidden.dtype)
    else:
        weight = layer.weight.detach().dequantize() if _is_of_torchao(layer.weight) else read(layer.weight)
    bias = None if layer.bias is None else read(layer.bias)
    return Product(weight, bias.to(hidden.dtype) if four_bit and bias is not None else bias)


def is_four_bit(layer: object) -> bool:
    """Whether it is bitsandbytes' linear layer of 4 bits, whose product is that of its weight's values."""
    return type(layer).__name__ == "Linear4bit" and _is_from(layer, "bitsandbytes")


def _check_values(base: nn.Module, hidden: Tensor) -> None:
    """Raises NotLinear where the values of a layer's weight are not here, or are not all that it multiplies."""
    weight, out = base.weight, "leave the output layer out of the quantization"
    if weight.is_meta and not hidden.is_meta and hasattr(base, "_hf_hook"):
        raise NotLinear(
            "accelerate has offloaded its output layer and loads it for its own forward alone: give that layer a "
            "device in device_map"
        )
    if is_four_bit(base):
        state = getattr(weight, "quant_state", None)
        if state is None:
            raise NotLinear("its output layer is not quantized yet: move the model to its device first")
        if getattr(state, "packing_format_for_cpu", False):
            raise NotLinear(
                "bitsandbytes has repacked its output layer, which it does on CPUs in a forward in evaluation mode: "
                f"load it again and call .train(), or {out}"
            )
    if not _is_of_torchao(weight):
        return
    if weight.requires_grad:
        raise NotLinear(f"its output layer's {type(weight).__name__} is quantized and trained: {out}")
    rounded = [name for name, value in vars(weight).items() if name.startswith(_OF_INPUTS) and value is not None]
    if rounded:
        raise NotLinear(f"its output layer's {type(weight).__name__} quantizes hidden states too ({rounded[0]}): {out}")


def _is_of_torchao(weight: Tensor) -> bool:
    return type(weight) not in (Tensor, nn.Parameter) and type(weight).__module__.partition(".")[0] == "torchao"


def _is_from(thing: object, package: str) -> bool:
    return any(each.__module__.partition(".")[0] == package for each in type(thing).__mro__)


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


def _low_rank(layer: nn.Module, base: nn.Module, hidden: Tensor, read: Read) -> Product:
    """Of LoRA. u is made with the adapters' own dropout, which is the one that the layer itself would have."""
    inner, outer, (weight, bias, *_) = [], [], _own(base, hidden, read)
    for name in _active(layer):
        if name not in layer.lora_A:
            continue
        a, b, scaling = read(layer.lora_A[name].weight), layer.lora_B[name], layer.scaling[name]
        u = scaling * linear(layer.lora_dropout[name](hidden.to(a.dtype)), a)
        inner.append(u.to(hidden.dtype))
        outer.append(read(b.weight).to(hidden.dtype))
        if b.bias is not None:
            shift = (scaling * read(b.bias)).to(hidden.dtype)
            bias = shift if bias is None else bias + shift
    if not inner:
        return Product(weight, bias)
    one = len(inner) == 1
    return Product(weight, bias, inner[0] if one else torch.cat(inner, -1), outer[0] if one else torch.cat(outer, -1))


def _effective(layer: nn.Module, base: nn.Module, hidden: Tensor) -> Product:
    """Of any adapter, by what the layer makes of the unit vectors: as much work as H tokens."""
    dropped = _dropouts(layer) if layer.training else []
    if dropped:
        raise NotLinear(f"its output layer, {_kind(layer)}, has {dropped[0]}; set it to 0 or call .eval()")
    dtype = base.weight.dtype if base.weight.is_floating_point() else hidden.dtype
    unit = torch.eye(base.in_features, dtype=dtype, device=hidden.device)
    biases = [name for name, each in layer.named_parameters() if each is base.bias]
    others = {name for name, _ in layer.named_parameters() if name.endswith("bias")} - set(biases)
    if others:
        raise NotLinear(f"its output layer, {_kind(layer)}, has a bias of its own, {', '.join(sorted(others))}")
    without = {name: torch.zeros_like(base.bias) for name in biases}
    weight = torch.func.functional_call(layer, without, (unit,)).t()
    return Product(weight, layer(torch.zeros_like(unit[:1]))[0] if biases else None)


def _dropouts(layer: nn.Module) -> list[str]:
    """What of the layer draws random numbers in training: modules, and PEFT's own probabilities by adapter."""
    found = [name for name, each in layer.named_modules() if "Dropout" in type(each).__name__ and getattr(each, "p", 1)]
    for name, by_adapter in vars(layer).items():
        if name.endswith("dropout") and isinstance(by_adapter, dict) and any(by_adapter.values()):
            found.append(name)
    return found
