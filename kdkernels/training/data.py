"""Examples from JSON lines, and the batches of them that a step sees.

Shapes: B responses, L length of the longest prompt + response (the others are padded on the right).
"""

import json
import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from kdkernels import Layout
from kdkernels.training.config import DataConfig
from kdkernels.training.schema import InputError


@dataclass(frozen=True)
class Example:
    """One line of a data file: prompt and response, rendered and tokenized.

    `response_ids` ends with the end-of-sequence token; it is empty where the recipe has no response template.
    """

    line: int
    prompt: str
    response: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


@dataclass(frozen=True)
class Examples:
    """The usable examples of the file at `path`, and how many were left out because a prompt or a response was too
    long.
    """

    path: str
    usable: tuple[Example, ...]
    long_prompts: int
    long_responses: int

    def __str__(self) -> str:
        left_out = (
            f"left out {self.long_prompts} with too long a prompt, {self.long_responses} with too long a response"
        )
        return f"{self.path}: {len(self.usable)} examples; {left_out}"


def render(config: DataConfig, path: str) -> Iterator[tuple[int, str, str]]:
    """(line number, prompt, response) of every line of the JSON lines file at `path`.

    Raises InputError naming file and line for a line that is no JSON object, or whose fields a template has no use for.
    """
    templates = {"prompt": config.prompt, "response": config.response or ""}
    needed = {key: sorted(_field_names(text, key)) for key, text in templates.items()}
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line.decode("utf-8"))
            except ValueError as error:
                raise InputError(f"{path}, line {number}: expected a JSON object: {error}") from error
            if not isinstance(record, dict):
                raise InputError(f"{path}, line {number}: expected a JSON object, got {type(record).__name__}")
            for key, names in needed.items():
                for name in names:
                    if name not in record:
                        raise InputError(
                            f"{path}, line {number}: field {name!r} of [data] {key} is missing; the line has "
                            f"{', '.join(record)}"
                        )
            texts = (_fill(text, record, f"{path}, line {number}: [data] {key}") for key, text in templates.items())
            yield number, *texts


def _fill(template: str, record: dict[str, Any], place: str) -> str:
    try:
        return template.format_map(record)
    except (ValueError, TypeError, LookupError) as error:  # a format or a conversion that the value does not have
        raise InputError(f"{place}: {template!r} cannot be filled in: {error}") from error


def _field_names(template: str, key: str) -> set[str]:
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(template) if name is not None}
    except ValueError as error:
        raise InputError(f"[data] {key}: not a template: {error}: {template!r}") from error
    for name in names:
        if not name.isidentifier():
            raise InputError(
                f"[data] {key}: expected field names in braces (literal braces doubled), got {{{name}}} in {template!r}"
            )
    return names


def load_examples(config: DataConfig, path: str, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """The examples of the JSON lines file at `path`, tokenized. Those over the token limits are counted, not kept.

    Raises InputError as `render` does, for a prompt without tokens, and where no example is left.
    """
    usable, long_prompts, long_responses = [], 0, 0
    for number, prompt, response in render(config, path):
        prompt_ids = tokenizer(prompt)["input_ids"]
        response_ids = []
        if config.response is not None:
            response_ids = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if not prompt_ids:
            raise InputError(f"{path}, line {number}: the prompt {prompt!r} has no tokens")
        if len(prompt_ids) > config.max_prompt_tokens:
            long_prompts += 1
        elif len(response_ids) > config.max_response_tokens:
            long_responses += 1
        else:
            usable.append(Example(number, prompt, response, tuple(prompt_ids), tuple(response_ids)))
    examples = Examples(path, tuple(usable), long_prompts, long_responses)
    if not usable:
        raise InputError(f"{examples}: none is left")
    return examples


@dataclass(frozen=True)
class Batch:
    """Prompts with their responses, padded on the right.

    `input_ids`, `attention_mask`, `target` [B, L]; `target[b, t]` is the token after position t. `layout` marks the
    positions that predict a response token: from the last prompt position to the one before the response's last token,
    which is the end-of-sequence token if it ended. `from_teacher` [B]: responses of the data rather than the student.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    target: torch.Tensor
    layout: Layout
    from_teacher: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(getattr(self, entry.name).to(device) for entry in fields(self)))


def collate(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int, from_teacher: bool = False
) -> Batch:
    """The Batch of `prompts` and their `responses` (token ids), all of them by the same author. Padding is known by
    position: a response may contain `pad_id`.
    """
    length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    input_ids = torch.full((len(prompts), length), pad_id)
    attention_mask = torch.zeros(len(prompts), length, dtype=torch.long)
    predicts = torch.zeros(len(prompts), length, dtype=torch.bool)
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        input_ids[b, :end] = torch.tensor([*prompt, *response])
        attention_mask[b, :end] = 1
        predicts[b, len(prompt) - 1 : end - 1] = True
    target = input_ids.roll(-1, dims=1)
    authors = torch.full((len(prompts),), from_teacher)
    return Batch(input_ids, attention_mask, target, Layout.from_mask(predicts), authors)


class ExampleStream:
    """The examples 0 ... size-1 over and over, each epoch in an order of its own that depends on the seed alone.

    `position` counts the examples handed out since the beginning: it is the whole state.
    """

    def __init__(self, size: int, seed: int, position: int = 0):
        self.size, self.seed, self.position = size, seed, position

    def next(self, count: int) -> list[int]:
        """The next `count` examples."""
        positions = range(self.position, self.position + count)
        orders = {epoch: self._order(epoch) for epoch in {position // self.size for position in positions}}
        self.position += count
        return [orders[position // self.size][position % self.size] for position in positions]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(self.size))
        random.Random(f"seed {self.seed}, epoch {epoch}").shuffle(order)
        return order
