"""SIGTERM: a wish to end, granted at the end of the step under way, or of the next one whose weights may be saved."""

import signal
import threading
from contextlib import AbstractContextManager

import torch

from kdkernels.training import distributed
from kdkernels.training.errors import Stopped


class Termination(AbstractContextManager):
    """Takes SIGTERM while the context lasts: before `training` is set, it raises Stopped at once, since there is
    nothing to save; from then on it is noted, however often it comes (a launcher and a batch system both send it).

    Outside the main thread, where Python allows no handlers, SIGTERM keeps its meaning.
    """

    def __init__(self):
        self.training = self.noted = False
        self.previous = None

    def asked(self) -> bool:
        """Whether any process got the signal; all processes call this together, and all get the same answer."""
        return distributed.total(torch.tensor([int(self.noted)], device=distributed.device())).item() > 0

    def __enter__(self) -> "Termination":
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)

    def _note(self, *_: object) -> None:
        self.noted = True
        if not self.training:
            raise Stopped("stopped by SIGTERM before training began")
