"""A judge that needs no model, for recipes/rehearsal-vcrd.toml and as a pattern for one's own."""

from collections.abc import Sequence

WINDOW = 8  # tokens


def new_tokens(prefixes: Sequence[Sequence[int]], tokens: Sequence[int]) -> list[float]:
    """1 / (1 + how often a token is among the last 8 of its prefix): what repeats itself is worth less."""
    return [1 / (1 + list(prefix[-WINDOW:]).count(token)) for prefix, token in zip(prefixes, tokens, strict=True)]
