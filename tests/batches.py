"""Random batches, and the objectives run over them. Axes: B responses, L length, V vocabulary, H hidden."""

from __future__ import annotations

import re
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor
from truth import Batch

import kdkernels as kd
from kdkernels.engine import plan


def random_head(
    shape, hidden, vocabulary, padding=0, bias=False, softcap=None, scale=1.0, spread=2.0, grad=False
) -> kd.Head:
    """A head in fp64 whose logits have a standard deviation of about ``spread`` / scale."""
    rows = vocabulary + padding
    return kd.Head(
        torch.randn(*shape, hidden, dtype=torch.float64).requires_grad_(grad),
        (torch.randn(rows, hidden, dtype=torch.float64) * spread / hidden**0.5).requires_grad_(grad),
        torch.randn(rows, dtype=torch.float64).requires_grad_(grad) if bias else None,
        softcap=softcap,
        scale=scale,
        vocab_size=vocabulary if padding else None,
    )


def positions(mask: Tensor) -> list[list[int]]:
    """Flat positions of each non-empty row of a mask [B, L]."""
    length = mask.shape[1]
    rows = [[b * length + t for t in range(length) if row[t]] for b, row in enumerate(mask.tolist())]
    return [r for r in rows if r]


def random_batch(
    seed, mask, vocabulary=60, hidden_s=8, hidden_t=12, padding_s=0, padding_t=0, bias=False, softcap=None, scale=1.0,
    weights=False, dtype=torch.float64, spread=2.0,
) -> Batch:  # fmt: skip
    """Numbers that ``dtype`` holds exactly, in fp64."""
    torch.manual_seed(seed)
    shape = tuple(mask.shape)
    student = random_head(shape, hidden_s, vocabulary, padding_s, bias, softcap, scale, spread, grad=True)
    teacher = random_head(shape, hidden_t, vocabulary, padding_t, bias, softcap, scale, spread)
    batch = Batch(
        student, teacher, mask, positions(mask), None, positions(mask),
        target=torch.randint(0, vocabulary, shape),
        weights=torch.rand(shape, dtype=torch.float64) + 0.1 if weights else None,
        from_teacher=torch.rand(len(mask), generator=torch.Generator().manual_seed(seed + 6), device="cpu") < 0.5,
    )  # fmt: skip
    return batch.to(dtype).to(torch.float64)


def fixed(dtype=torch.float32, lengths=(5, 1, 9, 0, 3), longest=10, **more) -> Batch:
    """A batch whose responses have the given lengths, each after two positions of prompt."""
    mask = torch.zeros(len(lengths), longest + 2, dtype=torch.bool)
    for row, n in enumerate(lengths):
        mask[row, 2 : 2 + n] = True
    return random_batch(3, mask, dtype=dtype, **more).to(dtype)


# ---- the objectives ---

OBJECTIVES = [
    pytest.param(lambda: kd.TSDKD(k=4, opener=0.5), id="TSDKD"),
    pytest.param(kd.GKD, id="GKD"),
    pytest.param(kd.SFT, id="SFT"),
    pytest.param(kd.DistiLLM2, id="DistiLLM2"),
    pytest.param(lambda: kd.VCRD(weighting="likelihood_ratio"), id="VCRD"),
]


def loss_of(make, batch, **more) -> torch.Tensor:
    objective = make()
    return run(objective, batch, **({"target": batch.target} if objective.needs_target else {}), **more).loss


def run(objective, batch: Batch, **more) -> kd.objectives.Output:
    teacher = batch.teacher if objective.needs_teacher else None
    teacher_mask = batch.teacher_mask if objective.needs_teacher else None
    from_teacher = batch.from_teacher if objective.by_author else None
    return objective(
        batch.student, teacher, batch.mask, weights=batch.weights, from_teacher=from_teacher, teacher_mask=teacher_mask,
        **more,
    )  # fmt: skip


def costs(call: Callable[[int], object]) -> tuple[int, int, int]:
    """Bytes that ``call(memory_budget)`` plans with: whatever the chunk, a token of the student's, of the teacher's."""
    with mock.patch.object(plan, "chunk_rows", side_effect=InterruptedError) as asked, pytest.raises(InterruptedError):
        call(1)
    return asked.call_args.args[1:4]


def smallest_budget(call: Callable[[int], object]) -> int:
    """Bytes for one token at a time, from the error about too small a budget that ``call(memory_budget)`` raises."""
    with pytest.raises(ValueError, match="memory_budget") as error:
        call(1)
    return int(re.search(r"at least (\d+) bytes", str(error.value))[1])
