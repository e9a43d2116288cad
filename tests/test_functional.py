"""Per-token functions and statistics against dense autograd, under random incoming gradients."""

from dataclasses import replace

import pytest
import torch
import truth
from batches import random_head
from products import Products

import kdkernels as kd
from kdkernels.engine import plan

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
SHAPE, ENTRIES = (3, 7), 130


@pytest.fixture(params=[F32, BF16], ids=["fp32", "bf16"])
def dtype(request) -> torch.dtype:
    return request.param


def heads(dtype, shape=SHAPE, **more) -> tuple[kd.Head, kd.Head]:
    torch.manual_seed(5)
    student = random_head(shape, 10, ENTRIES, padding=6, bias=True, scale=0.5, grad=True, **more)
    teacher = random_head(shape, 14, ENTRIES, padding=70, bias=True, **more)
    return truth.to(student, dtype), truth.to(teacher, dtype)


def flat(head: kd.Head) -> torch.Tensor:
    return truth.dense_logits(head, ENTRIES).flatten(0, -2)


def check(function, dense, dtype, heads):
    """function(student, teacher) [...] against dense(z_s, z_t) [N]: values and gradients of a random weighting."""
    student, teacher = heads
    value = function(student, teacher)
    assert value.dtype == F32 and value.shape == student.hidden.shape[:-1]
    incoming = torch.randn(value.shape)
    got = torch.autograd.grad(value, truth.leaves(student), incoming)

    def expected(dtype):
        s, t = truth.to(student, dtype), truth.to(teacher, dtype)
        value = dense(flat(s), flat(t).detach())
        return value.detach(), torch.autograd.grad(value, truth.leaves(s), incoming.flatten().to(value.dtype))

    (exact, exact_gradients), (eager, eager_gradients) = expected(F64), expected(dtype)
    truth.assert_accurate(value.detach().flatten(), eager, exact, "value", dtype)
    for g, e, t in zip(got, eager_gradients, exact_gradients, strict=True):
        assert g.dtype == dtype
        truth.assert_accurate(g, e, t, "gradient")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", truth.DIVERGENCES)
def test_divergence(backend, dtype, name, temperature, softcap):
    kind = truth.DIVERGENCES[name][0]
    check(
        lambda s, t: kd.divergence(s, t, kind, temperature),
        lambda s, t: truth.divergence(s, t, name, temperature),
        dtype,
        heads(dtype, softcap=softcap),
    )


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_entropy(backend, dtype, softcap):
    check(lambda s, t: kd.entropy(s), lambda s, t: truth.entropy(s), dtype, heads(dtype, softcap=softcap))


def test_cross_entropy(backend, dtype):
    target = torch.randint(0, ENTRIES, SHAPE)
    check(
        lambda s, t: kd.cross_entropy(s, target),
        lambda s, t: truth.cross_entropy(s, target.flatten()),
        dtype,
        heads(dtype),
    )


def test_plackett_luce(backend):
    """In fp32; which entries are ranked how is the objective tests' matter."""

    def dense(z_s, z_t):
        chosen = z_s.detach().topk(6).indices
        order = z_t.gather(-1, chosen).argsort(-1, descending=True)
        return truth.plackett_luce(z_s.gather(-1, chosen.gather(-1, order)))

    check(lambda s, t: kd.plackett_luce(s, t, k=6), dense, F32, heads(F32))


def test_small_budgets_change_nothing(backend):
    student, teacher = heads(F32, shape=(400,))
    incoming = torch.randn(400)
    results = []
    for budget in (
        None,
        400 * plan.TOKEN_BYTES
        + {"eager": 112 << 20, "native": 100_000 + 190_000 * torch.get_num_threads(), "triton": 4_500_000}[backend],
    ):
        with Products() as products:
            value = kd.divergence(student, teacher, kd.JSD(0.9), memory_budget=budget)
            results.append([value.detach(), *torch.autograd.grad(value, truth.leaves(student), incoming)])
    for whole, pieces in zip(*results, strict=True):
        assert truth.relative(pieces, whole) < 1e-6
    if backend != "eager":
        assert len([shape for shape in products.shapes if shape[1:] == (10, ENTRIES)]) > 2


@pytest.mark.parametrize("rows", [None, [5, 0, 20]], ids=["all", "rows"])
@pytest.mark.parametrize("shape", [SHAPE, (1, 1)], ids=str)
@pytest.mark.parametrize("name", ["cross_entropy", "entropy", "divergence", "plackett_luce"])
def test_values_may_be_changed_in_place(name, shape, rows):
    """As in ``loss *= mask``: autograd refuses that for a view."""
    student, teacher = heads(F32, shape)
    rows = None if rows is None else torch.tensor(rows) % (shape[0] * shape[1])
    rows = rows if rows is None else rows.unique()
    arguments = {
        "cross_entropy": (torch.full(shape, 3),), "entropy": (), "divergence": (teacher, kd.JSD(0.5)),
        "plackett_luce": (teacher, 4),
    }[name]  # fmt: skip
    value, factors = getattr(kd, name)(student, *arguments, rows=rows), torch.rand(shape)
    expected = torch.autograd.grad(value, truth.leaves(student), factors, retain_graph=True)
    value *= factors
    got = torch.autograd.grad(value.sum(), truth.leaves(student))
    assert all(torch.equal(a, b) and a.norm() > 0 for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("ignore_index", [-100, 0, 7])
def test_ignored_targets(backend, ignore_index):
    student, _ = heads(F32)
    target = torch.randint(1, 6, SHAPE)
    ignored = torch.rand(SHAPE) < 0.4
    target[ignored] = ignore_index
    expected = truth.cross_entropy(flat(student), target.flatten().clamp(min=0)).detach().view(SHAPE)
    with torch.no_grad():
        student.hidden[ignored] = float("nan")  # not even looked at
    with Products() as products:
        value = kd.cross_entropy(student, target, ignore_index=ignore_index)
        value.sum().backward()
    # logits, the same again for the gradient, d_hidden, d_weight
    assert products.between(int((~ignored).sum()), 10, ENTRIES) == 4
    assert (value[ignored] == 0).all()
    torch.testing.assert_close(value[~ignored].detach(), expected[~ignored])
    assert (student.hidden.grad[ignored] == 0).all() and student.weight.grad.isfinite().all()
    assert (student.hidden.grad[~ignored].abs().sum(-1) > 0).all()


def test_everything_ignored(backend):
    student, _ = heads(F32)
    value = kd.cross_entropy(student, torch.full(SHAPE, -100))
    assert value.shape == SHAPE and (value == 0).all()
    value.sum().backward()
    assert all((leaf.grad == 0).all() for leaf in truth.leaves(student))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 2)], ids=str)
def test_any_leading_shape(backend, shape):
    student, teacher = heads(F32, shape=shape)
    target = torch.randint(0, ENTRIES, shape)
    z_s, z_t = (truth.dense_logits(h, ENTRIES) for h in (student, teacher))
    for value, expected in (
        (kd.entropy(student), truth.entropy(z_s)),
        (kd.cross_entropy(student, target), -z_s.log_softmax(-1).gather(-1, target[..., None])[..., 0]),
        (kd.divergence(student, teacher, kd.ForwardKL()), truth.divergence(z_s, z_t, "forward")),
        (kd.statistics(student, target=target).lse, z_s.logsumexp(-1)),
    ):
        assert value.shape == shape
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_no_tokens(backend):
    student, teacher = heads(F32, shape=(0, 4))
    value = kd.divergence(student, teacher, kd.JSD(0.5))
    assert value.shape == (0, 4)
    value.sum().backward()
    assert student.hidden.grad.shape == (0, 4, 10) and (student.weight.grad == 0).all()


def test_entries_of_probability_zero(backend):
    """A bias of -inf removes an entry: nothing of it is in any number, and its own likelihood is 0."""
    student, teacher = heads(F32)
    gone = torch.tensor([3, 50, 129])
    with torch.no_grad():
        student.bias[gone] = teacher.bias[gone] = -float("inf")
    rest = [v for v in range(ENTRIES) if v not in gone.tolist()]
    z_s, z_t = flat(student)[:, rest].view(*SHAPE, -1), flat(teacher)[:, rest].view(*SHAPE, -1)
    torch.testing.assert_close(kd.entropy(student), truth.entropy(z_s), rtol=1e-5, atol=1e-6)
    for kind, name in ((kd.ForwardKL(), "forward"), (kd.JSD(0.9), "jsd.9")):
        torch.testing.assert_close(
            kd.divergence(student, teacher, kind), truth.divergence(z_s, z_t, name), rtol=1e-5, atol=1e-6
        )
    assert (kd.cross_entropy(student, torch.full(SHAPE, 50)) == float("inf")).all()
    statistics = kd.statistics(student, topk=ENTRIES, target=torch.full(SHAPE, 3))
    assert (statistics.target_log_prob == -float("inf")).all()
    assert statistics.topk_indices[..., -3:].tolist() == gone.expand(*SHAPE, 3).tolist()


def test_statistics(backend, dtype):
    student, teacher = heads(dtype)
    target = torch.randint(0, ENTRIES, SHAPE)
    got = kd.statistics(student, teacher, topk=5, target=target)
    z_s, z_t = (truth.dense_logits(truth.to(h, F64), ENTRIES).detach() for h in (student, teacher))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == F32 else {"rtol": 0.02, "atol": 0.05}
    for side, z in ((got, z_s), (got.teacher, z_t)):
        log_q = z.log_softmax(-1)
        torch.testing.assert_close(side.lse.double(), z.logsumexp(-1), **tolerance)
        torch.testing.assert_close(side.entropy.double(), truth.entropy(z), **tolerance)
        log_target = log_q.gather(-1, target[..., None])[..., 0]
        torch.testing.assert_close(side.target_log_prob.double(), log_target, **tolerance)
        assert side.argmax.shape == SHAPE and side.argmax.dtype == torch.int64
    assert got.topk_indices.shape == (*SHAPE, 5)
    log_q = z_s.log_softmax(-1)
    torch.testing.assert_close(got.topk_log_probs.double(), log_q.gather(-1, got.topk_indices), **tolerance)
    if dtype == F32:
        assert torch.equal(got.topk_indices, z_s.topk(5).indices)
        assert torch.equal(got.argmax, z_s.argmax(-1)) and torch.equal(got.teacher.argmax, z_t.argmax(-1))
    assert not got.entropy.requires_grad


def test_statistics_that_were_not_asked_for(backend):
    got = kd.statistics(heads(F32)[0])
    assert got.topk_indices is got.topk_log_probs is got.target_log_prob is got.teacher is None
    assert got.entropy.shape == SHAPE


def test_statistics_do_the_forward_only(backend):
    student, teacher = heads(F32)
    with Products() as products:
        kd.statistics(student, teacher, topk=3)
    assert [shape[0] for shape in products.shapes] == [21, 21]


def test_held_out_numbers_under_no_grad(backend):
    """What an evaluation needs: cross-entropy and KL per token, without a graph."""
    student, teacher = heads(F32)
    target = torch.randint(0, ENTRIES, SHAPE)
    with torch.no_grad(), Products() as products:
        values = kd.cross_entropy(student, target), kd.divergence(student, teacher, kd.ForwardKL())
    assert len(products.shapes) == 3 and not any(v.requires_grad for v in values)


def test_the_same_tensor_on_both_sides(backend):
    """Self-distillation: the teacher is a constant."""
    student, _ = heads(F32)
    value = kd.divergence(student, replace(student, scale=1.0), kd.ForwardKL())
    (got,) = torch.autograd.grad(value.sum(), student.hidden)
    z_s, z_t = (truth.dense_logits(head, ENTRIES) for head in (student, replace(student, scale=1.0)))
    z_t = z_t.detach()
    (expected,) = torch.autograd.grad(truth.divergence(z_s, z_t, "forward").sum(), student.hidden)
    assert truth.relative(got, expected) < 1e-6


def test_one_candidate_has_one_order(backend):
    student, teacher = heads(F32)
    value = kd.plackett_luce(student, teacher, k=1)
    value.sum().backward()
    assert (value == 0).all() and (student.hidden.grad == 0).all()


@pytest.mark.parametrize("name", ["forward", "jsd.9"])
def test_operands_that_are_not_contiguous(backend, name):
    """Transposed and strided hidden states, weights and biases; the gradients have their shapes and values."""
    student, teacher = heads(F32)
    kind = truth.DIVERGENCES[name][0]
    value = kd.divergence(student, teacher, kind)
    expected = torch.autograd.grad(value.sum(), truth.leaves(student))

    def strange(head: kd.Head) -> kd.Head:
        hidden = head.hidden.detach().transpose(0, 1).contiguous().transpose(0, 1)
        weight = head.weight.detach().t().contiguous().t()
        bias = torch.stack([head.bias.detach()] * 2, -1)[:, 0]
        assert not any(t.is_contiguous() for t in (hidden, weight, bias))
        tensors = (t.requires_grad_(head.weight.requires_grad) for t in (hidden, weight, bias))
        return replace(head, **dict(zip(("hidden", "weight", "bias"), tensors, strict=True)))

    other = strange(student)
    value_of_other = kd.divergence(other, strange(teacher), kind)
    torch.testing.assert_close(value_of_other, value)
    for g, e in zip(torch.autograd.grad(value_of_other.sum(), truth.leaves(other)), expected, strict=True):
        assert truth.relative(g, e) < 1e-6
    out = kd.GKD(0.9)(other, strange(teacher), torch.ones(SHAPE, dtype=torch.bool))
    whole = kd.GKD(0.9)(student, teacher, torch.ones(SHAPE, dtype=torch.bool))
    for g, e in zip(
        *(torch.autograd.grad(o.loss, truth.leaves(s)) for o, s in ((out, other), (whole, student))), strict=True
    ):
        assert truth.relative(g, e) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_token_and_a_single_number(backend, dtype):
    """Every second number of a vector is no contiguous [H], and products take no strides (2, 2), of a [1, 1] weight."""
    hidden, weight = torch.randn(12).to(dtype)[::2].requires_grad_(), torch.randn(9, 6).to(dtype).requires_grad_()
    plain = hidden.detach().clone().requires_grad_()
    got = kd.entropy(kd.Head(hidden, weight))
    expected = kd.entropy(kd.Head(plain, weight))
    assert got.shape == () and torch.equal(got, expected)
    for g, e in zip(
        torch.autograd.grad(got, (hidden, weight)), torch.autograd.grad(expected, (plain, weight)), strict=True
    ):
        assert torch.equal(g, e) and e.norm() > 0
    one = torch.randn(1, 2, dtype=torch.float32).to(dtype)[:, ::2].as_strided((1, 1), (2, 2))
    head = kd.Head(torch.ones(3, 1, dtype=dtype), one, scale=2.0)
    assert torch.equal(kd.statistics(head).lse, 2 * one.float().expand(3, 1)[:, 0])
    bias = torch.randn(2).to(dtype)[::2]
    head = kd.Head(torch.zeros(3, 5, dtype=dtype), torch.ones(1, 5, dtype=dtype), bias)
    assert torch.equal(kd.statistics(head).lse, bias.float().expand(3))


def test_all_entries_are_candidates(backend):
    student, teacher = heads(F32)
    value = kd.plackett_luce(student, teacher, k=ENTRIES)
    z_s, z_t = flat(student), flat(teacher)
    expected = truth.plackett_luce(z_s.gather(-1, z_t.argsort(-1, descending=True)))
    torch.testing.assert_close(value.flatten(), expected, rtol=1e-4, atol=1e-4)
    statistics = kd.statistics(student, topk=ENTRIES, collision=128)
    assert torch.equal(statistics.topk_indices.sort(-1).values, torch.arange(ENTRIES).expand(*SHAPE, ENTRIES))
    squares = statistics.topk_log_probs.double().exp().square()[..., :128].sum(-1)
    torch.testing.assert_close(statistics.collision.double(), squares, rtol=1e-5, atol=0)
