"""Which implementation of attention a model runs with, and why not another one."""

import torch
from transformers import PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from kdkernels.errors import InputError
from kdkernels.training.recipe.config import Config

FLASH = "flash_attention_2"


def implementation(model: PreTrainedModel, wanted: str, dtype: str, key: str) -> str:
    """The implementation that `model` gets on this machine.

    Args:
        model: on any device, as it was read: with sdpa where its architecture has it, else eager.
        wanted: `attention` of the recipe; "auto" is flash_attention_2 where that works, else what the model has.
        dtype: of the model's weights in the run.
        key: of the recipe, for error messages.

    Raises:
        InputError: it is wanted and does not work.
    """
    current = model.config._attn_implementation
    if wanted not in ("auto", FLASH):
        return wanted
    why_not = _without_flash(model, dtype)
    if why_not is None:
        return FLASH
    if wanted == FLASH:
        raise InputError(f'{key} attention: expected "auto", "sdpa" or "eager", since {why_not}, got "{FLASH}"')
    return current


def attend(model: PreTrainedModel, wanted: str, dtype: str, key: str) -> None:
    """Gives `model` its implementation. Raises InputError where its architecture has none of that name."""
    chosen = implementation(model, wanted, dtype, key)
    if chosen == model.config._attn_implementation:
        return
    try:
        model.set_attn_implementation(chosen)
    except (ValueError, ImportError) as error:
        raise InputError(f"{key} attention: {type(model).__name__} does not run with {chosen}: {error}") from error
    if model.config._attn_implementation != chosen:  # transformers only warns
        raise InputError(
            f'{key} attention: expected "auto", since {type(model).__name__} has {model.config._attn_implementation} '
            f'alone, got "{chosen}"'
        )


def describe_attention(
    config: Config, student: PreTrainedModel, teacher: PreTrainedModel | None, here: bool = True
) -> str:
    """A line about it; here=False: what the recipe asks another machine for. Raises InputError as `implementation`."""
    dtypes = {"student": config.run.dtype, "teacher": config.teacher and config.teacher.dtype}
    said = []
    for name, model in {"student": student, "teacher": teacher}.items():
        if model is not None:
            wanted = getattr(config, name).attention
            chosen = implementation(model, wanted, dtypes[name], f"[{name}]") if here else wanted
            said.append(f"{name} {chosen}")
    again = (
        "; the student's layers are computed again in the backward pass" if config.train.gradient_checkpointing else ""
    )
    return f"attention: {', '.join(said)}{again}"


def _without_flash(model: PreTrainedModel, dtype: str) -> str | None:
    """Why flash_attention_2 does not work for the model on this machine, None where it does."""
    if not torch.cuda.is_available():
        return "this machine has no GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 8 and torch.version.hip is None:
        return f"this GPU's compute capability is {major}.{minor}, below 8.0"
    if not is_flash_attn_2_available():
        return "the package flash-attn is not installed"
    if dtype == "float32":
        return "it computes in bfloat16, and the model's dtype is float32"
    if not model._supports_flash_attn:
        return f"{type(model).__name__} has none"
    return None
