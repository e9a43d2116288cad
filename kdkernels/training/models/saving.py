"""A trained student as transformers or PEFT read it, with its tokenizer."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkernels.training.models import adapters
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config


def save_model(
    config: Config,
    student: PreTrainedModel,
    weights: Mapping[str, Tensor] | None,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
) -> None:
    """Writes them into `directory`, on process 0. `weights`: what of the student is saved, there."""
    if distributed.rank() == 0:
        if config.student.adapter is None:
            student.save_pretrained(directory, state_dict=weights)
        else:
            adapters.save(student, weights, config.student.adapter, directory)
        tokenizer.save_pretrained(directory)
