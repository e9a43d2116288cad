"""Examples from rendered and tokenized texts, and the batches of them that a step sees.

Shapes: B responses, L length of the longest prompt + response (the others are padded on the right).
"""

import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kdkernels import Layout
from kdkernels.training.config import DataConfig
from kdkernels.training.encoding import Encoder
from kdkernels.training.schema import InputError
from kdkernels.training.texts import render

AT_ONCE = 512  # examples that are tokenized in one call
PLAIN_SECONDS = 20.0  # between two lines about it where there is no terminal


@dataclass(frozen=True)
class Example:
    """One line of a data file: prompt and response, rendered and tokenized.

    `response_ids` ends with the end-of-sequence token; it is empty where nobody reads responses token by token.
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

    `notes`: in words, how many were left out because no tokens express their response behind the prompt's, and how many
    usable ones have a text that the tokenizer changes. `first`: the first usable one as the model sees it, for people.
    """

    path: str
    usable: tuple[Example, ...]
    long_prompts: int
    long_responses: int
    notes: tuple[str, ...] = ()
    first: str = ""

    def __str__(self) -> str:
        left_out = (
            f"left out {self.long_prompts} with too long a prompt, {self.long_responses} with too long a response"
        )
        return "; ".join((f"{self.path}: {len(self.usable)} examples", left_out, *self.notes))


def load_examples(
    config: DataConfig, path: str, tokenizer: PreTrainedTokenizerBase, responses: bool = True
) -> Examples:
    """The examples of the JSON lines file at `path`, tokenized. Those that cannot be used are counted, not kept.

    responses: whether anybody reads the responses token by token. Otherwise they are not tokenized, and none is too
    long.

    Raises InputError as `render` does, for a prompt without tokens, for a response with an end-of-sequence token before
    its end, and where no example is left.
    """
    responses = responses and config.response is not None
    encoder = Encoder(tokenizer)
    lines = list(render(config, path, encoder.special_tokens()))
    usable, counts, firsts = [], Counter(), {}
    for part in _in_parts(lines, path):
        texts = [response if responses else "" for *_, response in part]
        encoded = encoder.encode([prompt for _, prompt, _ in part], texts)
        for (number, prompt, response), ids in zip(part, encoded, strict=True):
            place = f"{path}, line {number}"
            if not ids.prompt:
                raise InputError(f"{place}: the prompt {prompt!r} has no tokens")
            if len(ids.prompt) > config.max_prompt_tokens:
                counts["long_prompts"] += 1
                continue
            if ids.response is None:
                counts["joined"] += 1
                firsts.setdefault("joined", f"line {number}")
                continue
            response_ids = _ended(ids.response, tokenizer.eos_token_id, place) if responses else ()
            if len(response_ids) > config.max_response_tokens:
                counts["long_responses"] += 1
                continue
            if ids.changed:
                counts["changed"] += 1
                firsts.setdefault("changed", f"line {number}, {_difference(*ids.changed)}")
            usable.append(Example(number, prompt, response, tuple(ids.prompt), tuple(response_ids)))
    notes = []
    if counts["joined"]:
        notes.append(
            f"left out {counts['joined']} whose response has no tokens of its own behind the prompt's (the first: "
            f"{firsts['joined']}): the tokenizer would join the two; let the prompt end, or the response begin, with "
            "a space or a line break"
        )
    if counts["changed"]:
        notes.append(f"the tokenizer changes the text of {counts['changed']} (the first: {firsts['changed']})")
    first = ""
    if usable:
        shown = encoder.show(usable[0].prompt_ids, usable[0].response_ids)
        first = f"first example, line {usable[0].line} of {path}:\n{shown}"
    long = counts["long_prompts"], counts["long_responses"]
    examples = Examples(path, tuple(usable), *long, tuple(notes), first)
    if not usable:
        raise InputError(f"{examples}: none is left")
    return examples


def _in_parts(lines: Sequence, path: str) -> Iterator[Sequence]:
    """`lines`, AT_ONCE at a time, and how far they are: a bar, or without a terminal a line now and then."""
    main = os.environ.get("RANK", "0") == "0"  # a dry run has no process group to ask
    terminal, said = sys.stderr.isatty(), time.monotonic()
    with tqdm(total=len(lines), unit="example", desc=path, leave=False, disable=not (main and terminal)) as bar:
        for start in range(0, len(lines), AT_ONCE):
            part = lines[start : start + AT_ONCE]
            yield part
            bar.update(len(part))
            if main and not terminal and time.monotonic() - said > PLAIN_SECONDS:
                said = time.monotonic()
                print(
                    f"{path}: {start + len(part)} of {len(lines)} examples are tokenized", file=sys.stderr, flush=True
                )


def _ended(ids: list[int], eos_id: int, place: str) -> list[int]:
    """The response with its end-of-sequence token, which its text may have already."""
    if eos_id in ids[:-1]:
        raise InputError(
            f"{place}: expected the response's end-of-sequence token at its end, got one as token "
            f"{ids.index(eos_id) + 1} of {len(ids)}: a model would stop there"
        )
    return ids if ids[-1:] == [eos_id] else [*ids, eos_id]


def _difference(text: str, read: str) -> str:
    """Where two texts part, a few characters of either."""
    same = next((i for i, (a, b) in enumerate(zip(text, read, strict=False)) if a != b), min(len(text), len(read)))
    return f"{text[same : same + 12]!r} became {read[same : same + 12]!r}"


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
        self._orders: dict[int, list[int]] = {}  # of the epochs at hand: to shuffle millions takes a second

    def next(self, count: int) -> list[int]:
        """The next `count` examples."""
        positions = range(self.position, self.position + count)
        epochs = {position // self.size for position in positions}
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch in epochs}
        self.position += count
        return [self._orders[position // self.size][position % self.size] for position in positions]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(self.size))
        random.Random(f"seed {self.seed}, epoch {epoch}").shuffle(order)
        return order
