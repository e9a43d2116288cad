"""What a transformers causal LM does between its trunk and its logits, measured by running its own forward.

Names in configs do not say it: ``logits_scaling`` divides in one model and multiplies in another, a vision model's text
config has a soft-cap that its forward never applies, and a few models transform the hidden states once more. So the
forward itself runs, once for each model, on a copy of the model's outermost modules in which stand-ins for trunk and
output layer return known numbers. No weight is read. So it works wherever the weights are (on another device, in
shards, nowhere at all), and costs nothing but Python and a few vectors of V numbers.

Axes: T positions, V vocabulary, H hidden.
"""

from __future__ import annotations

import inspect
import math
import weakref
from functools import partial
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import output_layer, sharded


class Tail(NamedTuple):
    """logits = softcap * tanh(scale * layer(factor * hidden) / softcap), of which the first ``entries`` are real."""

    layer: nn.Module  # linear, or PEFT's over a linear one
    factor: float
    scale: float
    softcap: float | None
    entries: int


def trunk(model: nn.Module) -> nn.Module:
    """The module whose last hidden states the head multiplies: ``base_model``, or what the model has instead.

    A few models name a base model that they do not have (Llama 4's and Mllama's text models); their ``base_model`` is
    the model itself.

    Raises:
        TypeError: there is no such module.
    """
    model = unwrapped(model)
    for find in (
        lambda: model.base_model,
        lambda: model.get_decoder(),
        lambda: model.model,
    ):
        try:
            found = find()
        except AttributeError:
            continue
        if isinstance(found, nn.Module) and found is not model:
            return found
    raise _refusal(model, "it has no base model below its head")


def tail(model: nn.Module) -> Tail:
    """How ``model`` turns its trunk's last hidden states into logits.

    Raises:
        TypeError: it does something that no ``kd.Head`` does, which the message names.
    """
    model = unwrapped(model)
    numbers = _numbers(model)
    return Tail(model.get_output_embeddings(), *numbers)


def multiplied(model: nn.Module, layer: nn.Module, hidden: Tensor) -> output_layer.Product:
    """What the output layer of ``model`` multiplies hidden states [..., H] with, adapters included, shards gathered.

    Raises:
        TypeError: it is no product with a weight.
    """
    try:
        return output_layer.product(layer, hidden, partial(sharded.whole, model, layer, hidden))
    except output_layer.NotLinear as error:
        raise _refusal(unwrapped(model), str(error)) from error


def _numbers(model: nn.Module) -> tuple[float, float, float | None, int]:
    """Factor, scale, soft-cap and entries: measured in the first call, and again when the model has changed."""
    layer = _output_layer(model)
    for name, module in (("the model", model), *(("its output layer", each) for each in layer.modules())):
        for hooks in (
            module._forward_pre_hooks,
            module._forward_hooks,
            module._backward_pre_hooks,
            module._backward_hooks,
        ):
            for hook in hooks.values():
                if not _is_plumbing(hook):
                    raise _refusal(model, f"{name} has a hook, {_name(hook)}, which nobody would call")
    state, known = _state(model, layer), _KNOWN.setdefault(model, {})
    before, numbers = known.get(model.training, (None, None))  # with dropout, training is another forward
    if before != state:
        numbers = _measure(model, layer)
        known[model.training] = state, numbers
    return numbers


# As torch.compiler.assume_constant_result does, without loading the compiler: compiled code has the numbers built in.
_numbers._dynamo_marked_constant = True
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[bool, tuple]] = weakref.WeakKeyDictionary()


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model inside DDP, FSDP, DeepSpeed's engine, torch.compile's or PEFT's wrapper."""
    while not hasattr(type(model), "get_output_embeddings"):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None or inner is model:
            break
        model = inner
    return model


def _output_layer(model: nn.Module) -> nn.Module:
    layer = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    below = output_layer.innermost(layer)
    # A subclass that multiplies as nn.Linear does will do: parametrized weights (read as multiplied), and FSDP2's.
    plain = isinstance(below, nn.Linear) and type(below).forward is nn.Linear.forward
    if not plain and not output_layer.is_four_bit(below):
        raise TypeError(
            f"model: expected a plain torch.nn.Linear as output embedding of {_kind(model)}, got "
            f"{type(below).__name__} (of {type(below).__module__}); {_WAY_OUT}"
        )
    for each in layer.modules():
        replaced = _own_forward(each)
        if replaced is not None and getattr(replaced, "__func__", None) is not type(each).forward:
            raise _refusal(model, f"its output layer's forward was replaced by {_name(replaced)}")
    return layer


_WAY_OUT = (
    "pass kd.Head(hidden, weight, bias, softcap, scale, vocab_size) with the effective weight and what the model's "
    "forward does, or kd.Logits(model(...).logits)"
)


def _kind(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    return type(model).__name__ + (f" (model_type {model_type})" if model_type else "")


def _refusal(model: nn.Module, reason: str) -> TypeError:
    return TypeError(f"model: no kd.Head is {_kind(model)}: {reason}; {_WAY_OUT}")


def _name(function: object) -> str:
    function = _innermost(function)
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__qualname__)}"


def _innermost(function: object) -> object:
    while isinstance(function, partial):
        function = function.func
    return function


def _is_plumbing(hook: object) -> bool:
    """Whether a hook only gathers or moves what a module needs, so that its numbers stay as they are."""
    module = getattr(_innermost(hook), "__module__", None) or ""
    return module.split(".")[0] in ("accelerate", "deepspeed") or module.startswith("torch.distributed.")


def _behind_fused_head(forward):
    """What TRL's trainers put their fused cross-entropy before, which runs only where a call asks for it; accelerate's
    autocast may be around it.
    """
    layer = forward
    while layer is not None:
        origin = getattr(layer, "__globals__", {}).get("__name__") or type(layer).__module__
        if origin == "trl.trainer.utils" and layer.__code__.co_name == "_fused_forward":
            return layer.__closure__[layer.__code__.co_freevars.index("original_forward")].cell_contents
        if not origin.startswith(("accelerate.", "torch.amp.")):
            break
        layer = getattr(layer, "__wrapped__", None)
    return forward


def _own_forward(module: nn.Module):
    """The forward that was put on this module in place of its class's, without wrappers that only move or compile."""
    forward = _behind_fused_head(module.__dict__.get("forward"))
    if "_old_forward" in module.__dict__ and _is_plumbing(forward):  # accelerate's, for device_map="auto"
        forward = module._old_forward
    forward = sharded.before_tensor_parallelism(forward)
    forward = getattr(forward, "_torchdynamo_orig_callable", forward)  # model.forward = torch.compile(model.forward)
    return forward


def _state(model: nn.Module, layer: nn.Module) -> tuple:
    """All that the measurement may depend on. It is cheap enough to be compared in every call."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    configs = () if config is None else (dict(vars(config)), {} if text is config else dict(vars(text)))
    own = _own_forward(model)
    own = getattr(own, "__func__", own)  # a bound method would keep the model alive
    # Cohere's forward reads model.logit_scale, BART's adds a buffer that a checkpoint may fill later
    numbers = {name: v for name, v in vars(model).items() if isinstance(v, (bool, int, float, str, NoneType))}
    buffers = {
        name: b if b is None else (id(b), None if b.is_inference() else b._version)
        for name, b in model._buffers.items()
    }
    below = output_layer.innermost(layer)
    shape = (below.out_features, below.in_features)
    return (shape, type(model).forward, own, configs, numbers, buffers)


# What the stand-in for the output layer returns at two of the four positions. These, and the eighths at the last
# position, are exact in every floating-point type.
_SMALL, _HUGE = 2.0**-10, 2.0**30


def _measure(model: nn.Module, layer: nn.Module) -> tuple[float, float, float | None, int]:
    """Factor, scale, soft-cap and real entries of the logits that the model's own forward makes of known numbers."""
    below = output_layer.innermost(layer)
    columns, width = below.out_features, below.in_features
    raw = torch.zeros(4, columns, dtype=torch.float64, device="cpu")
    raw[1], raw[2] = _SMALL, _HUGE
    raw[3] = (torch.arange(columns, device="cpu") * 37 % 129 - 64) / 8
    hidden = (torch.arange(4 * width, dtype=torch.float64, device="cpu").reshape(1, 4, width) * 5) % 7 + 1
    seen, logits = _run(model, layer, hidden, raw)

    factor = (seen / hidden).mean().item() if seen.shape == hidden.shape else math.nan
    if not torch.allclose(seen, factor * hidden, rtol=1e-6, atol=0):
        raise _refusal(model, "it transforms the trunk's last hidden states before its output layer")
    if logits.dim() != 3 or logits.shape[:2] != (1, 4) or not 0 < logits.shape[-1] <= columns:
        raise _refusal(model, f"it makes logits {list(logits.shape)} of an output layer's [1, 4, {columns}]")

    masked = (logits[0] <= torch.finfo(torch.float16).min).all(0)  # entries that it gives no probability
    entries = logits.shape[-1] - int(masked.sum())
    if entries == 0 or masked[:entries].any():
        raise _refusal(model, "it masks entries in the middle of the vocabulary")
    zero, small, huge = logits[0, :3, :entries]
    if zero.any():
        raise _refusal(model, "it adds something to the output layer's logits")
    scale, softcap = small[0].item() / _SMALL, None
    if not math.isclose(huge[0].item(), scale * _HUGE, rel_tol=1e-5):
        softcap = huge[0].item()
        if not abs(small[0].item()) < abs(softcap):
            raise _refusal(model, "what it does to the output layer's logits is no scale and no soft-cap")
        scale = softcap * math.atanh(small[0].item() / softcap) / _SMALL
    expected = scale * raw[:, :entries]
    if softcap is not None:
        expected = softcap * torch.tanh(expected / softcap)
    if not torch.allclose(logits[0, :, :entries], expected, rtol=1e-5, atol=1e-6):
        raise _refusal(model, "what it does to the output layer's logits is no scale and no soft-cap")
    return _short(factor), _short(scale), softcap, entries


def _short(number: float) -> float:
    """The number without the last digits, where these can only come from float32 arithmetic."""
    short = float(f"{number:.6g}")
    return short if math.isclose(number, short, rel_tol=2e-7) else number


def _run(model: nn.Module, layer: nn.Module, hidden: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Runs the model's own forward; its trunk returns ``hidden`` [1, T, H], its output layer ``raw`` [T, V].

    Returns:
        What the output layer was given, and the logits.
    """
    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    with torch.no_grad():
        seen, out = ask(model, layer, _Hidden((hidden.clone(),)), raw, **given)
    logits = out[0] if isinstance(out, tuple) else out.logits
    return seen.to("cpu", torch.float64), logits.to("cpu", torch.float64)  # a forward of device_map may move them


def ask(model: nn.Module, layer: nn.Module, states: tuple, raw: Tensor, **given) -> tuple[Tensor, object]:
    """Runs the model's own forward with stand-ins for its trunk and its output layer.

    Args:
        model: the causal LM.
        layer: its output layer.
        states: what the trunk returns, whatever it is called with.
        raw: [T, V] what the output layer returns.
        given: arguments of the forward; those that it does not know are left out.

    Returns:
        What the output layer was given, and what the forward returned.

    Raises:
        TypeError: the forward cannot be run that way.
    """
    forward = _own_forward(model)
    if forward is not None and getattr(forward, "__self__", None) is not model:
        raise _refusal(model, f"its forward was replaced by {_name(forward)}")
    function = type(model).forward if forward is None else forward.__func__
    recorder, copy = _OutputLayer(layer, raw), _shallow(model, raw.device)
    encoder, below = getattr(model, "encoder", None), trunk(model)  # T5 has an encoder beside its trunk
    if isinstance(encoder, nn.Module):
        _replace(copy, encoder, _Trunk(encoder, states), raw.device)
    if not _replace(copy, below, _Trunk(below, states), raw.device):
        raise _refusal(model, f"its base model, {type(below).__name__}, is not one of its own modules")
    if not _replace(copy, layer, recorder, raw.device):
        raise _refusal(model, "its output layer is part of its base model")
    known = inspect.signature(function).parameters
    given |= {"use_cache": False, "return_dict": True}
    try:
        out = function(copy, **{name: value for name, value in given.items() if name in known})
        if recorder.seen is None:
            raise RuntimeError("the output layer was not called")
        return recorder.seen, out
    except Exception as error:  # a forward may do anything that stand-ins do not support
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        others = [name for name, module in copy.named_modules() if name and _computes(module)]
        others = f", where it has {', '.join(others)}" if others else ""
        raise _refusal(model, f"its forward cannot be followed from trunk to logits{others} ({said})") from error


def _computes(module: nn.Module) -> bool:
    return not isinstance(module, (_Trunk, _OutputLayer)) and any(True for _ in module.parameters(recurse=False))


def _shallow(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a module with the same children, which can be replaced, and with its own buffers on ``device``."""
    copy = object.__new__(type(module))  # FSDP2's classes have a __new__ of their own
    buffers = {name: b if b is None or b.is_meta else b.to(device) for name, b in module._buffers.items()}
    copy.__dict__.update(module.__dict__, _modules=dict(module._modules), _buffers=buffers)
    return copy


def _replace(copy: nn.Module, old: nn.Module, new: nn.Module, device: torch.device) -> bool:
    """Puts ``new`` in place of ``old`` anywhere below ``copy``; the modules on the way become copies too.

    Returns:
        Whether ``old`` was there.
    """
    for name, child in copy._modules.items():
        if child is old:
            copy._modules[name] = new
            return True
        if child is None or isinstance(child, _Trunk):
            continue
        below = _shallow(child, device)
        if _replace(below, old, new, device):
            copy._modules[name] = below
            return True
    return False


class _Trunk(nn.Module):
    """Stands in for a trunk or a part of it, and returns the given states when it is called."""

    def __init__(self, original: nn.Module, states: tuple):
        super().__init__()
        self.__dict__.update(original=original, states=states)

    def __getattr__(self, name: str):
        value = getattr(self.__dict__["original"], name)
        return _Trunk(value, self.__dict__["states"]) if isinstance(value, nn.Module) else value

    def forward(self, *_, **__) -> tuple:
        return self.__dict__["states"]


class _Hidden(tuple):
    """A model's output: the last hidden state is its first element, and any other field is None."""

    @property
    def last_hidden_state(self) -> Tensor:
        return self[0]

    def __getitem__(self, key):
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class _OutputLayer(nn.Module):
    """Stands in for the output layer: it remembers what it is given and returns known numbers."""

    def __init__(self, original: nn.Module, raw: Tensor):
        super().__init__()
        self.__dict__.update(original=original, raw=raw, seen=None)

    def __getattr__(self, name: str):
        return getattr(self.__dict__["original"], name)

    def forward(self, hidden: Tensor) -> Tensor:
        self.__dict__["seen"] = hidden.clone()
        return self.__dict__["raw"].expand(*hidden.shape[:-1], -1).clone()
