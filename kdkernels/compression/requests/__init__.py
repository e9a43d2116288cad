"""What a teacher is asked for when it rewrites a rationale, and how its reply is read: teacher.toml and length.toml
beside this file, or a file of a recipe's own ([reasoning] request) with the same keys.
"""

import re
from dataclasses import MISSING, dataclass
from pathlib import Path

from kdkernels.errors import InputError
from kdkernels.training.recipe.schema import parse_table, read_toml
from kdkernels.training.recipe.stages import ReasoningConfig

HERE = Path(__file__).parent
NEEDED = {"teacher": "student", "length": "words"}  # what a compressor's request must say


class Unusable(Exception):
    """A reply that is no rewritten rationale; the message is the kind, by which they are counted."""


@dataclass(frozen=True)
class Request:
    """The wording. `marks`: those around the rewriting in a reply, or two empty texts."""

    request: str
    marks: tuple[str, str]

    def ask(self, values: dict[str, str]) -> str:
        """The request with each {name} of `values` filled in; other braces stay, also those in the values."""
        return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), self.request)

    def read(self, reply: str) -> str:
        """The rewriting in a reply. Raises Unusable."""
        before, behind = self.marks
        if before:
            if reply.count(before) != 1 or reply.count(behind) != 1:
                raise Unusable("not between the two marks")
            outside, _, rest = reply.partition(before)
            reply, _, rest = rest.partition(behind)
            if (outside + rest).strip():
                raise Unusable("text outside the marks")
        if not reply.strip():
            raise Unusable("empty")
        try:
            reply.encode()
        except UnicodeEncodeError:
            raise Unusable("broken characters") from None
        return reply.strip()


def read_request(settings: ReasoningConfig) -> Request:
    """That of the recipe's compressor. Raises InputError."""
    path = Path(settings.request) if settings.request else HERE / f"{settings.compressor}.toml"
    known = {"request": (str, MISSING), "marks": (tuple[str, str], MISSING)}
    request = Request(**parse_table(read_toml(path), known, f"{path}:"))
    needed = NEEDED[settings.compressor]
    if f"{{{needed}}}" not in request.request:
        raise InputError(f"{path}: request: expected {{{needed}}} in it")
    if bool(request.marks[0]) != bool(request.marks[1]):
        raise InputError(f"{path}: marks: expected two, or two empty texts, got {list(request.marks)}")
    return request
