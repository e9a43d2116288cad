"""Top log-probabilities as servers return them, put where kd.TopK needs them.

What a server says about the token at t is the distribution that position t - 1 predicts. It comes in one of two ways:

    generated   one list for each token that the server wrote: those of one response
    scored      one list for each token of a whole text, the first one empty (vLLM's prompt_logprobs, OpenAI's echo)

Axes: N scored tokens of the layout, K entries.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import count, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layout import Layout

# OpenAI and vLLM write -9999 for a log-probability that they do not know or that is -inf; bf16 rounds it to -9984. No
# real one lies below.
UNKNOWN = -9000.0
TOKEN_ID = "token_id:"  # begins a token's text where vLLM was asked for return_tokens_as_token_ids


class Listed(NamedTuple):
    """What a server says about one token. Tokens are ids or texts."""

    token: int | str | None  # the one that stands there; None: the server does not say
    entries: list[tuple[int | str, float]]  # with log-probabilities; the token that stands there may come twice


class Served(NamedTuple):
    """The lists of one text or response, in the order of its tokens."""

    lists: list[Listed | None]  # None: the server says nothing
    scored: bool  # of all tokens of a text; else of those of a response


# ---- formats ---------------------------------------------------------------------------------------------------------


def openai(responses: object) -> list[Served]:
    """Of each choice, from chat completions and completions of the OpenAI protocol."""
    found = []
    for response in _listed(responses):
        for choice in _ordered(_field(_plain(response), "choices") or []):
            found.append(_choice(_field(choice, "logprobs")))
    if not found:
        raise ValueError("json: expected responses with choices, got none")
    return found


def _choice(logprobs: object) -> Served:
    content, tops = _field(logprobs, "content") or [], _field(logprobs, "top_logprobs") or []
    if not any(tops) and not any(_field(each, "top_logprobs") for each in content):
        raise ValueError(
            "json: expected top_logprobs in the logprobs of every choice, got none; ask the server for logprobs=True, "
            "top_logprobs=20 (chat completions) or logprobs=20 (completions)"
        )
    if tops:
        both = zip(_field(logprobs, "tokens"), _field(logprobs, "token_logprobs"), tops, strict=True)
        lists = [Listed(token, [*top.items(), (token, own)]) if top else None for token, own, top in both]
        return Served(lists, scored=lists[0] is None)
    lists = []
    for each in content:
        entries = [
            (_field(entry, "token"), _field(entry, "logprob")) for entry in (*_field(each, "top_logprobs"), each)
        ]
        lists.append(Listed(_field(each, "token"), entries))
    return Served(lists, scored=False)


def vllm(outputs: object) -> list[Served]:
    """Of each text or completion, from vLLM's RequestOutputs, their JSON, or lists {id: log-probability}."""
    found = [one for output in _listed(outputs) for one in _output(output)]
    if not found:
        raise ValueError("outputs: expected at least one, got none")
    return found


def _output(output: object) -> list[Served]:
    output = _plain(output)
    if isinstance(output, Sequence):
        if not any(_is_output(each) for each in output):
            return [Served(_steps(output, None), scored=True)]
        parts = [one for each in output for one in _output(each)]  # packed texts: one behind the other
        if not all(part.scored for part in parts):
            return parts
        return [Served([each for part in parts for each in part.lists], scored=True)]
    prompt = _field(output, "prompt_logprobs")
    if prompt:
        return [Served(_steps(prompt, _field(output, "prompt_token_ids")), scored=True)]
    choices = _field(output, "choices")
    if choices:
        return [one for choice in _ordered(choices) for one in _output(choice)]
    written = [one for one in _field(output, "outputs") or [] if _field(one, "logprobs")]
    if not written:
        raise ValueError(
            "outputs: expected prompt_logprobs or the logprobs of completions, got neither; ask vLLM for "
            "SamplingParams(prompt_logprobs=20, max_tokens=1) to score texts, or for logprobs=20"
        )
    return [Served(_steps(_field(one, "logprobs"), _field(one, "token_ids")), scored=False) for one in written]


def _is_output(value: object) -> bool:
    """Whether this is said about a text, and not about a token: {id: log-probability} or None."""
    return isinstance(value, (list, tuple, str, bytes)) or any(
        _field(value, name) for name in ("prompt_logprobs", "choices", "outputs")
    )


def _steps(steps: Iterable, tokens: Sequence[int] | None) -> list[Listed | None]:
    steps = list(steps)
    tokens = [None] * len(steps) if tokens is None else tokens
    if len(tokens) != len(steps):
        raise ValueError(f"outputs: expected as many lists as the {len(tokens)} tokens, got {len(steps)}")
    return [_step(step, token) for step, token in zip(steps, tokens, strict=True)]


def _step(step: object, token: int | None) -> Listed | None:
    if not step:
        return None
    keys = list(step) if isinstance(step, Mapping) else []
    if not keys or not all(isinstance(key, int) or key.isdecimal() for key in keys):
        raise ValueError(f"outputs: expected {{id: log-probability}} or None for each token, got {step!r}")
    return Listed(token, [(int(key), _value(value)) for key, value in step.items()])


def _value(value: object) -> float:
    """The log-probability: a number, or the ``logprob`` of what vLLM says about an id."""
    return value if isinstance(value, (int, float)) else _field(value, "logprob")


def _listed(values: object) -> Sequence:
    return values if isinstance(values, (list, tuple)) else [values]


def _plain(response: object) -> object:
    """A response as JSON text or a client's object as what it says."""
    if isinstance(response, (str, bytes)):
        try:
            return json.loads(response)
        except ValueError as error:
            raise ValueError(f"json: expected a response as JSON, got {response[:40]!r} ...: {error}") from error
    return response.model_dump() if hasattr(response, "model_dump") else response


def _ordered(choices: Iterable) -> list:
    """In the order of what was asked for, which is not always the one that they were ready in."""
    return sorted(choices, key=lambda choice: _field(choice, "index") or 0)


def _field(value: object, name: str) -> Any:
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


# ---- which list belongs to which position ----------------------------------------------------------------------------


def tensors(
    served: list[Served], reader: Reader, layout: Layout, starts: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Ids [B, L, K] int32 and log-probabilities [B, L, K] fp32: NaN at the positions that the layout does not score."""
    if not isinstance(layout, Layout):
        raise TypeError(
            f"layout: expected a kd.Layout such as kd.Layout.from_labels(labels), got {type(layout).__name__}"
        )
    lists = _of_positions(served, reader.name, layout, starts)
    places = [divmod(flat, layout.shape[1]) for flat in layout.index.tolist()]
    tokens = [None] * len(lists) if layout.token is None else layout.token.tolist()
    rows = [
        reader.entries(listed, token, f"[{b}, {t}]")
        for listed, token, (b, t) in zip(lists, tokens, places, strict=True)
    ]
    k = max(map(len, rows), default=1)
    ids = torch.arange(k, dtype=torch.int32).repeat(math.prod(layout.shape), 1)
    log_probs = torch.full(ids.shape, math.nan)
    if rows:
        index = layout.index.cpu()
        ids[index] = torch.tensor([[*row, *_padding(row, k)] for row in rows], dtype=torch.int32)
        log_probs[index] = torch.tensor([[*row.values(), *[-math.inf] * (k - len(row))] for row in rows])
    return tuple(values.view(*layout.shape, k).to(layout.index.device) for values in (ids, log_probs))


def _padding(row: Mapping[int, float], k: int) -> Iterable[int]:
    """The smallest ids that the row does not have."""
    return islice((i for i in count() if i not in row), k - len(row))


def _of_positions(served: list[Served], name: str, layout: Layout, starts: Sequence[int] | None) -> list[Listed]:
    """The list of each of the layout's N positions, in its order."""
    scored = served[0].scored
    if any(one.scored != scored for one in served):
        raise ValueError(f"{name}: expected texts that were scored or responses that were generated, got both")
    if scored:
        return _of_texts([one.lists for one in served], name, layout, starts)
    if starts is not None:
        raise ValueError("starts: expected None where the lists are those of generated responses")
    if len(served) != layout.responses:
        raise ValueError(
            f"{name}: expected one generated response for each of the layout's {layout.responses}, got {len(served)}"
        )
    for number, (one, length) in enumerate(zip(served, layout.lengths, strict=True)):
        if len(one.lists) != length:
            raise ValueError(
                f"{name}: expected {length} tokens in response {number} (sequence {int(layout.sequence[number])}), as "
                f"in the layout, got {len(one.lists)}; a server that does not return the final token (EOS) knows "
                "nothing about it: ignore its label"
            )
    return [each for one in served for each in one.lists]


def _of_texts(
    texts: list[list[Listed | None]], name: str, layout: Layout, starts: Sequence[int] | None
) -> list[Listed]:
    rows, length = layout.shape
    if starts is not None and not isinstance(starts, (Sequence, Tensor)):
        raise TypeError(f"starts: expected a position for each of the {rows} sequences, got {starts!r}")
    starts = [0] * rows if starts is None else [int(start) for start in starts]
    if len(texts) != rows or len(starts) != rows:
        raise ValueError(
            f"{name}: expected a text and a start for each of the {rows} sequences, got {len(texts)} texts and "
            f"{len(starts)} starts; packed texts of one sequence go into one list"
        )
    found = []
    for flat in layout.index.tolist():
        b, t = divmod(flat, length)
        place = t + 1 - starts[b]  # of the token that this position predicts
        listed = texts[b][place] if 0 <= place < len(texts[b]) else None
        if listed is None:
            raise ValueError(
                f"{name}: expected a list about the token at [{b}, {t + 1}], which position {t} predicts, got none at "
                f"place {place} of a text of {len(texts[b])} tokens; starts= says where in its sequence each text "
                "begins (left padding)"
            )
        found.append(listed)
    return found


# ---- what a list says ------------------------------------------------------------------------------------------------


class Reader:
    """Reads a list as ids and log-probabilities.

    name: of the argument that the lists came in; tokenizer: whose texts they have, if any; drop_ambiguous: whether
    entries whose text is that of several ids are left out.
    """

    def __init__(self, name: str, tokenizer: object = None, drop_ambiguous: bool = False):
        self.name, self.tokenizer, self.drop_ambiguous = name, tokenizer, drop_ambiguous

    def entries(self, listed: Listed, token: int | None, where: str) -> dict[int, float]:
        """What a list says about ``token`` (None: not known), without entries that the server does not know."""
        if token is not None:
            self._check(listed, token, where)
        found: dict[int, float] = {}
        for key, value in listed.entries:
            if not isinstance(value, (int, float)) or math.isnan(value):
                raise ValueError(f"{self.name}: expected a log-probability of {key!r} at {where}, got {value!r}")
            if value <= UNKNOWN:
                continue
            ids = self._candidates(key, where)
            if key == listed.token and token in ids:
                ids = (token,)
            if len(ids) == 1:
                found.setdefault(ids[0], value)
            elif not self.drop_ambiguous:
                raise ValueError(
                    f"{self.name}: expected texts of one token each, got {key!r} at {where}, which is that of "
                    f"{list(ids[:4])}; ask vLLM for return_tokens_as_token_ids, or let drop_ambiguous=True put such "
                    "entries into the bucket"
                )
        if not found:
            raise ValueError(f"{self.name}: expected an entry with a log-probability at {where}, got none")
        return found

    def _check(self, listed: Listed, token: int, where: str) -> None:
        """Refuses a list that is about another token than the one its position predicts."""
        if listed.token is not None:
            if token in self._candidates(listed.token, where):
                return
            got = f"one about {listed.token!r}"
        elif any(key == token for key, _ in listed.entries):  # vLLM lists the token itself beside the most likely ones
            return
        else:
            got = f"one of {[key for key, _ in listed.entries]}"
        raise ValueError(
            f"{self.name}: expected at {where} the list about token {token}, the label at the next position, got "
            f"{got}; the lists are of another text or in other places (starts= where texts are padded on the left)"
        )

    def _candidates(self, token: int | str, where: str) -> Sequence[int]:
        """The ids that a token may have: itself, where it is an id, else those of which it is the text.

        Servers return decoded texts, and some the vocabulary's own ("\u2581the"), which are looked up second.
        """
        if isinstance(token, int):
            return (token,)
        if token.startswith(TOKEN_ID):
            return (int(token.removeprefix(TOKEN_ID)),)
        if self.tokenizer is None:
            raise TypeError(
                f"tokenizer: expected the teacher's, because {token!r} at {where} is a text, got None; vLLM returns "
                "ids where return_tokens_as_token_ids asks for them"
            )
        ids = _texts(self.tokenizer, len(self.tokenizer)).get(token)
        if ids is None:
            raise ValueError(f"{self.name}: expected tokens of the tokenizer, got {token!r} at {where}, which it lacks")
        return ids


@lru_cache(maxsize=2)
def _texts(tokenizer: Any, size: int) -> dict[str, tuple[int, ...]]:
    """Of each text the ids that decode to it or, where none does, the one that the vocabulary writes so."""
    pieces = tokenizer.get_vocab()
    ids = sorted(set(pieces.values()))
    found = defaultdict(list)
    for text, i in zip(tokenizer.batch_decode([[i] for i in ids]), ids, strict=True):
        found[text].append(i)
    return {text: (i,) for text, i in pieces.items()} | {text: tuple(numbers) for text, numbers in found.items()}
