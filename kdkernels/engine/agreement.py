"""What the ranks of a group that divides the vocabulary tell each other before a call: do they make the same one?

Each rank sends a few numbers. From them all ranks know who has which entries, and all raise the same error where the
calls differ: alone, one would wait for the others for ever, or add numbers of different tokens.

Axes: N tokens of a call, P ranks.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..divergences import Divergence
from ..kernels import Shards, gathered
from ..sources import Source, shared_vocabulary, take
from .spec import Call

_ALIKE = 1e-3  # of itself a sum of the same hidden states may differ, on GPUs of several kinds


def shards(call: Call, needs: tuple[bool, ...]) -> Shards:
    """Who has which entries, of a call whose student has a group.

    Raises:
        ValueError: on all ranks: they make different calls, or their parts do not make up the vocabulary.
    """
    student, teacher, device = call.student, call.teacher, call.student.device
    numbers = _numbers(call, needs)
    sums = [
        _sum(student, call.layout.index),
        _sum(teacher, call.teacher_index),
        _total(call.target),
        torch.as_tensor(call.scale).double(),
    ]
    own = torch.tensor([float(each) for each in numbers.values()], dtype=torch.float64).to(device)
    said = gathered(student.group, torch.cat([own, torch.stack([each.to(device) for each in sums])])).tolist()
    for i, name in enumerate(numbers):
        if name not in _OF_EACH_RANK:
            _check_same(name, [each[i] for each in said])
    for i, (name, slack) in enumerate(_SUMS.items(), len(numbers)):
        _check_same(name, [each[i] for each in said], slack)
    vocabulary = shared_vocabulary(student, teacher)
    names = list(numbers)
    rows, others = ([int(each[names.index(name)]) for each in said] for name in _OF_EACH_RANK)
    sizes = _sizes(rows, vocabulary, "weight")
    if teacher and teacher.group is not None and (theirs := _sizes(others, vocabulary, "teacher's weight")) != sizes:
        raise ValueError(
            f"teacher: expected ranks that have the same entries as the student's, {sizes} of {vocabulary}, got "
            f"{theirs}; divide both lm_heads alike, or give each rank the whole teacher's, without a group"
        )
    return Shards(student.group, torch.distributed.get_rank(student.group), sizes, device)


_OF_EACH_RANK = ("rows of weight", "rows of the teacher's weight")
_SUMS = {  # and how far they may be apart
    "hidden states (or logits)": _ALIKE,
    "the teacher's hidden states (or logits)": _ALIKE,
    "target": 0.0,
    "denominator": 1e-6,
}


def _numbers(call: Call, needs: tuple[bool, ...]) -> dict[str, float]:
    """What is to be the same on all ranks, or is told by each."""
    student, teacher, layout = call.student, call.teacher, call.layout
    options = {
        name: value
        for name, value in vars(call.program).items()
        if isinstance(value, (bool, int, float, str, Divergence))
    }
    return {
        "rows of weight": student.tensors[1].shape[0],
        "rows of the teacher's weight": teacher.tensors[1].shape[0] if teacher and teacher.group is not None else 0,
        "tokens": len(layout),
        "lengths of responses": _code(layout.lengths),
        "groups of tokens": _code(call.groups),
        "vocab_size": student.vocabulary,
        "numbers of the student's head": _code(_numbers_of(student)),
        "dtype of hidden": _code(student.dtype),
        "width of hidden": student.width,
        "kind of teacher": _code(teacher and (type(teacher).__name__, teacher.dtype, teacher.group is None)),
        "numbers of the teacher": _code(teacher and _numbers_of(teacher)),
        "terms": _code((call.terms.by_name, call.terms.needs)),
        "options of the loss": _code(options),
        "tensors that need gradients": _code(needs),
        "whether the coefficients are given": call.coefficients is not None,
        "memory_budget": -1 if call.memory_budget is None else call.memory_budget,
        "logits_dtype": _code(call.logits_dtype),
    }


def _numbers_of(source: Source) -> list[float]:
    """Without the name of its group, which each rank may have another of."""
    return source.trusted(**source.__dict__ | {"group": None}).numbers


def _code(thing: object) -> int:
    """A number that is the same for things that read the same, wherever in memory they are."""
    return zlib.crc32(re.sub(r" at 0x[0-9a-f]+", "", repr(thing)).encode())


def _sum(source: Source | None, index: Tensor) -> Tensor:
    """[] of the magnitudes in the first tensor at the first and the last token: reading all would take as long as the
    call of a small model."""
    if source is None or not len(index):
        return torch.zeros((), dtype=torch.float64)
    ends = torch.stack([index[0], index[-1]])
    return take(source.tensors[0].detach(), ends).double().abs().nan_to_num(0, 0, 0).sum()


def _total(target: Tensor | None) -> Tensor:
    return torch.zeros((), dtype=torch.float64) if target is None else target.double().sum()


def _check_same(name: str, values: list[float], slack: float = 0.0) -> None:
    if max(values) - min(values) > slack * abs(max(values)):
        shown = [int(each) if each == int(each) else each for each in values]
        raise ValueError(
            f"group: expected the same call on all of its ranks, which divide the vocabulary and not the batch; got "
            f"different {name}, by rank {shown}"
        )


def _sizes(rows: list[int], vocabulary: int, what: str) -> list[int]:
    """Of each rank, its entries of the vocabulary: its ``rows``, without padding after the last entry."""
    sizes, left = [], vocabulary
    for count in rows:
        sizes.append(min(count, left))
        left -= sizes[-1]
    if left:
        raise ValueError(
            f"vocab_size: expected at most {sum(rows)} (the rows of all ranks' {what}, {rows}), got {vocabulary}"
        )
    if 0 in sizes:
        raise ValueError(
            f"vocab_size: expected at least one entry for each rank of the group, got {sizes} of {vocabulary} from "
            f"{rows} rows of {what}; divide the rows without the padding evenly"
        )
    return sizes


def fewest(divided: Shards | None, chunk_rows: Callable[[], tuple[int, int]]) -> tuple[int, int]:
    """The rows of a chunk and of the teacher's part of it, the fewest that any rank has room for.

    Raises:
        ValueError: on all ranks, where one has no room.
    """
    if divided is None:
        return chunk_rows()
    error = None
    try:
        rows = chunk_rows()
    except ValueError as found:
        error, rows = found, (0, 0)
    own = torch.tensor(rows, dtype=torch.int64, device=divided.device)
    student, teacher = divided.gathered(own[None])[:, 0].amin(0).tolist()
    if error:
        raise error
    if not student:
        raise ValueError(
            "memory_budget: expected one in which one token fits on all ranks of the group; the error of a rank that "
            "has no room says how many bytes it needs"
        )
    return student, teacher
