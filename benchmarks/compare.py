"""Regression gate: ``python benchmarks/compare.py BASELINE.json NEW.json``; 1 if kdkernels got slower or a row is gone.

Compares ratios to the bare GEMMs of the same run: absolute times drift on shared machines.
"""

from __future__ import annotations

import sys
from pathlib import Path

from report import OURS, cells, load, table

ALLOWED = 1.05  # times the baseline's ratio


def compare(baseline: dict, new: dict) -> tuple[str, bool]:
    """A table and whether all rows hold. Only rows of kdkernels itself count."""
    now = {(c["case"], c["loss"], c["implementation"]): c["ratio"] for c in cells(new)}
    rows, good = [], True
    for cell in cells(baseline):
        if not cell["implementation"].startswith(OURS):
            continue
        ratio = now.get((cell["case"], cell["loss"], cell["implementation"]))
        holds = ratio is not None and ratio <= ALLOWED * cell["ratio"]
        good &= holds
        shown = "not measured" if ratio is None else f"{ratio:.3f}"
        name = f"{cell['implementation']}, {cell['loss']}, {cell['case']}"
        rows.append([name, f"{cell['ratio']:.3f}", shown, "" if holds else "**regression**"])
    if not rows:
        raise ValueError("baseline: expected rows of kdkernels, found none")
    return table(["x bare GEMMs", "baseline", "now", ""], rows), good


def main() -> int:
    if len(sys.argv) != 3:
        raise SystemExit(__doc__.splitlines()[0])
    shown, good = compare(*(load(Path(argument)) for argument in sys.argv[1:]))
    print(shown)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
