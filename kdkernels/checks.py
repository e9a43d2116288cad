"""Numbers that options may take. Errors name the option, what was expected and what came.

Comparisons alone, which torch.compile traces for numbers that change from call to call; it refuses math.isfinite there.
"""

from __future__ import annotations

import math


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not -math.inf < value < math.inf:  # nor a NaN
        raise ValueError(f"{name}: expected a finite number, got {value!r}")


def check_positive(name: str, value: float) -> None:
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")


def check_temperature(value: float) -> None:
    """Beyond these bounds masked entries would get a probability in fp32, or all entries but one lose theirs."""
    check_number("temperature", value)
    if not 1e-3 <= value <= 1e3:
        raise ValueError(f"temperature: expected a number in [0.001, 1000], got {value!r}")


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def check_share(name: str, value: float) -> None:
    check_number(name, value)
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")


def check_count(name: str, value: int, least: int, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least or (most is not None and value > most):
        expected = f"at least {least}" if most is None else f"{least} to {most}"
        raise ValueError(f"{name}: expected an int of {expected}, got {value}")
