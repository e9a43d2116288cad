"""What a trainer asks of a teacher."""

from typing import Protocol

from kdkernels.data.batch import Batch
from kdkernels.sources import Source


class Teacher(Protocol):
    """Gives the teacher's distributions over the next token, as a source that objectives take.

    `alone`: whether `score` may fail on one process and not on the others, as what asks a server or reads a disk may:
    a step then ends on all of them. Such a `score` may have no operation of all processes in it.
    """

    alone: bool

    def score(self, batch: Batch) -> Source:
        """The source of `batch`, on its device, over its positions [B, L], of which only those that its layout has are
        read; no gradient reaches it.
        """
