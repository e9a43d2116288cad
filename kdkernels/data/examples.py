"""Examples: prompts and responses of a JSON lines file, rendered and tokenized."""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kdkernels.data.encoding import Encoded, Encoder
from kdkernels.data.texts import render
from kdkernels.errors import InputError

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

    @property
    def tokens(self) -> int:
        """The length of prompt and response."""
        return len(self.prompt_ids) + len(self.response_ids)


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
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str,
    response: str | None,
    max_prompt_tokens: int,
    max_response_tokens: int,
    special_tokens_in_fields: bool = False,
    tokenize_responses: bool = True,
) -> Examples:
    """The examples of the JSON lines file at `path`, tokenized. Those that cannot be used are counted, not kept.

    Args:
        path: one JSON object a line.
        prompt, response: templates over the fields of a line, such as "{question}"; no response: None.
        max_prompt_tokens, max_response_tokens: longer examples are left out; the end-of-sequence token counts.
        special_tokens_in_fields: whether a field may hold what the tokenizer reads as a special token.
        tokenize_responses: whether anybody reads the responses token by token. Otherwise they are texts only, and none
            is too long.

    Raises:
        InputError: what `render` refuses, a prompt without tokens, a response with an end-of-sequence token before its
            end, or no example that is left.
    """
    tokenize_responses = tokenize_responses and response is not None
    encoder = Encoder(tokenizer)
    special = () if special_tokens_in_fields else encoder.special_tokens()
    lines = list(render(path, prompt, response, special))
    usable, counts, firsts = [], Counter(), {}
    for number, prompt_text, response_text, ids in _encoded(encoder, lines, path, tokenize_responses):
        reason, response_ids = None, ()
        if len(ids.prompt) > max_prompt_tokens:
            reason = "long_prompts"
        elif ids.response is None:
            reason = "joined"
        elif tokenize_responses:
            response_ids = _ended(ids.response, tokenizer.eos_token_id, f"{path}, line {number}")
            reason = "long_responses" if len(response_ids) > max_response_tokens else None
        if reason is None:
            usable.append(Example(number, prompt_text, response_text, tuple(ids.prompt), tuple(response_ids)))
            reason = "changed" if ids.changed else None
        if reason is not None:
            counts[reason] += 1
            firsts.setdefault(reason, (number, ids))
    long = counts["long_prompts"], counts["long_responses"]
    examples = Examples(path, tuple(usable), *long, _notes(counts, firsts), _first(encoder, usable, path))
    if not usable:
        raise InputError(f"{examples}: none is left")
    return examples


def _encoded(
    encoder: Encoder, lines: Sequence[tuple[int, str, str]], path: str, with_responses: bool
) -> Iterator[tuple[int, str, str, Encoded]]:
    """The rendered `lines` (number, prompt, response), each with its ids, of which the prompt must have some."""
    for part in _in_parts(lines, path):
        texts = [text if with_responses else "" for *_, text in part]
        for line, ids in zip(part, encoder.encode([text for _, text, _ in part], texts), strict=True):
            if not ids.prompt:
                raise InputError(f"{path}, line {line[0]}: the prompt {line[1]!r} has no tokens")
            yield *line, ids


def _notes(counts: Counter, firsts: dict[str, tuple[int, Encoded]]) -> tuple[str, ...]:
    """What is to be said beside the numbers of `Examples`; `firsts`: the line and the ids that were counted first."""
    notes = []
    if counts["joined"]:
        notes.append(
            f"left out {counts['joined']} whose response has no tokens of its own behind the prompt's (the first: line "
            f"{firsts['joined'][0]}): the tokenizer would join the two; let the prompt end, or the response begin, "
            "with a space or a line break"
        )
    if counts["changed"]:
        number, ids = firsts["changed"]
        notes.append(
            f"the tokenizer changes the text of {counts['changed']} (the first: line {number}, "
            f"{_difference(*ids.changed)})"
        )
    return tuple(notes)


def _first(encoder: Encoder, usable: Sequence[Example], path: str) -> str:
    """The first example as a model sees it, for people."""
    if not usable:
        return ""
    shown = encoder.show(usable[0].prompt_ids, usable[0].response_ids)
    return f"first example, line {usable[0].line} of {path}:\n{shown}"


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
