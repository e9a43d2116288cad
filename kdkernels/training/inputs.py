"""What a run is made from, read and checked against each other: the same for training and for a dry run."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kdkernels.training.config import Config
from kdkernels.training.data import Examples, load_examples
from kdkernels.training.evaluation import expected_answer
from kdkernels.training.model import load_tokenizer, vocabulary_size
from kdkernels.training.schema import InputError


@dataclass(frozen=True)
class Inputs:
    """Tokenizer, training examples and, where the recipe has an [evaluation], the held-out ones."""

    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    held_out: Examples | None


def read_inputs(config: Config, trained: Path | None = None) -> Inputs:
    """Everything but the models; `trained` is where the run has the tokenizer that it trained. Raises InputError."""
    tokenizer = load_tokenizer(config, trained)
    candidates, words = config.objective.build().topk, vocabulary_size(tokenizer)
    if candidates > words:
        raise InputError(f"[objective] k: expected at most {words}, the tokenizer's words, got {candidates}")
    data = config.data
    if config.rollout.student_fraction == 1:  # nobody reads the responses
        data = replace(data, response=None)
    examples = load_examples(data, data.train, tokenizer)
    held_out = None
    if config.evaluation is not None:
        held_out = load_examples(config.data, config.evaluation.data, tokenizer, responses=config.evaluation.by_token)
    if held_out is not None and config.evaluation.answer is not None:
        for example in held_out.usable[: config.evaluation.limit]:
            expected_answer(config.evaluation, example)
    return Inputs(tokenizer, examples, held_out)
