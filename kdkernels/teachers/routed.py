"""Several teachers, each of which scores the responses of a batch that name it.

Axes: B responses, L positions, H hidden.
"""

from collections.abc import Mapping

import torch

from kdkernels.data.batch import Batch
from kdkernels.sources import Head, Source
from kdkernels.sources.head import plain
from kdkernels.sources.mixed import Mixed
from kdkernels.teachers.protocol import Teacher


class RoutedTeacher:
    """Asks each of the `teachers` about the responses of a batch that have its name (`Batch.teachers`).

    The others' responses are no part of what it is asked, which keeps the batch's length L. Where all responses have
    one teacher, what it says is passed on as it is.
    """

    def __init__(self, teachers: Mapping[str, Teacher]):
        self.teachers = teachers
        self.alone = any(teacher.alone for teacher in teachers.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} ({teacher})" for name, teacher in self.teachers.items())

    @torch.no_grad()
    def score(self, batch: Batch) -> Source:
        """What the teachers say. Raises LookupError for a name that none has, TypeError where one of several gives no
        hidden states.
        """
        names = list(dict.fromkeys(batch.teachers))
        missing = [name for name in names if name not in self.teachers]
        if missing:
            raise LookupError(f"teachers: expected {', '.join(self.teachers)}, got {missing[0]!r}")
        if len(names) == 1:
            return self.teachers[names[0]].score(batch)
        heads = []
        choice = torch.zeros(*batch.layout.shape, 1, dtype=torch.long)
        for number, name in enumerate(names):
            own = [b for b, one in enumerate(batch.teachers) if one == name]
            choice[own] = number
            heads.append(_spread(self.teachers[name].score(batch.part(own)), own, batch))
        return Mixed(choice.to(batch.input_ids.device), tuple(heads))


def _spread(source: Source, rows: list[int], batch: Batch) -> Head:
    """A head over these rows of a batch as one over all of them."""
    source = plain(source, "teachers: each of several in a batch")
    hidden = source.hidden.new_zeros(*batch.layout.shape, source.width)
    hidden[rows] = source.hidden
    return Head(hidden, source.weight, source.bias, source.softcap, source.scale, source.vocab_size)
