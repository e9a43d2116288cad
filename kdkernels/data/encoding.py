"""Prompts and responses as token ids whose boundary is the one a model sees when it generates.

A prompt is tokenized by itself, as for generation: what the tokenizer puts before a text (BOS) stays before it, once;
what it puts behind a text (EOS) does not belong behind a prompt, which is to be continued. A response is the ids that
follow those of its prompt and read, behind them, as the response's text:

    decode(prompt ids + response ids) = decode(prompt ids) + response

Tokenizing a response by itself does that for byte-level tokenizers but not for those of the SentencePiece family, which
put a space before every text: "12+3=" and "15." would become "12+3= 15.". So a response is tokenized in several
contexts (nothing, its prompt, one character) and what belongs to the context is cut off again; the first one whose ids
read right is taken. Ids that follow the prompt's in those of the whole text are right by definition: where they read
otherwise (a space that the tokenizer puts behind every special token), that is the tokenizer's way to read the text.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from kdkernels.errors import InputError

ANCHORS = ("\n", "=", "x")  # contexts that few tokens span
SHOWN = 32  # tokens of a prompt or a response that are shown, at either end of it


@dataclass(frozen=True)
class Encoded:
    """A prompt and its response as ids. `response` has no EOS; None where no ids read as it behind the prompt's.

    `changed`: the text and how it reads, where the tokenizer does not give it back as it was (unknown characters,
    normalization); else None.
    """

    prompt: list[int]
    response: list[int] | None
    changed: tuple[str, str] | None


class Encoder:
    """Tokenizes texts for a model. Raises InputError for a tokenizer that alters a text's own tokens when it adds BOS
    or EOS to them.

    bare: the texts have all special tokens that belong to them, as those of a chat template do.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bare: bool = False):
        self.tokenizer, self.bare = tokenizer, bare
        self._prefix: list[int] | None = None

    def special_tokens(self) -> list[str]:
        """The texts that the tokenizer reads as special tokens."""
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        texts = {*self.tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        return sorted(text for text in texts if text)

    def encode(self, prompts: Sequence[str], responses: Sequence[str]) -> list[Encoded]:
        """Every prompt with its response."""
        bodies = self._ids(prompts)
        heads = self.decode(bodies)
        wanted = [head + response for head, response in zip(heads, responses, strict=True)]
        found: list[tuple[list[int], str] | None] = [None] * len(prompts)  # response ids and how all of it reads
        self._follow(bodies, prompts, responses, wanted, found)
        # where normalization or unknown characters change the response: as prompt and response read together
        left = [i for i, one in enumerate(found) if one is None]
        together = self.decode(self._ids([prompts[i] + responses[i] for i in left]))
        expected = dict(zip(left, together, strict=True))
        self._follow(bodies, prompts, responses, [expected.get(i, "") for i in range(len(prompts))], found)

        unknown, prefix = self.tokenizer.unk_token_id, [] if self.bare else self.prefix(prompts)
        encoded = []
        for i, (body, one) in enumerate(zip(bodies, found, strict=True)):
            response, read = one or (None, wanted[i])
            changed = (wanted[i], read) if read != wanted[i] else None
            if changed is None and unknown is not None and unknown in body and heads[i] != prompts[i]:
                changed = (prompts[i], heads[i])
            once = body if body[:1] == prefix[:1] else prefix + body
            encoded.append(Encoded(once, response, changed))
        return encoded

    def decode(self, ids: Sequence[list[int]]) -> list[str]:
        """The text of every list of ids, special tokens included, nothing tidied up."""
        if not ids:
            return []
        return self.tokenizer.batch_decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def show(self, prompt: Sequence[int], response: Sequence[int]) -> str:
        """Both as text and as tokens, special ones included, for people: `prompt | response`."""
        texts = [_shortened([*text], "", 4 * SHOWN) for text in self.decode([list(prompt), list(response)])]
        names = [self.tokenizer.convert_ids_to_tokens(list(ids)) for ids in (prompt, response)]
        visible = [[name if name.isprintable() and " " not in name else repr(name) for name in part] for part in names]
        tokens = [_shortened(part, " ", SHOWN) for part in visible]
        return (
            f"  text    {texts[0]!r} | {texts[1]!r}\n"
            f"  tokens  {tokens[0]} | {tokens[1]}\n"
            f"  {len(prompt)} tokens | {len(response) or 'none: nobody reads the responses of the data'}"
        )

    def prefix(self, texts: Iterable[str]) -> list[int]:
        """The ids that the tokenizer puts before every text; `texts` are some to try it with."""
        if self._prefix is None:
            text, body = next(((text, ids) for text in ("x", *texts) if (ids := self._ids([text])[0])), ("", []))
            full = list(self.tokenizer(text, verbose=False)["input_ids"])
            starts = [i for i in range(len(full) - len(body) + 1) if full[i : i + len(body)] == body]
            if not starts:
                raise InputError(
                    f"[tokenizer]: expected one that adds its special tokens around a text, got one that makes {full} "
                    f"of {text!r} with them and {body} without"
                )
            self._prefix = full[: starts[0]]
        return self._prefix

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of every text, without those that the tokenizer adds to texts."""
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]

    def _follow(
        self,
        bodies: Sequence[list[int]],
        prompts: Sequence[str],
        responses: Sequence[str],
        wanted: Sequence[str],
        found: list[tuple[list[int], str] | None],
    ) -> None:
        """Where `found` has None, puts response ids there that read as `wanted` behind the prompt's `bodies`, or, if
        the ids of prompt and response together begin with the prompt's, the rest of them, however they read.
        """
        for context in ("", None, *ANCHORS):  # None: the prompt
            left = [i for i, one in enumerate(found) if one is None]
            if not left:
                return
            if context is None:
                before = [bodies[i] for i in left]
                texts = [prompts[i] + responses[i] for i in left]
            else:
                before = self._ids([context]) * len(left)
                texts = [context + responses[i] for i in left]
            candidates = {
                i: ids[len(start) :]
                for i, start, ids in zip(left, before, self._ids(texts), strict=True)
                if ids[: len(start)] == start
            }
            read = self.decode([bodies[i] + ids for i, ids in candidates.items()])
            for (i, ids), text in zip(candidates.items(), read, strict=True):
                if context is None or text == wanted[i]:
                    found[i] = ids, text


def _shortened(parts: Sequence[str], joint: str, ends: int) -> str:
    """`parts` in one line, of very many the first and the last `ends` only."""
    left_out = len(parts) - 2 * ends
    if left_out > 0:
        dots = f"... {left_out} more ..." if joint else f" ... {left_out} more ... "
        parts = [*parts[:ends], dots, *parts[-ends:]]
    return joint.join(parts)
