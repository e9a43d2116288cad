"""Data from several teachers that answer: who is asked, which answers are kept, and why (docs/TWT.md).

    from kdkernels.curation import curate, read_curation
    dataset = curate(read_curation("recipes/twt.toml"))

What needs torch and transformers is imported when it is first asked for.
"""

import importlib
from typing import TYPE_CHECKING

from kdkernels.curation.chat import Answer, Chat, Failure
from kdkernels.training import with_reason

if TYPE_CHECKING:
    from kdkernels.curation.asking import Teacher, ask
    from kdkernels.curation.config import CurationConfig, TeacherConfig, read_curation
    from kdkernels.curation.journal import Journal
    from kdkernels.curation.local import LocalChat
    from kdkernels.curation.run import curate
    from kdkernels.curation.server import OpenAIChat

_MODULES = {
    "CurationConfig": "config",
    "Journal": "journal",
    "LocalChat": "local",
    "OpenAIChat": "server",
    "Teacher": "asking",
    "TeacherConfig": "config",
    "ask": "asking",
    "curate": "run",
    "read_curation": "config",
}
__all__ = [
    "Answer",
    "Chat",
    "CurationConfig",
    "Failure",
    "Journal",
    "LocalChat",
    "OpenAIChat",
    "Teacher",
    "TeacherConfig",
    "ask",
    "curate",
    "read_curation",
]


def __getattr__(name: str):
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with with_reason():
        module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
