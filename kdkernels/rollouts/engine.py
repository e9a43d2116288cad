"""Engines that write the student's responses by other kernels than the trainer's, or on another machine: what they are
asked for, and what an answer must be.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

NEVER = -100.0  # added to a logit: the least that servers take. exp(-100) is 4e-44


@dataclass(frozen=True)
class Drawn:
    """One response: its token `ids`, and of each the log-probability (nats) in the distribution that it was drawn
    from.
    """

    ids: list[int]
    log_probs: list[float]


@dataclass(frozen=True)
class Asked:
    """What is asked of an engine for each response, beside the prompt: draws from exactly the model's distribution over
    its tokens, or greedy choices.

    `ends`: the ids any of which ends a response. `tokens`: how many ids have a token; `entries`: how many the model's
    output layer has, of which those from `tokens` on pad the vocabulary.
    """

    max_new_tokens: int
    greedy: bool
    ends: tuple[int, ...]
    tokens: int
    entries: int

    def parameters(self, seed: int) -> dict[str, Any]:
        """vLLM's sampling parameters, as its server's JSON and its Python class call them. Every one that a server's
        or a checkpoint's own defaults could set is named.
        """
        return {
            "temperature": 0.0 if self.greedy else 1.0,
            "top_p": 1.0,
            "top_k": 0,  # all
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "logit_bias": {str(entry): NEVER for entry in range(self.tokens, self.entries)} or None,
            "max_tokens": self.max_new_tokens,
            "min_tokens": 0,
            "ignore_eos": True,  # which one the engine's tokenizer has; those of `ends` end a response
            "stop_token_ids": list(self.ends),
            "seed": seed,
            "logprobs": 0,  # of the drawn token alone
        }

    def drawn(self, ids: Any, log_probs: Any) -> Drawn:
        """A response as it came. Raises ValueError unless it is one that can have been asked for."""
        if not isinstance(ids, list) or not isinstance(log_probs, list) or len(ids) != len(log_probs):
            raise ValueError(f"expected token ids and as many log-probabilities, got {ids!r:.99} and {log_probs!r:.99}")
        if not 1 <= len(ids) <= self.max_new_tokens:
            raise ValueError(f"expected a response of 1 to {self.max_new_tokens} tokens, got one of {len(ids)}")
        for token in ids:
            if type(token) is not int or not 0 <= token < self.tokens:
                raise ValueError(f"expected token ids in [0, {self.tokens}), got {token!r}: another vocabulary?")
        for value in log_probs:
            if type(value) not in (int, float) or not math.isfinite(value) or value > 1e-3:
                raise ValueError(f"expected log-probabilities, finite and at most 0, got {value!r}")
        if len(ids) < self.max_new_tokens and ids[-1] not in self.ends:
            raise ValueError(
                f"a response of {len(ids)} tokens ends before {self.max_new_tokens} and not with a token that ends one "
                f"({', '.join(map(str, self.ends))}), but with {ids[-1]}: is the engine's longest text too short?"
            )
        if any(token in self.ends for token in ids[:-1]):
            raise ValueError(f"a response goes on behind a token that ends one ({', '.join(map(str, self.ends))})")
        return Drawn(ids, [float(value) for value in log_probs])


class Engine(Protocol):
    """Writes responses with the weights that it loaded last.

    `shared`: there is one for all processes, and one of them tells it what to load; otherwise each has its own.
    """

    shared: bool

    def load(self, directory: Path) -> None:
        """Takes the weights of the model in `directory`, which `save_pretrained` wrote.

        Raises ServerError or InputError.
        """

    def draw(self, prompts: Sequence[Sequence[int]], asked: Asked, seeds: Sequence[int]) -> list[Drawn]:
        """A response to each prompt (token ids), drawn with its seed. Raises ServerError."""

    def close(self) -> None:
        """Gives back what the engine holds."""
