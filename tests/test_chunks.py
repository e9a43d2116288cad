"""Small budgets: several chunks, teacher sub-chunks, responses in pieces; the same numbers as in one chunk."""

import logging

import pytest
import torch
import truth
from batches import OBJECTIVES, costs, fixed, loss_of
from products import Products
from test_logits import FUNCTIONS

import kdkernels as kd
from kdkernels.compute import memory
from kdkernels.engine import gpu, plan
from kdkernels.kernels import backend_for

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
LENGTHS = (5, 1, 9, 0, 3, 30, 2, 7)
V, HS, HT = 60, 8, 12
OBJECTIVE_OF = {p.id: p.values[0] for p in OBJECTIVES}


def budget(make, batch: truth.Batch, tokens: int) -> int:
    """Bytes for at most so many tokens of the student's."""
    fixed, student, teacher = costs(lambda n: loss_of(make, batch, memory_budget=n))
    return fixed + tokens * student + teacher


def measure(make, batch, **more) -> tuple[Products, list[torch.Tensor]]:
    """The forward's products, and loss and gradients."""
    with Products() as products:
        loss = loss_of(make, batch, **more)
    return products, [loss.detach(), *truth.gradients(loss, batch.student)]


@pytest.mark.parametrize("name", [*FUNCTIONS, "statistics", *OBJECTIVE_OF])
def test_on_identical_logits_chunks_change_no_bit(backend, name, monkeypatch):
    """Of per-token values, statistics and the gradient of the logits: one token, a few, all tokens at a time."""
    torch.manual_seed(0)
    lengths, vocabulary = (2, 5), 192  # whole vectors of entries: PyTorch's exp of what is left over is another one
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    z_s, z_t = 3 * torch.randn(2, 6, vocabulary), 3 * torch.randn(2, 6, vocabulary)
    target, teacher = torch.randint(0, vocabulary, mask.shape), kd.Logits(z_t)
    rows, seen = backend_for(z_s.device, F32), []
    statistics = rows.statistics
    monkeypatch.setattr(rows, "statistics", lambda x, *more: seen.append(len(x)) or statistics(x, *more))

    def outcome(memory_budget):
        leaf, more = z_s.clone().requires_grad_(), {"memory_budget": memory_budget}
        student = kd.Logits(leaf)
        seen.clear()
        if name == "statistics":
            got = kd.statistics(student, teacher, topk=4, collision=7, target=target, **more)
            return [got.entropy, got.lse, got.topk_indices, got.target_log_prob, got.collision, got.teacher.entropy]
        if name in FUNCTIONS:
            values = FUNCTIONS[name](student, teacher, target, **more)
            return [values.detach(), *torch.autograd.grad((values * torch.arange(12.0).view_as(values)).sum(), leaf)]
        batch = truth.Batch(student, teacher, mask, [], None, [], target, None, torch.tensor([True, False]))
        # not the loss, which adds tokens up
        return torch.autograd.grad(loss_of(OBJECTIVE_OF[name], batch, **more), leaf)

    whole = outcome(None)
    assert max(seen) == (sum(lengths) if name in OBJECTIVE_OF else 12)
    fixed, row, teacher_row = costs(outcome)
    for most in (1, 3):  # the teacher takes one token at a time
        pieces = outcome(fixed + most * row + teacher_row)
        assert max(seen) == most
        for got, expected in zip(pieces, whole, strict=True):
            assert torch.equal(got, expected)
    assert whole[-1].any()


@pytest.mark.parametrize("tokens", [1, 4, 12, 24])
@pytest.mark.parametrize("make", OBJECTIVES)
def test_chunks_change_nothing(backend, make, tokens):
    """In fp64 (eager) and fp32; the single chunk is compared with dense autograd elsewhere."""
    dtype = F64 if backend == "eager" else F32
    batch = fixed(dtype, LENGTHS, longest=30, bias=True)
    whole, expected = measure(make, batch)
    assert whole.between(sum(LENGTHS), HS, V) == 3
    several, got = measure(make, batch, memory_budget=budget(make, batch, tokens))
    pieces = [shape for shape in several.shapes if shape[1:] == (HS, V)]
    assert len(pieces) >= 2 and max(rows for rows, *_ in pieces) < sum(LENGTHS)
    for g, e in zip(got, expected, strict=True):
        assert truth.relative(g, e) < (1e-12 if dtype == F64 else 1e-6)
        assert e.norm() > 0


@pytest.mark.parametrize("make", OBJECTIVES)
def test_the_chunks_that_a_gpu_wants_change_nothing(backend, make, monkeypatch):
    """Whole tiles of tokens on both sides where nobody names a budget."""
    dtype = F64 if backend == "eager" else F32
    batch = fixed(dtype, LENGTHS, longest=30, bias=True)
    _, expected = measure(make, batch)
    monkeypatch.setattr(gpu, "TILE", 4)
    monkeypatch.setattr(gpu, "wanted", lambda device, work: gpu.ChunkRows(12, 8))
    monkeypatch.setattr(gpu, "allowance", lambda device: 1 << 30)
    monkeypatch.setattr(plan, "DEFAULT_BUDGET", 1)
    several, got = measure(make, batch)
    mine = [shape[0] for shape in several.shapes if shape[1:] == (HS, V)]
    teachers = [shape[0] for shape in several.shapes if shape[1:] == (HT, V)]
    assert max(mine) == 12 and len(mine) >= 5
    if teachers:
        assert max(teachers) == 8 and sum(rows % 4 == 0 for rows in teachers) >= len(teachers) / 2
    for g, e in zip(got, expected, strict=True):
        assert truth.relative(g, e) < (1e-12 if dtype == F64 else 1e-6)
        assert e.norm() > 0


def test_a_response_longer_than_a_chunk_is_looked_at_first(backend):
    """Selection needs the whole response: one more student product over it, and only over it."""
    batch = fixed(F32, (4, 20, 4), longest=20)
    make, tokens = OBJECTIVES[0].values[0], 6
    products, got = measure(make, batch, memory_budget=budget(make, batch, tokens))
    student = [rows for rows, *rest in products.shapes if rest == [HS, V]]
    teacher = [rows for rows, *rest in products.shapes if rest == [HT, V]]
    assert sum(student) == 28 + 20 and sum(teacher) == 28
    assert len(teacher) > len(student) - 20 // max(student), "the teacher's chunks are no larger than the student's"
    for g, e in zip(got, measure(make, batch)[1], strict=True):
        assert truth.relative(g, e) < 1e-6
    gkd, _ = measure(kd.GKD, batch, memory_budget=budget(kd.GKD, batch, tokens))
    assert sum(rows for rows, *rest in gkd.shapes if rest == [HS, V]) == 28, "GKD selects nothing"


def test_bf16_sums_chunks_of_the_weight_gradient_in_fp32(backend):
    """600 chunks of one token: bf16 sums would lose most of them."""
    batch = fixed(BF16, (600,), longest=600)
    batch.student.weight.data /= 4  # flat distributions: every token pulls a little
    exact = batch.to(F64)
    expected = truth.gradients(truth.gkd(exact, beta=0.0), exact.student)
    loss = kd.GKD(beta=0.0)(
        batch.student, batch.teacher, batch.mask, memory_budget=budget(lambda: kd.GKD(0.0), batch, 1)
    ).loss
    for g, e in zip(truth.gradients(loss, batch.student), expected, strict=True):
        assert truth.relative(g, e) < 0.02


def test_second_backward_through_chunks(backend):
    make = OBJECTIVES[0].values[0]
    batch = fixed(F32, LENGTHS, longest=30)
    loss = loss_of(make, batch, memory_budget=budget(make, batch, 6))
    first = torch.autograd.grad(loss, truth.leaves(batch.student), retain_graph=True)
    second = torch.autograd.grad(loss, truth.leaves(batch.student))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_fp32_logits_of_bf16_operands(backend):
    """logits_dtype=float32: nearer to the truth than bf16 logits, and the gradient still comes in bf16."""
    batch = fixed(BF16, (40, 40), longest=40, hidden_s=16, spread=4.0)
    exact = batch.to(F64)
    expected = truth.gradients(truth.gkd(exact, beta=0.5), exact.student)
    errors = {}
    for logits_dtype in (F32, BF16):
        out = kd.GKD(0.5)(batch.student, batch.teacher, batch.mask, logits_dtype=logits_dtype)
        got = truth.gradients(out.loss, batch.student)
        assert all(g.dtype == BF16 for g in got)
        errors[logits_dtype] = [truth.relative(g, e) for g, e in zip(got, expected, strict=True)]
    assert all(wide < 0.006 for wide in errors[F32])
    assert all(wide < narrow for wide, narrow in zip(errors[F32], errors[BF16], strict=True))


def test_a_tight_budget_warns_once(backend, caplog, monkeypatch):
    monkeypatch.setattr(plan, "_warned", False)
    batch = fixed(F32, (300,), longest=300)
    with caplog.at_level(logging.WARNING, logger="kdkernels"):
        for _ in range(2):
            loss_of(kd.GKD, batch, memory_budget=budget(kd.GKD, batch, 40))
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "memory_budget" in message and "256" in message


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=["fp32", "bf16"])
def test_padded_rows_change_no_bit(backend, monkeypatch, dtype):
    """On GPUs every row of logits starts at a multiple of 64 entries. Here too, narrow gradients over wide logits
    included, all numbers are those of rows without padding."""
    torch.manual_seed(0)
    leaves = [torch.randn(*shape).to(dtype).requires_grad_() for shape in ((7, 16), (101, 16), (101,))]
    teacher = kd.Head(torch.randn(7, 24).to(dtype), torch.randn(101, 24).to(dtype))
    rows, seen = backend_for(leaves[0].device, F32), []
    statistics = rows.statistics
    monkeypatch.setattr(rows, "statistics", lambda x, *more: seen.append(x.stride()) or statistics(x, *more))

    def outcome(stride):
        seen.clear()
        values = kd.divergence(kd.Head(*leaves), teacher, kd.JSD(0.9), temperature=0.7, logits_dtype=F32)
        gradients = torch.autograd.grad(values.sum(), leaves)
        assert set(seen) == {(stride, 1)} and all(g.norm() > 0 for g in gradients)
        return values.detach(), *gradients

    plain = outcome(101)
    monkeypatch.setattr(memory, "padded", lambda columns, device: -(-columns // 64) * 64)
    for got, expected in zip(outcome(128), plain, strict=True):
        assert torch.equal(got, expected)
