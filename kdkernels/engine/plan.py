"""How the tokens of a batch are cut into chunks that fit a memory budget, and what that is by default.

On CPUs the default is ``DEFAULT_BUDGET``; on GPUs, what the rows take that a model of the GPU wants (gpu.py). Pure
arithmetic on token counts, but for the free memory of a GPU. Which chunks there are decides in which order dW is
summed: the same call with another budget may differ in the last bits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from . import gpu

logger = logging.getLogger("kdkernels")

DEFAULT_BUDGET = 384 * 2**20  # bytes; on CPUs with 151936 words in bf16: 1050 student rows and 192 teacher rows
SMALLEST_GOOD_CHUNK = 256  # rows; below, reading the weights once per chunk dominates
TOKEN_BYTES = 768  # of every token of a call, whatever the chunk: statistics, selections, coefficients, of both sides
CANDIDATE_BYTES = 24  # of every token's every candidate: id and log-probability, twice while chunks are joined
TEACHER_ROWS = 192  # on CPUs; the teacher's logits only feed the row kernels: a smaller buffer does


class Chunk(NamedTuple):
    """Whole responses first..last-1 in pieces of tokens: one, unless a single response is too long for a chunk."""

    first: int
    last: int
    pieces: list[slice]


def split(start: int, stop: int, most: int, border: int = 0, step: int = 1) -> list[slice]:
    """[start, stop) in the fewest slices of at most ``most``, of even size; none lies on both sides of ``border``.

    Where ``most`` is a multiple of ``step``, so is every slice but the last.
    """
    if start < border < stop:
        return split(start, border, most, 0, step) + split(border, stop, most, 0, step)
    count, step = math.ceil((stop - start) / most), 1 if most % step else step
    edges = [start + math.ceil((stop - start) * i // count / step) * step for i in range(count)] + [stop]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def chunks(lengths: tuple[int, ...], rows: int, step: int = 1) -> list[Chunk]:
    """Responses packed in order into chunks of at most ``rows`` tokens; a longer one is alone and in pieces."""
    out, first, start, total = [], 0, 0, 0
    for i, length in enumerate(lengths):
        if total and total + length > rows:
            out.append(Chunk(first, i, split(start, start + total, rows, 0, step)))
            first, start, total = i, start + total, 0
        total += length
    if total:
        out.append(Chunk(first, len(lengths), split(start, start + total, rows, 0, step)))
    return out


def default_budget(
    wanted: gpu.ChunkRows | None, allowance: Callable[[], int],
    fixed: int, student_row: int, teacher_row: int, tokens: int, sums: int,
) -> int:  # fmt: skip
    """Bytes where the caller names none: on a GPU, for as many rows as it wants, and never less than elsewhere.

    One chunk needs no fp32 sums of dW (``sums`` bytes): a call is one where it then takes no more than in chunks.
    Beyond ``DEFAULT_BUDGET``, no more than ``allowance()``.
    """
    if wanted is None:
        return DEFAULT_BUDGET
    student, teacher = min(wanted.student, tokens), min(wanted.teacher, tokens)
    chunks = fixed + student * student_row + teacher * teacher_row
    whole = chunks + (tokens - student) * student_row
    wish = whole if whole <= chunks + sums else chunks
    if wish <= DEFAULT_BUDGET:
        return DEFAULT_BUDGET
    most = max(DEFAULT_BUDGET, allowance())
    return wish if wish <= most else min(chunks, most)


def info() -> dict[str, object]:
    """The default on each device: bytes, and what is known of each GPU."""
    return {"cpu": DEFAULT_BUDGET} | {f"cuda:{i}": gpu.info(i) for i in range(torch.cuda.device_count())}


def chunk_rows(
    budget: int, fixed: int, student_row: int, teacher_row: int, tokens: int, wanted: gpu.ChunkRows | None = None
) -> tuple[int, int]:
    """Tokens per student chunk and per teacher sub-chunk within ``budget`` bytes.

    ``fixed`` is the workspace whatever the chunk; ``student_row`` and ``teacher_row`` (0: no teacher) bytes a token.
    ``wanted``: the rows that a GPU wants, in whose proportion the budget is shared, in whole tiles, unless it is enough
    for one chunk of all tokens.

    Raises:
        ValueError: not even one token fits.
    """
    free = budget - fixed
    both = free // (student_row + teacher_row)
    if both < 1:
        least = fixed + student_row + teacher_row
        raise ValueError(f"memory_budget: expected at least {least} bytes (one token at a time), got {budget}")
    whole = _whole_tiles if wanted else int
    if both >= tokens or not teacher_row:
        student = teacher = tokens if both >= tokens else whole(both)
    else:
        if wanted:
            share = free / (wanted.student * student_row + wanted.teacher * teacher_row)
            one_chunk = tokens * student_row + wanted.teacher * teacher_row <= free
            teacher = wanted.teacher if one_chunk else max(1, min(both, whole(wanted.teacher * share)))
        else:
            teacher = max(1, min(TEACHER_ROWS, both * 3 // 5))
        student = (free - teacher * teacher_row) // student_row
        student = tokens if student >= tokens else whole(student)
        teacher = min(student, whole((free - student * student_row) // teacher_row))
    if student < min(SMALLEST_GOOD_CHUNK, tokens):
        _warn_once(budget, student)
    return student, teacher


def _whole_tiles(rows: float) -> int:
    """So many rows or a few less."""
    return int(rows) // gpu.TILE * gpu.TILE or int(rows)


_warned = False


def _warn_once(budget: int, rows: int) -> None:
    global _warned
    if not _warned:
        _warned = True
        logger.warning(
            "memory_budget: %d bytes leave %d tokens a chunk, fewer than %d: correct, but slower",
            budget,
            rows,
            SMALLEST_GOOD_CHUNK,
        )
