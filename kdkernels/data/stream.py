"""The order in which a run takes its examples."""

import random
from collections.abc import Sequence

WINDOW = 16  # batches whose examples are sorted by length together: on GSM8K that leaves 7 % of padding, 8 would 11 %


class ExampleStream:
    """The examples 0 ... size-1 over and over, each epoch in an order of its own that depends on the seed alone.

    With `lengths`, the `batch_size` examples that are taken at a time are of similar length, and so is every n-th of
    them: of an epoch in random order, WINDOW batches at a time are sorted by length, cut into batches again, and these
    are taken in random order. Where an epoch ends within a batch, that one is of any lengths.

    `together`: so many examples, one behind the other, are a group: they are taken at the same time and are as long
    as the longest one. Of those taken at a time, the first of all groups come first, then the second ones: every n-th
    of them has its share of each.

    `position` counts the groups handed out since the beginning: it is the whole state.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        position: int = 0,
        lengths: Sequence[int] | None = None,
        batch_size: int = 1,
        together: int = 1,
    ):
        self.size, self.seed, self.position = size // together, seed, position
        groups = lengths and [max(lengths[i : i + together]) for i in range(0, size, together)]
        self.lengths, self.batch_size, self.together = groups, batch_size // together, together
        self._orders: dict[int, list[int]] = {}  # of the epochs at hand: to shuffle millions takes a second

    def next(self, count: int) -> list[int]:
        """The next `count` examples, whole groups."""
        positions = range(self.position, self.position + count // self.together)
        epochs = {position // self.size for position in positions}
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch in epochs}
        self.position += len(positions)
        groups = [self._orders[position // self.size][position % self.size] for position in positions]
        return [group * self.together + i for i in range(self.together) for group in groups]

    def _order(self, epoch: int) -> list[int]:
        order, generator = list(range(self.size)), random.Random(f"seed {self.seed}, epoch {epoch}")
        generator.shuffle(order)
        return order if self.lengths is None else self._by_length(order, epoch, generator)

    def _by_length(self, order: list[int], epoch: int, generator: random.Random) -> list[int]:
        """`order` with the batches that lie in this epoch alone made of similar lengths."""
        size = self.batch_size
        first = min(self.size, -epoch * self.size % size)  # before it, the batch that the epoch before began
        last = first + (self.size - first) // size * size
        out = order[:first]
        for start in range(first, last, WINDOW * size):
            window = sorted(order[start : min(last, start + WINDOW * size)], key=self.lengths.__getitem__)
            batches = [window[i : i + size] for i in range(0, len(window), size)]
            generator.shuffle(batches)
            out += [example for batch in batches for example in batch]
        return out + order[last:]
