"""Teachers: what scores a batch for the student to learn from."""

from kdkernels.teachers.hidden import HiddenStatesTeacher
from kdkernels.teachers.local import LocalTeacher
from kdkernels.teachers.protocol import Teacher
from kdkernels.teachers.routed import RoutedTeacher

__all__ = ["HiddenStatesTeacher", "LocalTeacher", "RoutedTeacher", "Teacher"]
