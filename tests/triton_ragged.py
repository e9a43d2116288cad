"""What Triton's JIT compiles when every step of a training run has another number of tokens.

    python tests/triton_ragged.py

For a GPU that need not be there. Prints, as a line of JSON, how many kernels the first two steps need (one chunk, and
several with a response longer than a chunk) and how many more the steps after them do.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["KDKERNELS_BACKEND"] = "triton"
sys.path.insert(0, str(Path(__file__).parents[1]))  # kdkernels, installed or not

import torch

import kdkernels as kd
from kdkernels.kernels import registry
from kdkernels.kernels.triton import ahead as triton_ahead

H, CHUNK = 8, 20  # hidden size; tokens of the smaller budget's chunk, about
FIRST = (16, 40, 8)  # tokens of the responses of a step
THEN = ((1,), (5, 3, 9), (17,), (64, 2), (33, 1, 40), (128,))
MANY = {torch.bfloat16: (5003, 16400), torch.float32: (5003, 16400)}  # entries: rows at odd places, at 16 bytes


def step(objective, dtype: torch.dtype, entries: int, lengths: tuple[int, ...], budget: int | None) -> None:
    count = sum(lengths)
    student, teacher = (
        kd.Head(
            torch.zeros(1, count, H, dtype=dtype, requires_grad=trained),
            torch.zeros(entries, H, dtype=dtype, requires_grad=trained),
        )
        for trained in (True, False)
    )
    layout = kd.Layout(torch.arange(count), lengths, (1, count))
    target = torch.zeros(1, count, dtype=torch.int64)
    objective(student, teacher, layout, target=target, memory_budget=budget).loss.backward()


def compiled(objective, dtype: torch.dtype, entries: int, lengths: tuple[int, ...]) -> set:
    """In one chunk and in several."""

    def both() -> None:
        step(objective, dtype, entries, lengths, None)
        try:
            step(objective, dtype, entries, lengths, 1)
        except ValueError as error:
            least = int(re.search(r"at least (\d+) bytes", str(error))[1])
            step(objective, dtype, entries, lengths, least + CHUNK * entries * dtype.itemsize)

    return set(triton_ahead.noted(both))


def main() -> None:
    logging.disable()  # little memory is slow, and says so
    registry.BACKENDS["triton"] = registry.BACKENDS["triton"]._replace(device="cpu")
    report = {}
    with triton_ahead.stand_in(90):
        for dtype, vocabularies in MANY.items():
            for entries in vocabularies:
                for objective in (kd.GKD(), kd.TSDKD(k=3)):
                    first = compiled(objective, dtype, entries, FIRST)
                    later = set().union(*(compiled(objective, dtype, entries, lengths) for lengths in THEN)) - first
                    name = f"{type(objective).__name__} {dtype} {entries}"
                    report[name] = len(first), [one.kernel for one in later]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
