"""What both demos' reports are made of."""

from collections.abc import Iterable, Sequence


def count(number: int, what: str) -> str:
    """`1 core`, `2 cores`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def table(header: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """The lines of a table in Markdown."""
    rule = "|" + "---|" * len(header)
    return [f"| {' | '.join(header)} |", rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)]
