"""Which examples the steps of a run take, and what the student wrote for those to come.

Of the steps whose responses the student writes, `updates` in a row ([rollout]) share one generation: the prompts of
updates / reuse batches are written to at once, and each of these batches is trained on `reuse` times, in turn.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from kdkernels.data import Example, ExampleStream
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config

Ids = Sequence[int]
STATE = ("batches", "coming", "responses", "written")


def student_steps(step: int, fraction: float) -> int:
    """Of the steps 1 ... `step`, those whose responses the student writes: the given fraction, evenly spread."""
    return math.floor(step * fraction)


class Buffer:
    """The batches of a run, on every process alike, and this process's share of what the student wrote to them.

    Args:
        config: the recipe.
        examples: what the run trains on.
        stream: their order.
    """

    def __init__(self, config: Config, examples: Sequence[Example], stream: ExampleStream):
        self.rollout, self.train, self.examples, self.stream = config.rollout, config.train, examples, stream
        self.batches: list[list[int]] = []  # examples by their places in `examples`
        self.coming: list[int] = []  # the batch that each of the student's next steps takes
        self.responses: list[list[list[int]]] | None = None  # to this process's share of each batch
        self.written = 0  # the step in which they were
        self.taken: int | None = None  # the batch of the student's last step

    def state(self) -> dict[str, Any]:
        """What it takes to go on after a step, in plain containers; nothing where no batch is left."""
        return {name: getattr(self, name) for name in STATE} if self.coming else {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes back to what `state` gave. Raises KeyError."""
        for name in STATE if state else ():
            setattr(self, name, state[name])

    def batch(self, step: int) -> list[Example]:
        """The examples of `step`, of all processes; the steps are asked for one after another."""
        fraction, size = self.rollout.student_fraction, self.train.batch_size
        before = student_steps(step - 1, fraction)
        if student_steps(step, fraction) == before:
            return [self.examples[place] for place in self.stream.next(size)]
        if not self.coming:
            left = max(
                1, student_steps(self.train.steps, fraction) - before
            )  # one more batch than steps may be asked for
            uses = min(self.rollout.updates, left)
            count = -(-uses // self.rollout.reuse)
            self.batches = [self.stream.next(size) for _ in range(count)]
            self.coming, self.responses = [use % count for use in range(uses)], None
        self.taken = self.coming.pop(0)
        return [self.examples[place] for place in self.batches[self.taken]]

    def write(self, step: int, write: Callable[[list[Ids]], list[list[int]]]) -> tuple[list[list[int]], int]:
        """What the student wrote to this process's share of the batch of `step`, and before how many steps.

        `write(prompts)` is called where nothing is written yet, or what is has become too old: for this batch and all
        that are still to come. What it raises leaves them unwritten.
        """
        oldest = self.rollout.max_staleness
        if self.responses is None or (oldest is not None and step - self.written > oldest):
            self.responses = None
            needed = sorted({self.taken, *self.coming})
            shares = {number: self._prompts(number) for number in needed}
            responses = iter(write([prompt for number in needed for prompt in shares[number]]))
            found = {number: [next(responses) for _ in shares[number]] for number in needed}
            self.responses = [found.get(number, []) for number in range(len(self.batches))]
            self.written = step
        return self.responses[self.taken], step - self.written

    def _prompts(self, number: int) -> list[Ids]:
        own = self.batches[number][distributed.rank() :: distributed.world_size()]
        return [self.examples[place].prompt_ids for place in own]
