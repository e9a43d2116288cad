"""The teachers of a recipe, checked, and each of several taken for the one of a recipe of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from kdkernels.errors import InputError
from kdkernels.training.recipe.config import Config, TeacherConfig


def each_teacher(config: Config) -> dict[str, Config]:
    """By section ("teacher", or "teachers.NAME" of each), the recipe with that one as its only teacher."""
    if config.teacher is not None:
        return {"teacher": config}
    return {f"teachers.{name}": replace(config, teacher=one, teachers={}) for name, one in config.teachers.items()}


@contextmanager
def of_section(section: str) -> Iterator[None]:
    """Names this section where an InputError of one teacher's recipe names [teacher]."""
    try:
        yield
    except InputError as error:
        raise InputError(renamed(str(error), section)) from error


def renamed(text: str, section: str) -> str:
    """A text about [teacher] as one about this section."""
    return text.replace("[teacher]", f"[{section}]")


def resolve_teachers(config: Config) -> dict[str, object]:
    """The fields of Config about teachers, checked, with their defaults. Raises InputError."""
    if not config.teachers:
        if config.data.teacher is not None:
            raise InputError("[data] teacher: expected tables [teachers.NAME] beside it, got none")
        return {"teacher": _teacher(config)}
    if config.teacher is not None:
        raise InputError("[teacher] expected either this section or [teachers.NAME], got both")
    if config.data.teacher is None:
        raise InputError("[data] key 'teacher' is missing: the field that names one of the [teachers.NAME]")
    found = {}
    for section, alone in each_teacher(config).items():
        with of_section(section):
            found[section.partition(".")[2]] = _teacher(alone)
            if alone.teacher.placement == "zero3":
                raise InputError(
                    '[teacher] placement: expected "replicated" or "cpu" for one of several, as processes ask it '
                    'unequally often, got "zero3"'
                )
    return {"teachers": found}


def _teacher(config: Config) -> TeacherConfig | None:
    teacher = config.teacher
    if teacher is None:
        return None
    given = [name for name in ("path", "base", "url") if getattr(teacher, name)]
    if len(given) > 1 or not (given or teacher.cache):
        raise InputError(
            f"[teacher] expected one of path, base and url, or a cache, got {' and '.join(given) or 'none of them'}"
        )
    if teacher.cache is not None and teacher.base:
        raise InputError("[teacher] cache: expected it alone or beside a path or url, got base too")
    if teacher.path is not None:
        return teacher if teacher.dtype else replace(teacher, dtype=config.run.dtype)
    if teacher.base and config.student.adapter is None:
        raise InputError("[teacher] base is that of a student with [student.adapter]: without one, give it a path")
    for key in ("placement", "dtype", "attention"):
        if getattr(teacher, key) != getattr(TeacherConfig(), key):
            other = "the base shares the student's weights" if teacher.base else "none is loaded here"
            raise InputError(f"[teacher] {key} belongs to a model at path; {other}")
    return teacher
