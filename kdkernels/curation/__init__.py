"""Data from several teachers that answer: who is asked, which answers are kept, and why (docs/TWT.md).

    from kdkernels.curation import curate, read_curation
    dataset = curate(read_curation("recipes/twt.toml"))

`LocalChat` needs torch and transformers, which are imported when it is first asked for.
"""

from typing import TYPE_CHECKING

from kdkernels.curation.chat import Answer, Chat, Failure

if TYPE_CHECKING:
    from kdkernels.curation.local import LocalChat

__all__ = ["Answer", "Chat", "Failure", "LocalChat"]


def __getattr__(name: str):
    if name != "LocalChat":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kdkernels.curation.local import LocalChat

    return globals().setdefault(name, LocalChat)
