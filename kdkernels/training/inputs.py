"""What a run is made from, read and checked against each other: the same for training and for a dry run."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kdkernels.data import Examples, load_examples
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.errors import InputError
from kdkernels.judges import Judge
from kdkernels.objectives import Objective
from kdkernels.training.evaluation import expected_answer
from kdkernels.training.models.loading import load_tokenizer
from kdkernels.training.recipe.config import Config, DataConfig
from kdkernels.training.recipe.resolve import NO_JUDGE


@dataclass(frozen=True)
class Inputs:
    """Tokenizer, training examples and, where the recipe has an [evaluation], the held-out ones."""

    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    held_out: Examples | None

    @property
    def data(self) -> list[Examples]:
        """All examples, those to train on first."""
        return [self.examples] if self.held_out is None else [self.examples, self.held_out]


def build_objective(config: Config, judge: Judge | None = None) -> Objective:
    """The objective of a run, with its `judge` where it has one. Raises InputError for one that needs a judge and has
    none.
    """
    objective = config.objective.build()
    if objective.needs_weights and judge is None:
        raise InputError(f"[objective] {config.objective.name} with these options {NO_JUDGE}")
    return objective


def read_inputs(config: Config, objective: Objective, trained: Path | None = None) -> Inputs:
    """Everything but the models; `trained` is where the run has the tokenizer that it trained. Raises InputError."""
    tokenizer = load_tokenizer(config, trained)
    candidates, entries = objective.needs.candidates, vocabulary_size(tokenizer)
    if candidates > entries:
        raise InputError(f"[objective] k: expected at most {entries}, the tokenizer's vocabulary, got {candidates}")
    read = config.rollout.student_fraction < 1
    examples = read_examples(config.data, config.data.train, tokenizer, read_responses=read)
    held_out = None
    if config.evaluation is not None:
        held_out = read_examples(of_evaluation(config), config.evaluation.data, tokenizer, config.evaluation.by_token)
    if held_out is not None and config.evaluation.answer is not None:
        for example in held_out.usable[: config.evaluation.limit]:
            expected_answer(config.evaluation, example)
    return Inputs(tokenizer, examples, held_out)


def of_evaluation(config: Config) -> DataConfig:
    """[data] as the held-out data have it."""
    response = config.evaluation.response
    return config.data if response is None else replace(config.data, response=response)


def read_examples(
    data: DataConfig,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    tokenize_responses: bool = True,
    read_responses: bool = True,
) -> Examples:
    """The examples of the data at `path`, which has the format and the limits of [data]. Raises InputError."""
    return load_examples(
        path,
        tokenizer,
        prompt=data.prompt,
        response=data.response,
        messages=data.messages,
        answers=data.answers,
        max_prompt_tokens=data.max_prompt_tokens,
        max_response_tokens=data.max_response_tokens,
        special_tokens_in_fields=data.special_tokens_in_fields,
        tokenize_responses=tokenize_responses,
        read_responses=read_responses,
    )
