"""How the tokens of a batch are cut into chunks that fit a memory budget. Pure arithmetic on token counts."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

logger = logging.getLogger("kdkernels")

DEFAULT_BUDGET = 384 * 2**20  # bytes; for 151936 words in bf16: 1050 student rows and 192 teacher rows
SMALLEST_GOOD_CHUNK = 256  # rows; below, reading the weights once per chunk dominates
TOKEN_BYTES = 768  # of every token of a call, whatever the chunk: statistics, selections, coefficients, of both sides
CANDIDATE_BYTES = 24  # of every token's every candidate: id and log-probability, twice while chunks are joined
TEACHER_ROWS = 192  # the teacher's logits only feed the row kernels: a smaller buffer does


class Chunk(NamedTuple):
    """Whole responses first..last-1 in pieces of tokens: one, unless a single response is too long for a chunk."""

    first: int
    last: int
    pieces: list[slice]


def split(start: int, stop: int, most: int, border: int = 0) -> list[slice]:
    """[start, stop) in the fewest slices of at most ``most``, of even size; none lies on both sides of ``border``."""
    if start < border < stop:
        return split(start, border, most) + split(border, stop, most)
    count = math.ceil((stop - start) / most)
    edges = [start + (stop - start) * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def chunks(lengths: tuple[int, ...], rows: int) -> list[Chunk]:
    """Responses packed in order into chunks of at most ``rows`` tokens; a longer one is alone and in pieces."""
    out, first, start, total = [], 0, 0, 0
    for i, length in enumerate(lengths):
        if total and total + length > rows:
            out.append(Chunk(first, i, split(start, start + total, rows)))
            first, start, total = i, start + total, 0
        total += length
    if total:
        out.append(Chunk(first, len(lengths), split(start, start + total, rows)))
    return out


def chunk_rows(budget: int, fixed: int, student_row: int, teacher_row: int, tokens: int) -> tuple[int, int]:
    """Tokens per student chunk and per teacher sub-chunk within ``budget`` bytes.

    ``fixed`` is the workspace whatever the chunk; ``student_row`` and ``teacher_row`` (0: no teacher) bytes a token.

    Raises:
        ValueError: not even one token fits.
    """
    free = budget - fixed
    both = free // (student_row + teacher_row)
    if both < 1:
        least = fixed + student_row + teacher_row
        raise ValueError(f"memory_budget: expected at least {least} bytes (one token at a time), got {budget}")
    if both >= tokens or not teacher_row:
        student = teacher = min(both, tokens)
    else:
        teacher = max(1, min(TEACHER_ROWS, both * 3 // 5))
        student = min(tokens, (free - teacher * teacher_row) // student_row)
        teacher = min(student, (free - student * student_row) // teacher_row)
    if student < min(SMALLEST_GOOD_CHUNK, tokens):
        _warn_once(budget, student)
    return student, teacher


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
