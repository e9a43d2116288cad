"""How far a command is: a bar, or without a terminal a line now and then, on the first process."""

import sys
import time

from tqdm import tqdm

from kdkernels.training.processes import distributed

PLAIN_SECONDS = 20.0  # between two lines where there is no terminal


class Progress:
    """Counts to `total`, of which this process has its share; a context manager."""

    def __init__(self, what: str, total: int):
        self.what, self.share = what, -(-total // distributed.world_size())
        self.done, self.said = 0, time.monotonic()
        terminal, first = sys.stderr.isatty(), distributed.rank() == 0
        self.plain = first and not terminal
        self.bar = tqdm(total=self.share, desc=what, leave=False, disable=not (first and terminal))

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, count: int) -> None:
        """So many more are done."""
        self.done += count
        self.bar.update(count)
        if self.plain and time.monotonic() - self.said > PLAIN_SECONDS:
            self.said = time.monotonic()
            print(f"{self.what}: {self.done} of this process's {self.share}", file=sys.stderr, flush=True)
