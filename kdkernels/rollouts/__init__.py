"""Rollouts: responses that the student writes, to be scored and learnt from or to be evaluated."""

from collections.abc import Sequence
from typing import Protocol

from kdkernels.rollouts.local import LocalSampler

__all__ = ["LocalSampler", "Sampler"]


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
            For each prompt the ids of its response up to the first of `ends`, that one included.

        Raises:
            FloatingPointError: the student's logits are no distribution.
        """

    def sync(self) -> None:
        """Takes over the student's present weights. All processes call this together, before they generate with
        weights that have changed.
        """

    def close(self) -> None:
        """Gives back what the sampler holds; nothing is generated afterwards."""
