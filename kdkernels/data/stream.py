"""The order in which a run takes its examples."""

import random


class ExampleStream:
    """The examples 0 ... size-1 over and over, each epoch in an order of its own that depends on the seed alone.

    `position` counts the examples handed out since the beginning: it is the whole state.
    """

    def __init__(self, size: int, seed: int, position: int = 0):
        self.size, self.seed, self.position = size, seed, position
        self._orders: dict[int, list[int]] = {}  # of the epochs at hand: to shuffle millions takes a second

    def next(self, count: int) -> list[int]:
        """The next `count` examples."""
        positions = range(self.position, self.position + count)
        epochs = {position // self.size for position in positions}
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch in epochs}
        self.position += count
        return [self._orders[position // self.size][position % self.size] for position in positions]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(self.size))
        random.Random(f"seed {self.seed}, epoch {epoch}").shuffle(order)
        return order
