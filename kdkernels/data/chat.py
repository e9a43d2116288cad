"""Conversations: what a model sees before each of its answers, and the answer, by the tokenizer's chat template.

The prompt of an answer is the conversation before it with the template's generation prompt, as a model gets it when it
writes the answer; the response is what the template writes on from there, to the token that ends the turn. So the loss
is of the assistant's tokens alone, and each is predicted from what stands before it when a model is asked.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from kdkernels.data.encoding import Encoder
from kdkernels.data.records import IN_JSON, records
from kdkernels.data.texts import Line, any_of
from kdkernels.errors import InputError

ASSISTANT = "assistant"
Answers = Literal["all", "last"]
Message = dict[str, str]
REFUSALS = (TemplateError, ValueError, TypeError, LookupError)  # of a template


def render_chat(
    path: str,
    field: str,
    tokenizer: PreTrainedTokenizerBase,
    answers: Answers,
    special_tokens: Sequence[str],
    refused: Sequence[str],
    needed: bool,
) -> Iterator[Line]:
    """The answers in every record at `path`: of each the prompt, the assistant's message as the record has it and the
    response that the template makes of it.

    Args:
        field: that of a record which holds the conversation: messages, each an object of role and content.
        answers: "all": each of the assistant's messages is one; "last": the conversation's last message.
        special_tokens: the tokenizer's: one of them at the end of a response ends it.
        refused: those that a content may not have.
        needed: whether the answers are read. Else a conversation may end before one, all of it being the prompt.

    Raises:
        InputError: a tokenizer without a chat template, a record without such a conversation, and a template that
            refuses it, or does not begin an answer as its generation prompt does.
    """
    if not tokenizer.chat_template:
        raise InputError(
            f"[data] messages: the tokenizer {tokenizer.name_or_path} has no chat template: give another [tokenizer] "
            "path, or prompt and response in place of messages"
        )
    pattern = any_of(refused)
    for number, record in records(path):
        place = f"{path}, line {number}: [data] messages"
        messages = _messages(record, field, place, pattern)
        for turn in _turns(messages, answers, needed, place):
            prompt = _rendered(tokenizer, messages[:turn], True, place)
            if turn == len(messages):
                yield Line(number, prompt, "", "", False)
            else:
                whole = _rendered(tokenizer, messages[: turn + 1], False, place)
                if not whole.startswith(prompt):
                    raise InputError(_another_beginning(tokenizer, prompt, whole, place))
                yield _line(number, prompt, messages[turn]["content"], whole[len(prompt) :], special_tokens)


def _turns(messages: list[Message], answers: Answers, needed: bool, place: str) -> list[int]:
    """Where in the conversation the answers stand; that of a conversation which ends before one: behind it."""
    turns = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    open_end = messages[-1]["role"] != ASSISTANT
    if open_end and needed:
        raise InputError(
            f"{place}: expected a conversation that ends with a message of the role {ASSISTANT!r}, got "
            f"{messages[-1]['role']!r}"
        )
    turns += [len(messages)] if open_end else []
    turns = turns if answers == "all" else turns[-1:]
    if turns[0] == 0:
        raise InputError(
            f"{place}: expected a message before the {ASSISTANT}'s first: take that one out of the data, or, of a "
            'longer conversation, set answers = "last" in [data]'
        )
    return turns


def turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token with which the tokenizer's chat template ends an answer, whether or not it is the tokenizer's
    end-of-sequence token. None where no special token ends it, or the template refuses a question with its answer.
    """
    messages = [{"role": role, "content": "x"} for role in ("user", ASSISTANT)]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False).rstrip()
    except REFUSALS:
        return None
    ends = [one for one in Encoder(tokenizer).special_tokens() if text.endswith(one)]
    return tokenizer.convert_tokens_to_ids(max(ends, key=len)) if ends else None


def _line(number: int, prompt: str, answer: str, response: str, special_tokens: Sequence[str]) -> Line:
    """With the response as far as the token that ends the turn: white space that a template puts behind is no part."""
    stripped = response.rstrip()
    closed = stripped.endswith(tuple(special_tokens))
    return Line(number, prompt, answer, stripped if closed else response, closed)


def _messages(record: dict[str, Any], field: str, place: str, refused) -> list[Message]:
    if field not in record:
        raise InputError(f"{place}: field {field!r} is missing; the line has {', '.join(record)}")
    messages = record[field]
    if not isinstance(messages, list) or not messages:
        raise InputError(f"{place}: field {field!r}: expected a list of messages, got {_named(messages)}")
    return [_message(one, f"{place}: message {n} of field {field!r}", refused) for n, one in enumerate(messages, 1)]


def _message(message: Any, place: str, refused) -> Message:
    if not isinstance(message, dict):
        raise InputError(f"{place}: expected an object of role and content, got {_named(message)}")
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            raise InputError(f"{place}: {key}: expected a text, got {_named(message.get(key))}")
    others = [key for key, value in message.items() if key not in ("role", "content") and value is not None]
    if others:
        raise InputError(f"{place}: expected role and content alone, got {others[0]!r} too: take it out of the data")
    try:
        message["content"].encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{place}: content: expected a text, got half a surrogate pair in it") from error
    found = refused and refused.search(message["content"])
    if found:
        raise InputError(
            f"{place}: content has {found[0]!r} in it, which the tokenizer reads as a special token: take it out, or, "
            "where it is meant as one, set special_tokens_in_fields = true in [data]"
        )
    return {key: message[key] for key in ("role", "content")}


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: bool, place: str) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except REFUSALS as error:
        raise InputError(f"{place}: the chat template of {tokenizer.name_or_path} refuses it: {error}") from error


def _another_beginning(tokenizer: PreTrainedTokenizerBase, prompt: str, whole: str, place: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole))
    )
    return (
        f"{place}: the chat template of {tokenizer.name_or_path} does not write an answer behind its own generation "
        f"prompt: at character {same + 1} the prompt has {prompt[same : same + 30]!r} and the conversation "
        f"{whole[same : same + 30]!r}. A model would be trained on what it does not see when it writes: give a "
        "tokenizer with another template"
    )


def _named(value: Any) -> str:
    return IN_JSON.get(type(value), f"{value!r}") if value != [] else "none"
