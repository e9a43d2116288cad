"""Reading an answer, strictly: what does not keep to the sections is not guessed at, but counted."""

import re
from dataclasses import dataclass
from fractions import Fraction

from kdkernels.curation.chat import Answer
from kdkernels.curation.prompts import PARTS, Prompt

DECIMAL = re.compile(r"-?(?:\d+\.?\d*|\.\d+)", re.ASCII)
FENCE = re.compile(r"\s*```[A-Za-z0-9]*\n(.*?)\n?```\s*", re.DOTALL)
MONEY = re.compile(r"^(?:\\?\$|€|£)\s*|\s*\\?%$")


@dataclass(frozen=True)
class Parsed:
    """An answer in its parts. `confidence`: in [0, 1]."""

    rationale: str
    label: str
    confidence: float


class Unreadable(Exception):
    """An answer that does not have what it was asked for; the message is the kind, by which they are counted."""


def parse(answer: Answer, prompt: Prompt) -> Parsed:
    """The parts of an answer. Raises Unreadable."""
    if answer.truncated:
        raise Unreadable("truncated")
    try:
        answer.text.encode()
    except UnicodeEncodeError:
        raise Unreadable("broken characters") from None
    found = _sections(answer.text, prompt)
    for part in PARTS:
        if not found[part]:
            raise Unreadable(f"{part} is empty")
    if not DECIMAL.fullmatch(found["confidence"]):
        raise Unreadable("confidence is no decimal number")
    confidence = float(found["confidence"])
    if not 0 <= confidence <= 1:
        raise Unreadable("confidence is outside [0, 1]")
    label = found["label"]
    if prompt.labels == "code" and (fenced := FENCE.fullmatch(label)):
        label = fenced[1].strip("\n")
    if not label.strip():
        raise Unreadable("label is empty")
    return Parsed(found["rationale"], label, confidence)


def _sections(text: str, prompt: Prompt) -> dict[str, str]:
    """What stands between the marks of each section. Raises Unreadable unless each is there once, in their order, with
    nothing around them.
    """
    found, position = {}, 0
    for part in PARTS:
        before, behind = getattr(prompt.sections, part)
        start = text.find(before, position)
        if start < 0:
            raise Unreadable(f"{part} is missing")
        end = text.find(behind, start + len(before))
        if end < 0:
            raise Unreadable(f"{part} has no end")
        if text[position:start].strip():
            raise Unreadable("text outside the sections")
        found[part] = text[start + len(before) : end]
        # the first line of a program may be indented
        found[part] = found[part].strip("\n" if (part, prompt.labels) == ("label", "code") else None)
        if before in found[part]:
            raise Unreadable(f"{part} is there twice")
        position = end + len(behind)
    rest = text[position:]
    if any(getattr(prompt.sections, part)[0] in rest for part in PARTS):
        raise Unreadable("a section is there twice")
    if rest.strip():
        raise Unreadable("text outside the sections")
    return found


def canonical(label: str, labels: str) -> str:
    """What two labels are compared by: equal for those that say the same.

    "number": 1,234.50, $1234.5 and 2469/2 are one number; what is no number is compared as text. "choice": the letter
    of (b), b. or B. "text": without regard to case and white space. "code": as it stands.
    """
    if labels == "code":
        return label
    text = " ".join(label.split())
    if labels == "choice":
        letter = re.fullmatch(r"\(?([A-Za-z])(?:[).:](?:\s.*)?)?", text)
        return letter[1].upper() if letter else text.casefold()
    if labels == "number":
        plain = MONEY.sub("", text.removesuffix("."))
        plain = plain.replace(",", "") if re.match(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d*)?$", plain) else plain
        if re.fullmatch(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+|\d+/0*[1-9]\d*)", plain, re.ASCII) and len(plain) <= 300:
            return str(Fraction(plain))
    return text.casefold()
