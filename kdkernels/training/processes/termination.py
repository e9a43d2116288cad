"""SIGTERM: a wish to end, granted at the end of the step under way, or of the next one whose weights may be saved."""

import signal
import threading
from contextlib import AbstractContextManager

import torch

from kdkernels.training.errors import Stopped
from kdkernels.training.processes import distributed

_EARLY = "stopped by SIGTERM before training began"


class Termination(AbstractContextManager):
    """Takes SIGTERM while the context lasts: it is noted, however often it comes (a launcher and a batch system both
    send it). While `at_once` is set it raises Stopped instead: nothing is trained yet, and nothing has to be finished.

    Outside the main thread, where Python allows no handlers, SIGTERM keeps its meaning.
    """

    def __init__(self):
        self.at_once = self.noted = False
        self.previous = None

    def stop_at_once(self) -> None:
        """From now on SIGTERM raises Stopped, until `at_once` is taken back; one that came before does now."""
        self.at_once = True
        if self.noted:
            raise Stopped(_EARLY)

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
        if self.at_once:
            raise Stopped(_EARLY)
