"""What `kdkernels eval` is asked for, as the recipe of a run that only evaluates: read and checked without torch."""

import argparse
from dataclasses import replace

from kdkernels.errors import InputError
from kdkernels.training.recipe.config import (
    Config,
    DataConfig,
    EvaluationConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RunConfig,
    StudentConfig,
    TrainConfig,
)
from kdkernels.training.recipe.resolve import check_paths, resolve, resolve_objective

SUITABLE = "auto"  # not known before torch is: bfloat16 on an accelerator
PROMPT, RESPONSE = "{question}\n", "{answer}"
ANSWER = r"#### *(-?[\d,]*\.?\d+)"  # of GSM8K's responses
ARGUMENTS = {  # what the keys of the recipe are on the command line
    "[student] path": "MODEL",
    "[tokenizer] path": "MODEL",
    "[data] train": "DATA.jsonl",
    "[data] prompt": "--prompt",
    "[data] response": "--response",
    "[data] messages": "--messages",
    "[data] max_prompt_tokens": "--max-prompt-tokens",
    "[evaluation] data": "DATA.jsonl",
    "[evaluation] answer": "--answer",
    "[evaluation] max_new_tokens": "--max-new-tokens",
    "[run] dtype": "--dtype",
}


def measuring(options: argparse.Namespace) -> Config:
    """The recipe of the command's options, with the precision that suits the device where they name none. Raises
    InputError.
    """
    config = Config(
        run=RunConfig(output=".", dtype=options.dtype or SUITABLE),
        student=StudentConfig(path=options.model),
        data=DataConfig(
            train=options.data,
            **_texts(options),
            max_prompt_tokens=options.max_prompt_tokens,
            max_response_tokens=1,  # of texts that nobody reads token by token
        ),
        objective=ObjectiveConfig(name="SFT"),
        optimizer=OptimizerConfig(lr=1.0),
        train=TrainConfig(steps=1, batch_size=1, micro_batch_size=1),
        evaluation=EvaluationConfig(
            data=options.data,
            limit=options.limit,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            metrics=("exact_match",),
            answer=options.answer,
        ),
    )
    try:
        config = resolve(config)
        check_paths(config)
    except InputError as error:
        raise by_argument(error) from error
    return config


def _texts(options: argparse.Namespace) -> dict[str, str]:
    """Where a line has its prompt and the right answer."""
    templates = {"prompt": options.prompt, "response": options.response}
    if options.messages is None:
        defaults = {"prompt": PROMPT, "response": RESPONSE}
        return {name: defaults[name] if text is None else text for name, text in templates.items()}
    for name, text in templates.items():
        if text is not None:
            raise InputError(f"--{name} and --messages: expected at most one of them")
    return {"messages": options.messages, "answers": "last"}


def complete(config: Config, accelerator: bool) -> Config:
    """The recipe with what takes torch to be known: the precision, and what follows from the objective."""
    if config.run.dtype == SUITABLE:
        config = replace(config, run=replace(config.run, dtype="bfloat16" if accelerator else "float32"))
    return resolve_objective(config)


def by_argument(error: InputError) -> InputError:
    """The error with the arguments of the command line in place of a recipe's keys."""
    text = str(error)
    for key, argument in ARGUMENTS.items():
        text = text.replace(key, argument)
    return InputError(text)
