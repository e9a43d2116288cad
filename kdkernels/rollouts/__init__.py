"""Rollouts: responses that the student writes, to be scored and learnt from or to be evaluated."""

from collections.abc import Sequence
from typing import Protocol

from kdkernels.rollouts.local import LocalSampler

__all__ = ["LocalSampler", "Sampler", "write"]


class Sampler(Protocol):
    """Writes responses with the student's weights as they were at the last `sync`. Every process has one."""

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids any of which ends a response."""

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, greedy: bool = False
    ) -> list[list[int]]:
        """The responses to `prompts`.

        Args:
            prompts: token ids.
            max_new_tokens: of each response.
            greedy: takes the most probable token instead of drawing one from the student's distribution
                (temperature 1, nothing cut off).

        Returns:
            For each prompt the ids of its response, at least one, up to the first of `ends`, that one included.

        Raises:
            FloatingPointError: the student's logits are no distribution.
        """

    def sync(self) -> None:
        """Takes over the student's present weights. All processes call this together, before they generate with
        weights that have changed.
        """

    def metrics(self) -> dict[str, float]:
        """What it measured since the last `sync`, over all processes, which call this together; by the names under
        which it is logged.
        """

    def close(self) -> None:
        """Gives back what the sampler holds; nothing is generated afterwards."""


def write(
    sampler: Sampler, prompts: Sequence[Sequence[int]], max_new_tokens: int, vocab_size: int, *, greedy: bool = False
) -> list[list[int]]:
    """What the sampler generates, checked: on a GPU, an id without an embedding would end the process with an error
    that names no cause, and an empty response would be left out of the loss without a sign.

    Args:
        vocab_size: the ids that have a token.

    Raises:
        ValueError: there is not one response for each prompt, of at least one and at most `max_new_tokens` such ids.
    """
    responses = sampler.generate(prompts, max_new_tokens, greedy=greedy)
    if len(responses) != len(prompts):
        raise ValueError(f"sampler: expected {len(prompts)} responses, one for each prompt, got {len(responses)}")
    for response in responses:
        if not 1 <= len(response) <= max_new_tokens:
            raise ValueError(f"sampler: expected responses of 1 to {max_new_tokens} tokens, got one of {len(response)}")
        for token in response:
            if type(token) is not int or not 0 <= token < vocab_size:
                raise ValueError(f"sampler: expected ids in [0, {vocab_size}), got {token!r}")
    return responses
