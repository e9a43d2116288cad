"""Where a distribution over the next token comes from: a head over hidden states, logits, or stored top-k entries."""

from __future__ import annotations

from .base import Source, autocast_dtype, autocasts
from .head import Head
from .logits import Logits
from .topk import TopK

__all__ = ["Head", "Logits", "Source", "TopK", "autocast_dtype", "autocasts", "shared_vocabulary"]


def shared_vocabulary(student: Head | Logits, teacher: Source | None) -> int:
    """The words both can score: min over both sides of ``vocab_size`` or all words; stored words are the student's.

    Raises:
        ValueError: the teacher has fewer words than the student. Cutting the student to the teacher's size must be
            asked for, by passing that ``vocab_size`` to the student.
    """
    if teacher is None or isinstance(teacher, TopK):
        return student.vocabulary
    if teacher.vocabulary < student.vocabulary:
        raise ValueError(
            f"teacher: expected a vocabulary of at least the student's {student.vocabulary} words, got "
            f"{teacher.vocabulary}; if the student's rest is padding, say vocab_size={teacher.vocabulary} there"
        )
    return student.vocabulary
