"""How the tokens of a call are cut into chunks that fit a memory budget, and what that is by default.

On CPUs the default is ``DEFAULT_BUDGET``; on GPUs, what the rows take that a model of the GPU wants (gpu.py). Which
chunks there are decides in which order dW is summed: the same call with another budget may differ in the last bits.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from ..compute import memory
from ..kernels import Backend
from ..sources import Costs
from . import gpu
from .agreement import fewest
from .spec import Call

logger = logging.getLogger("kdkernels")

DEFAULT_BUDGET = 384 * 2**20  # bytes; on CPUs with 151936 entries in bf16: 1050 student rows and 192 teacher rows
SMALLEST_GOOD_CHUNK = 256  # rows; below, reading the weights once per chunk dominates
TOKEN_BYTES = 768  # of every token of a call, whatever the chunk: both models' statistics, selections, coefficients
CANDIDATE_BYTES = 24  # of every token's every candidate: id and log-probability, twice while chunks are joined
TEACHER_ROWS = 192  # on CPUs; the teacher's logits only feed the row kernels: a smaller buffer does


class Chunk(NamedTuple):
    """Whole responses first..last-1 in pieces of tokens: one, unless a single response is too long for a chunk."""

    first: int
    last: int
    pieces: list[slice]


class Plan(NamedTuple):
    """How a call is cut."""

    chunks: list[Chunk]
    rows: int  # tokens of a chunk at most
    teacher_rows: int  # ... of a sub-chunk of the teacher
    step: int  # of what the tokens of all but the last slice are a multiple, where they can be
    copies: int  # of a sub-chunk's student logits (Terms.copies)

    def split(self, start: int, stop: int, borders: Sequence[int] = ()) -> list[slice]:
        """Tokens [start, stop) in sub-chunks of the teacher, none on both sides of a border."""
        return split(start, stop, self.teacher_rows, borders, self.step)


def planned(
    call: Call, backend: Backend, vocabulary: int, dtype: torch.dtype, teacher_dtype: torch.dtype,
    needs: tuple[bool, ...],
) -> Plan:  # fmt: skip
    """The chunks of a call with such logits, and with gradients of those of the student's tensors in ``needs``.

    Where a group divides the vocabulary, all its ranks have the same chunks, and ``vocabulary`` is this rank's part.
    """
    student, teacher, asked, device = call.student, call.teacher, call.terms.needs, call.student.device
    largest = max(1, asked.candidates, asked.collision)
    mine, other = student.costs(backend, vocabulary, dtype, largest, True), Costs(0, 0, 0)
    if teacher:
        largest = max(largest, asked.teacher_collision)
        other = teacher.costs(backend, vocabulary, teacher_dtype, min(largest, vocabulary), False)
    count, shards = max(1, len(call.layout)), backend.shards
    fixed = backend.workspace(count, vocabulary) + max(mine.fixed, other.fixed) + mine.kept + other.kept
    fixed += count * (TOKEN_BYTES + CANDIDATE_BYTES * asked.candidates)
    copies = max([call.terms.of(group).copies(teacher) for group, _ in call.groups or ((None, 0),)])
    row, teacher_row = mine.row, other.row + copies * memory.padded(vocabulary, device) * dtype.itemsize
    if teacher and not teacher.complete:  # it has no logits and so no sub-chunks
        row, teacher_row = row + teacher_row, 0
    if shards:
        row, teacher_row = row + shards.row_bytes(largest), teacher_row and teacher_row + shards.row_bytes(largest)
    products, budget = _products(call, dtype, needs), call.memory_budget
    wanted = gpu.wanted(device, products)
    if budget is None:
        sums = 4 * vocabulary * products.student if products.d_weight and student.dtype == torch.bfloat16 else 0
        budget = default_budget(wanted, partial(gpu.allowance, device), fixed, row, teacher_row, count, sums)
    rows, teacher_rows = fewest(shards, partial(chunk_rows, budget, fixed, row, teacher_row, count, wanted))
    lengths = call.layout.lengths if call.selects else (len(call.layout),)
    step = gpu.TILE if wanted else 1
    return Plan(chunks(lengths, rows, step), rows, teacher_rows, step, copies)


def _products(call: Call, dtype: torch.dtype, needs: tuple[bool, ...]) -> gpu.Products:
    """What a call multiplies."""
    student, teacher = call.student, call.teacher
    d_hidden, d_weight = needs[:2] if student.width and needs else (False, False)
    return gpu.Products(student.width, teacher.width if teacher else 0, d_hidden, d_weight, dtype.itemsize)


def split(start: int, stop: int, most: int, borders: Sequence[int] = (), step: int = 1) -> list[slice]:
    """[start, stop) in the fewest slices of at most ``most``, of even size; none lies on both sides of a border.

    Where ``most`` is a multiple of ``step``, so is every slice but the last before each border.
    """
    for border in borders:
        if start < border < stop:
            return split(start, border, most, borders, step) + split(border, stop, most, borders, step)
    if 0 < stop - start <= most:
        return [slice(start, stop)]
    count, step = math.ceil((stop - start) / most), 1 if most % step else step
    edges = [start + math.ceil((stop - start) * i // count / step) * step for i in range(count)] + [stop]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def chunks(lengths: tuple[int, ...], rows: int, step: int = 1) -> list[Chunk]:
    """Responses packed in order into chunks of at most ``rows`` tokens; a longer one is alone and in pieces."""
    out, first, start, total = [], 0, 0, 0
    for i, length in enumerate(lengths):
        if total and total + length > rows:
            out.append(Chunk(first, i, split(start, start + total, rows, (), step)))
            first, start, total = i, start + total, 0
        total += length
    if total:
        out.append(Chunk(first, len(lengths), split(start, start + total, rows, (), step)))
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
