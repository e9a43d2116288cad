"""The last hidden states of a transformers model, which its lm_head multiplies.

Axes: B sequences, L positions, H hidden.
"""

from __future__ import annotations

from contextlib import ExitStack

from torch import Tensor, nn

from ..wrappers import autocasts_around, is_inside, modules_within, refuse_outside
from .from_model import trunk, unwrapped

# What PEFT does in its own forward, around the model's: it would be left out.
OF_PEFT = ("adapter_names", "alora_offsets")


def hidden_states(model: nn.Module, /, **inputs) -> Tensor:
    """The last hidden states of a transformers model, after the final norm: ``kd.Head.from_model`` takes them.

    The lm_head is not multiplied, nothing is cached. Dtype and autocast are those of the model's own forward.

    Args:
        model: a causal LM, a vision-language or an encoder-decoder model, also under PEFT. What wraps it for training
            (DDP, FSDP, DeepSpeed, accelerate) prepares for the backward in its own forward: with gradients on, call
            this within ``kd.through(wrapper, function)``.
        inputs: what the model's forward takes: input_ids, attention_mask, position_ids, pixel_values ... ``labels`` are
            only read by encoder-decoder models, which shift them into the decoder's inputs; their hidden states are the
            decoder's, and position t predicts ``labels[t]``.

    Returns:
        [B, L, H], L the decoder's positions in encoder-decoder models.

    Raises:
        TypeError: the model has no trunk below its head, or prompt learning of PEFT (prompt tuning, prefix tuning,
            p-tuning), X-LoRA or activated LoRA, which act in PEFT's own forward.
        RuntimeError: gradients are on, and the model is outside of the forward of its wrapper. DDP around a model that
            was taken out of it is found too, if it was there at the first call.
    """
    return last_hidden_state(model, trunk_output(model, inputs))


def last_hidden_state(model: nn.Module, output: object) -> Tensor:
    """[B, L, H] of what the trunk of ``model`` returned."""
    hidden = getattr(output, "last_hidden_state", None)
    if not isinstance(hidden, Tensor):
        below = type(trunk(model)).__name__
        raise TypeError(
            f"model: expected a trunk that returns last_hidden_state, got {type(output).__name__} of the {below} of "
            f"{type(unwrapped(model)).__name__} (config.return_dict has to be True)"
        )
    return hidden


def trunk_output(model: nn.Module, inputs: dict) -> object:
    """What the trunk of ``model`` returns for ``inputs``: its last hidden states among it, and the logits of its
    routers if its config asks for them. See ``hidden_states``.
    """
    refuse_outside(model)
    *_, outermost = modules_within(model)
    _refuse_beyond_trunk(outermost, inputs)
    inner = unwrapped(model)
    inputs = inputs | {"use_cache": False}
    with ExitStack() as entered:
        if not is_inside(model):
            for context in autocasts_around(outermost):
                entered.enter_context(context)
        if has_encoder(inner):
            return _until_trunk(inner, inputs)
        inputs.pop("labels", None)
        return trunk(inner)(**inputs)


def has_encoder(model: nn.Module) -> bool:
    """Whether it is an encoder-decoder model, whose position t predicts ``labels[t]``."""
    return bool(getattr(getattr(unwrapped(model), "config", None), "is_encoder_decoder", False))


class _Returned(Exception):  # no error: the trunk has
    def __init__(self, output: object):
        super().__init__()
        self.output = output


def _until_trunk(model: nn.Module, inputs: dict) -> object:
    """What the trunk returns in the model's own forward, which ends there.

    Before an encoder-decoder model's trunk there is work: labels are shifted into the decoder's inputs, and in T5 the
    trunk is the decoder alone, with an encoder beside it.
    """

    def stop(module: nn.Module, arguments: tuple, output: object) -> None:
        raise _Returned(output)

    handle = trunk(model).register_forward_hook(stop)
    try:
        model.forward(**inputs)
    except _Returned as returned:
        return returned.output
    finally:
        handle.remove()
    raise TypeError(f"model: expected {type(model).__name__} to call its {type(trunk(model)).__name__}, it did not")


def _refuse_beyond_trunk(model: nn.Module, inputs: dict) -> None:
    """Raises a TypeError for what PEFT does in its own forward, and for what only a loss needs."""
    configs = getattr(model, "peft_config", None)
    for config in configs.values() if isinstance(configs, dict) else ():
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if config.is_prompt_learning or kind == "XLORA" or getattr(config, "alora_invocation_tokens", None):
            kind = "activated LoRA" if kind == "LORA" else kind
            raise TypeError(
                f"model: expected adapters that change the model's layers (LoRA, IA3 ...), got {kind}, which changes "
                "what PEFT's own forward gives the model; use kd.Logits(model(...).logits)"
            )
    for name in OF_PEFT:
        if name in inputs:
            raise TypeError(f"{name}: expected inputs of the model, this is one of PEFT's own forward")
    if "num_items_in_batch" in inputs:  # transformers' count of the tokens in a step
        raise TypeError("num_items_in_batch: expected inputs of the model, this is the denominator of an objective")
