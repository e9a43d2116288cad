"""Examples: prompts and responses of a JSON lines file or a dataset, rendered and tokenized."""

import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from kdkernels.data.chat import Answers, render_chat
from kdkernels.data.encoding import Encoded, Encoder
from kdkernels.data.texts import Line, render
from kdkernels.errors import InputError

AT_ONCE = 512  # examples that are tokenized in one call
PLAIN_SECONDS = 20.0  # between two lines about it where there is no terminal


@dataclass(frozen=True)
class Example:
    """One line of a data file, or one of the answers in it: prompt and response, rendered and tokenized.

    `response_ids` ends with the end-of-sequence token; it is empty where nobody reads responses token by token.
    `from_teacher`: who wrote the response, the teacher (or another author of the data) or the student. `teacher`: the
    name of the teacher that scores it, None where there is but one.
    """

    line: int
    prompt: str
    response: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    from_teacher: bool = True
    teacher: str | None = None

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
    `together`: so many, one behind the other, answer the same prompt and are trained on in the same step.
    """

    path: str
    usable: tuple[Example, ...]
    long_prompts: int
    long_responses: int
    notes: tuple[str, ...] = ()
    first: str = ""
    together: int = 1

    def __str__(self) -> str:
        if self.together > 1:
            return f"{self.path}: {len(self.usable) // self.together} prompts, {self.together} responses to each"
        left_out = (
            f"left out {self.long_prompts} with too long a prompt, {self.long_responses} with too long a response"
        )
        return "; ".join((f"{self.path}: {len(self.usable)} examples", left_out, *self.notes))


def load_examples(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str | None = None,
    response: str | None = None,
    messages: str | None = None,
    answers: Answers = "all",
    max_prompt_tokens: int,
    max_response_tokens: int,
    special_tokens_in_fields: bool = False,
    tokenize_responses: bool = True,
    read_responses: bool = True,
) -> Examples:
    """The examples of the data at `path` (records.py), tokenized. Those that cannot be used are counted, not kept.

    Args:
        path: a file of one JSON object a line, or a dataset.
        prompt, response: templates over the fields of a line, such as "{question}"; no response: None.
        messages: in place of both, the field that holds a conversation; `answers`: which of the assistant's messages
            are responses (chat.py).
        max_prompt_tokens, max_response_tokens: longer examples are left out; the end-of-sequence token counts.
        special_tokens_in_fields: whether a field may hold what the tokenizer reads as a special token.
        tokenize_responses: whether anybody reads the responses token by token. Otherwise they are texts only, and none
            is too long.
        read_responses: whether anybody reads the responses, as tokens or texts.

    Raises:
        InputError: what `render` and `render_chat` refuse, a prompt without tokens, a response with an end-of-sequence
            token before its end, or no example that is left.
    """
    tokenize_responses = tokenize_responses and read_responses and (messages is not None or response is not None)
    encoder = Encoder(tokenizer, bare=messages is not None)
    special = encoder.special_tokens()
    refused = () if special_tokens_in_fields else special
    if messages is not None:
        lines = list(render_chat(path, messages, tokenizer, answers, special, refused, read_responses))
    else:
        response = response if read_responses else None
        lines = [Line(*line, line[-1], False) for line in render(path, prompt, response, refused)]
    return _chosen(encoder, lines, path, max_prompt_tokens, max_response_tokens if tokenize_responses else None)


def _chosen(encoder: Encoder, lines: Sequence[Line], path: str, longest_prompt: int, longest: int | None) -> Examples:
    """The usable examples among the `lines`, and what became of the others. longest: of the responses, None where
    nobody reads their tokens.
    """
    usable, counts, firsts = [], Counter(), {}
    for line, ids in _encoded(encoder, lines, path, with_responses=longest is not None):
        reason, response_ids = None, ()
        if len(ids.prompt) > longest_prompt:
            reason = "long_prompts"
        elif ids.response is None:
            reason = "joined"
        elif longest is not None:
            response_ids = _ended(line, ids.response, encoder.tokenizer.eos_token_id, path)
            reason = "long_responses" if len(response_ids) > longest else None
        if reason is None:
            usable.append(Example(line.number, line.prompt, line.answer, tuple(ids.prompt), tuple(response_ids)))
            reason = "changed" if ids.changed else None
        if reason is not None:
            counts[reason] += 1
            firsts.setdefault(reason, (line.number, ids))
    long = counts["long_prompts"], counts["long_responses"]
    examples = Examples(path, tuple(usable), *long, _notes(counts, firsts), _first(encoder, usable, path))
    if not usable:
        raise InputError(f"{examples}: none is left")
    return examples


def _encoded(
    encoder: Encoder, lines: Sequence[Line], path: str, with_responses: bool
) -> Iterator[tuple[Line, Encoded]]:
    """The rendered `lines`, each with its ids, of which the prompt must have some."""
    for part in _in_parts(lines, path):
        texts = [line.response if with_responses else "" for line in part]
        for line, ids in zip(part, encoder.encode([line.prompt for line in part], texts), strict=True):
            if not ids.prompt:
                raise InputError(f"{path}, line {line.number}: the prompt {line.prompt!r} has no tokens")
            yield line, ids


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


def _ended(line: Line, ids: list[int], eos_id: int, path: str) -> list[int]:
    """The response with its end-of-sequence token, which its text may have already; or as it is, where another token
    ends it.
    """
    if eos_id in ids[:-1]:
        raise InputError(
            f"{path}, line {line.number}: expected the response's end-of-sequence token at its end, got one as token "
            f"{ids.index(eos_id) + 1} of {len(ids)}: a model would stop there"
        )
    return ids if line.closed or ids[-1:] == [eos_id] else [*ids, eos_id]


def _difference(text: str, read: str) -> str:
    """Where two texts part, a few characters of either."""
    same = next((i for i, (a, b) in enumerate(zip(text, read, strict=False)) if a != b), min(len(text), len(read)))
    return f"{text[same : same + 12]!r} became {read[same : same + 12]!r}"
