"""The tokens that end a response: those of the student, and those of a teacher that differs."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkernels.rollouts.local import end_ids
from kdkernels.training.models.loading import read_tokenizer
from kdkernels.training.recipe.config import Config


def describe_ends(
    config: Config, tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel, teacher: PreTrainedModel | None
) -> list[str]:
    """A line for conversations: with which tokens the student ends a response. One where the models do so with
    different tokens. Their order says nothing, and a model may be on the meta device.
    """
    own = end_ids(student, tokenizer)
    lines = [] if config.data.messages is None else [f"the student ends a response with {_names(own, tokenizer)}"]
    if teacher is None:
        return lines
    others = end_ids(teacher, read_tokenizer(config.teacher.path, "[teacher] path"))
    if set(own) == set(others):
        return lines
    return [
        *lines,
        f"warning: the student ends a response with {_names(own, tokenizer)}, the teacher with "
        f"{_names(others, tokenizer)}: where only one of them ends, the student learns to go on, or never to end. Give "
        "both models the same eos_token_id (generation_config.json, tokenizer_config.json)",
    ]


def _names(ids: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(one)!r} ({one})" for one in ids)
