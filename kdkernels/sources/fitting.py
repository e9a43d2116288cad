"""Whether a student and a teacher fit each other, and which vocabulary they share."""

from __future__ import annotations

from .base import Source


def check_student(student: object) -> None:
    """Raises a TypeError for what is no trainable source."""
    if not isinstance(student, Source) or not student.trainable:
        raise TypeError(f"student: expected kd.Head or kd.Logits, got {type(student).__name__}")


def check_teacher(student: Source, teacher: object, same_positions: bool = True) -> None:
    """Checks that a teacher fits the student.

    Args:
        student: a student that has been checked.
        teacher: what was given as the teacher.
        same_positions: its leading dimensions have to be the student's; False where a mask of its own says which
            positions belong together.

    Raises:
        TypeError: teacher is no source, or its dtype does not go with the student's.
        ValueError: it is on another device, or has other leading dimensions.
    """
    if not isinstance(teacher, Source):
        raise TypeError(f"teacher: expected kd.Head, kd.Logits or kd.TopK, got {type(teacher).__name__}")
    device = student.device
    if teacher.device != device:
        raise ValueError(f"teacher: expected device {device} (the student's), got {teacher.device}")
    if not teacher.fits_dtype(student):
        raise TypeError(
            f"teacher: expected at most 32 bits beside a student of {student.dtype}, got {teacher.dtype}; pass the "
            "student's tensors in fp64 too, or the teacher's in fp32"
        )
    if teacher.group is not None and teacher.group is not student.group:
        raise ValueError(
            "teacher: expected the group that divides the student's vocabulary, or none (a whole head, of which each "
            f"rank multiplies its part), got {'another' if student.group else 'one, and the student has none'}"
        )
    if same_positions and teacher.shape != student.shape:
        raise ValueError(
            f"teacher: expected {teacher.names[0]} of shape {[*student.shape, teacher.axis]}, got "
            f"{list(teacher.tensors[0].shape)}"
        )


def check_complete(teacher: Source, why: str) -> None:
    """Raises a TypeError, which says ``why``, for a teacher that knows only K entries of each token."""
    if not teacher.complete:
        raise TypeError(f"teacher: expected kd.Head or kd.Logits, got {type(teacher).__name__}: {why}")


def shared_vocabulary(student: Source, teacher: Source | None) -> int:
    """How many entries both models can score: as many as the student has.

    A teacher that knows K entries of each token names ids of the student's vocabulary.

    Raises:
        ValueError: the teacher has fewer entries than the student. The student is not cut to the teacher's size by
            itself: whoever wants that passes this ``vocab_size`` to the student.
    """
    if teacher is None or not teacher.complete:
        return student.vocabulary
    if teacher.vocabulary < student.vocabulary:
        raise ValueError(
            f"teacher: expected a vocabulary of at least the student's {student.vocabulary} entries, got "
            f"{teacher.vocabulary}; if the student's rest is padding, say vocab_size={teacher.vocabulary} there"
        )
    return student.vocabulary
