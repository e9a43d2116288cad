"""The order in which a run takes its examples."""

import random
from collections.abc import Sequence

WINDOW = 16  # batches whose examples are sorted by length together: on GSM8K that leaves 7 % of padding, 8 would 11 %


class ExampleStream:
    """The examples 0 ... size-1 over and over, each epoch in an order of its own that depends on the seed alone.

    With `lengths`, the `batch_size` examples that are taken at a time are of similar length, and so is every n-th of
    them: of an epoch in random order, WINDOW batches at a time are sorted by length, cut into batches again, and these
    are taken in random order. Where an epoch ends within a batch, that one is of any lengths.

    `position` counts the examples handed out since the beginning: it is the whole state.
    """

    def __init__(
        self, size: int, seed: int, position: int = 0, lengths: Sequence[int] | None = None, batch_size: int = 1
    ):
        self.size, self.seed, self.position = size, seed, position
        self.lengths, self.batch_size = lengths, batch_size
        self._orders: dict[int, list[int]] = {}  # of the epochs at hand: to shuffle millions takes a second

    def next(self, count: int) -> list[int]:
        """The next `count` examples."""
        positions = range(self.position, self.position + count)
        epochs = {position // self.size for position in positions}
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch in epochs}
        self.position += count
        return [self._orders[position // self.size][position % self.size] for position in positions]

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
