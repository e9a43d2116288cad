"""JSON lines as the run writes them: every line is JSON as RFC 8259 has it, which knows no NaN and no infinity."""

import json
import math
from collections.abc import Mapping
from typing import Any


def json_line(record: Mapping[str, Any]) -> str:
    """`record` as one line; a number that is not finite becomes null."""
    return json.dumps({name: _or_none(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
