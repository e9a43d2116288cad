"""Where logits come from: hidden states and the lm_head over them, kept apart until a chunk is due."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Head"]


@dataclass(frozen=True)
class Head:
    """Logits that are never materialised: z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap).

    Args:
        hidden: [..., H] last hidden states, after the final norm.
        weight: [V, H] lm_head weight; a parameter or any tensor computed from parameters.
        bias: [V] or None.
        softcap: final logit soft-cap (Gemma2: 30); None for no soft-cap.
        scale: factor on the raw logits (Cohere ``logit_scale``, Granite ``1 / logits_scaling``).
        vocab_size: real vocabulary where ``weight`` is padded beyond it; the padding rows have probability 0.

    Raises:
        TypeError: a tensor of the wrong kind, or hidden, weight and bias of different dtypes (autocast makes them one).
        ValueError: shapes or devices that do not fit, a soft-cap that is not positive, a vocab_size outside [1, V].
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    vocab_size: int | None = None

    def __post_init__(self):
        for name, tensor in (("hidden", self.hidden), ("weight", self.weight), ("bias", self.bias)):
            if tensor is None and name == "bias":
                continue
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise TypeError(f"{name}: expected a floating-point tensor, got {got}")
            if tensor.device != self.hidden.device:
                raise ValueError(f"{name}: expected device {self.hidden.device} (that of hidden), got {tensor.device}")
            if tensor.dtype != self.hidden.dtype and autocast_dtype(self.hidden.device) is None:
                raise TypeError(f"{name}: expected dtype {self.hidden.dtype} (that of hidden), got {tensor.dtype}")
        if self.weight.dim() != 2 or 0 in self.weight.shape:
            raise ValueError(f"weight: expected shape [V, H], got {list(self.weight.shape)}")
        rows, width = self.weight.shape
        if self.hidden.dim() < 1 or self.hidden.shape[-1] != width:
            raise ValueError(
                f"hidden: expected [..., {width}] to fit weight [{rows}, {width}], got {list(self.hidden.shape)}"
            )
        if self.bias is not None and self.bias.shape != (rows,):
            raise ValueError(f"bias: expected shape [{rows}], got {list(self.bias.shape)}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap: expected a positive number or None, got {self.softcap!r}")
        if not self.scale > 0:
            raise ValueError(f"scale: expected a positive number, got {self.scale!r}")
        if self.vocab_size is not None and not 1 <= self.vocab_size <= rows:
            raise ValueError(f"vocab_size: expected 1 to {rows} (the rows of weight), got {self.vocab_size}")

    @property
    def vocabulary(self) -> int:
        """Number of words with a probability: ``vocab_size`` or the rows of weight."""
        return self.vocab_size or self.weight.shape[0]

    def autocast(self) -> Head:
        """This head in autocast's dtype where that is on; differentiable: gradients come in the parameters' dtype."""
        dtype = autocast_dtype(self.hidden.device)
        if dtype is None:
            return self
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    @classmethod
    def from_model(cls, model, hidden: Tensor, vocab_size: int | None = None) -> Head:
        """The head of a transformers causal LM over ``hidden`` [..., H], with its bias, soft-cap and logit scale.

        ``vocab_size`` is the real vocabulary (the tokenizer's) where the embedding is padded; default: the model's
        ``config.vocab_size``.

        Raises:
            TypeError: the model has no output embedding, or one that is more than a linear layer (an adapter whose
                effect reading ``.weight`` would lose).
        """
        layer = model.get_output_embeddings()
        if type(layer) is not torch.nn.Linear:
            raise TypeError(
                f"model: expected a plain torch.nn.Linear as output embedding, got {type(layer).__name__}; "
                "pass kd.Head(hidden, weight, ...) with the effective weight instead"
            )
        config = model.config.get_text_config()
        return cls(
            hidden,
            layer.weight,
            layer.bias,
            softcap=_first(config, _SOFTCAPS),
            scale=_scale(config),
            vocab_size=vocab_size or min(config.vocab_size, layer.weight.shape[0]),
        )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of ``torch.autocast`` where it is on, else None."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


# What transformers' configs call them (5.23).
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")


def _first(config, names: tuple[str, ...]):
    """The first of these attributes that the config has, else None."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _scale(config) -> float:
    """Factor on the raw logits. Granite divides by its logits_scaling, HyperCLOVA X multiplies by it."""
    scaling = _first(config, ("logits_scaling",))
    if scaling is not None:
        return float(scaling) if config.model_type.startswith("hyperclovax") else 1.0 / scaling
    factor = _first(config, _FACTORS)
    return 1.0 if factor is None else float(factor)


def shared_vocabulary(student: Head, teacher: Head | None) -> int:
    """The words both can score: min over the heads of ``vocab_size`` or rows.

    Raises:
        ValueError: the teacher has fewer words than the student. Cutting the student to the teacher's size must be
            asked for, by passing that ``vocab_size`` to the student.
    """
    if teacher is None:
        return student.vocabulary
    if teacher.vocabulary < student.vocabulary:
        raise ValueError(
            f"teacher: expected a vocabulary of at least the student's {student.vocabulary} words, got "
            f"{teacher.vocabulary}; if the student's rest is padding, say vocab_size={teacher.vocabulary} in its Head"
        )
    return student.vocabulary
