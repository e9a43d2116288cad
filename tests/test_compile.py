"""The operators under PyTorch's own checks, and compiled numbers equal to eager ones."""

import pytest
import torch
import truth
from batches import fixed

import kdkernels as kd
from kdkernels.engine import operators
from kdkernels.sources import packed

# Dynamo looks for gradients of tensors that have none, and hides PyTorch's remark from users, not from "error".
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own, where it imports its compiler
]


def source(kind: str, grad: bool) -> kd.sources.Source:
    torch.manual_seed(0)
    if kind == "Head":
        tensors = torch.randn(2, 3, 4), torch.randn(11, 4), torch.randn(11)
        return kd.Head(*(t.requires_grad_(grad) for t in tensors), softcap=5.0, scale=0.5, vocab_size=10)
    logits = torch.randn(2, 3, 10)
    if kind == "Logits":
        return kd.Logits(logits.requires_grad_(grad))
    ids = logits.topk(4).indices
    sampled = kind == "TopK of drawn entries"
    return kd.TopK(
        ids.int() if kind == "TopK of int32" else ids, logits.log_softmax(-1).topk(4).values, sampled=sampled
    )


def arguments(student: str, teacher: str | None, term: str, needs=(True, True, True), target=None, rows=None) -> tuple:
    student, teacher = source(student, True), teacher and source(teacher, False)
    kind = [1.0, 0.0, 0.3] if term == "divergence" else []
    needs = list(needs[: len(student.tensors)])
    sides = (*packed(student), *packed(teacher))
    return *sides, target, rows, term, kind, 1.0, 3 if term == "plackett_luce" else 0, -100, None, None, needs


TARGET = torch.tensor([[0, 1, 2], [-100, 9, 3]])
CALLS = {
    "divergence of heads": lambda: arguments("Head", "Head", "divergence"),
    "divergence of some": lambda: arguments("Head", "Logits", "divergence", (True, False, True), rows=TARGET > 0),
    "divergence from stored entries": lambda: arguments("Logits", "TopK", "divergence"),
    "divergence from ids of int32": lambda: arguments("Logits", "TopK of int32", "divergence"),
    "divergence from drawn entries": lambda: arguments("Logits", "TopK of drawn entries", "divergence"),
    "cross-entropy": lambda: arguments("Head", None, "cross_entropy", (False, True, False), target=TARGET),
    "Plackett-Luce": lambda: arguments("Logits", "Head", "plackett_luce", rows=torch.tensor([5, 0])),
}


@pytest.mark.parametrize("name", CALLS)
def test_token_values_is_a_good_operator(name):
    """Its schema, its fake kernel, its autograd formula, also with dynamic shapes."""
    torch.library.opcheck(operators.token_values, CALLS[name]())


def test_token_statistics_is_a_good_operator():
    sides = *packed(source("Head", False)), *packed(source("Logits", False))
    torch.library.opcheck(operators.token_statistics, (*sides, TARGET.clamp(min=0), None, 3, 2, None, None))


def test_token_gradients_is_a_good_operator():
    call = arguments("Head", "TopK", "divergence", (True, False, True))
    call = ([t.detach() for t in call[0]], *call[1:])
    torch.library.opcheck(operators.token_gradients, (torch.randn(2, 3), *call))


@pytest.fixture
def compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_per_token_functions_in_one_graph(compiler):
    """Every function, side and option in one compilation: without a break, with eager's numbers."""
    batch, stored = fixed(bias=True), torch.randn(2, 3, 8).log_softmax(-1).topk(4)
    leaves = truth.leaves(batch.student)

    def step(hidden, weight, bias, teacher_hidden, teacher_weight, target, mask, ids, log_probs, rows):
        student = kd.Head(hidden * 1.5, weight, bias, softcap=9.0, scale=0.5)
        teacher = kd.Head(teacher_hidden, teacher_weight)
        values = [
            kd.divergence(student, teacher, kd.JSD(0.9), 0.7),
            kd.cross_entropy(student, target, rows=mask),
            kd.modules.Entropy()(kd.Logits(hidden.sin()), rows=torch.arange(3)),
            kd.plackett_luce(student, kd.Logits(teacher_hidden @ teacher_weight.t()), k=3),
            kd.divergence(kd.Logits(hidden[:2, :3]), kd.TopK(ids, log_probs), kd.ForwardKL()),
            kd.divergence(kd.Logits(hidden[:2, :3]), kd.TopK(ids.int(), log_probs), kd.ReverseKL(), rows=rows),
            kd.cross_entropy(student, target.int(), rows=rows),
        ]
        statistics = kd.statistics(student, teacher, topk=3, target=target, collision=4)
        loss = sum((value * value).sum() for value in values)
        return loss, statistics.entropy, statistics.topk_indices, statistics.teacher.collision

    heads = *leaves, batch.teacher.hidden, batch.teacher.weight
    inputs = *heads, batch.target, batch.mask, stored.indices, stored.values, torch.arange(4, dtype=torch.int32)
    eager, compiled = step(*inputs), torch.compile(step, fullgraph=True)(*inputs)
    assert all(torch.equal(e, c) for e, c in zip(eager, compiled, strict=True))
    for e, c in zip(*(torch.autograd.grad(out[0], leaves) for out in (eager, compiled)), strict=True):
        assert truth.relative(c, e) < 1e-6  # the compiler adds up what comes from several uses in another order


def test_an_objective_breaks_the_graph_once(compiler):
    batch, objective = fixed(bias=True), kd.TSDKD(k=3)
    leaves = truth.leaves(batch.student)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(hidden, weight, bias, mask):
        out = objective(kd.Head(hidden * 1.5, weight, bias), batch.teacher, mask)
        return out.loss * 2, out.metrics["gate"].sin()

    eager, compiled = step(*leaves, batch.mask), torch.compile(step, backend=count)(*leaves, batch.mask)
    assert len(graphs) == 2, "before and after"
    assert all(torch.equal(e, c) for e, c in zip(eager, compiled, strict=True))
    for e, c in zip(*(torch.autograd.grad(out[0], leaves) for out in (eager, compiled)), strict=True):
        assert torch.equal(e, c) and e.norm() > 0


# ---- numbers and shapes that change from call to call: the compiler makes them symbols ---


def _head(batch, hidden, **options) -> kd.Head:
    return kd.Head(hidden, batch.student.weight, batch.student.bias, **options)


def _teacher(batch, hidden) -> kd.Head:
    return kd.Head(batch.teacher.hidden.detach()[:, : hidden.shape[1]], batch.teacher.weight.detach())


def _stored(batch, hidden, k) -> kd.TopK:
    log_p = truth.dense_logits(_teacher(batch, hidden), 60).log_softmax(-1).topk(k)
    return kd.TopK(log_p.indices, log_p.values, renormalize=True)


# name -> (the function of a batch, hidden states and a number, the numbers); the first may stay constants
CHANGING = {
    "temperature": (lambda b, h, x: kd.divergence(_head(b, h), _teacher(b, h), kd.JSD(0.9), x), (0.7, 0.8, 1.3)),
    "JSD": (lambda b, h, x: kd.divergence(_head(b, h), _teacher(b, h), kd.JSD(x)), (0.2, 0.5, 0.0)),
    "SkewKL": (lambda b, h, x: kd.divergence(_head(b, h), _teacher(b, h), kd.SkewKL(x)), (0.2, 0.5, 0.9)),
    "SkewReverseKL": (
        lambda b, h, x: kd.divergence(_head(b, h), _teacher(b, h), kd.SkewReverseKL(x, detach=True)),
        (0.2, 0.5, 0.0),
    ),
    "scale": (lambda b, h, x: kd.entropy(_head(b, h, scale=x)), (0.5, 0.7, 2)),
    "softcap": (lambda b, h, x: kd.entropy(_head(b, h, softcap=x)), (3.0, 5.0, 7)),
    "vocab_size": (lambda b, h, x: kd.entropy(_head(b, h, vocab_size=x)), (60, 50, 40)),
    "k": (lambda b, h, x: kd.plackett_luce(_head(b, h), _teacher(b, h), x), (2, 3, 5)),
    "stored entries": (
        lambda b, h, x: kd.divergence(_head(b, h), _stored(b, h, x), kd.JSD(0.3), 1 / x),
        (2, 3, 5),
    ),
    "ignore_index": (
        lambda b, h, x: kd.cross_entropy(_head(b, h), b.target[:, : h.shape[1]] % 8, x), (2, 3, 5),
    ),
    "rows": (lambda b, h, x: kd.entropy(_head(b, h), rows=torch.arange(x) * 2), (2, 3, 5)),
    "memory_budget": (lambda b, h, x: kd.entropy(_head(b, h), memory_budget=x), (2_000_000, 3_000_000, 4_000_000)),
    "modules": (lambda b, h, x: kd.modules.Divergence(kd.JSD(x), x)(_head(b, h), _teacher(b, h)), (0.2, 0.3, 0.5)),
}  # fmt: skip


def _in_one_graph(function, batch, numbers, dynamic):
    """``function(batch, hidden, number)`` for one number after the other, with ``dynamic`` also for growing lengths,
    compiled without a break: eager's values and gradients.
    """
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for step, number in enumerate(numbers):
        hidden = batch.student.hidden.detach()[:, : 6 + (step if dynamic else 0)].clone().requires_grad_()
        leaves = (hidden, batch.student.weight)
        eager, got = function(batch, hidden, number), compiled(batch, hidden, number)
        assert torch.equal(eager, got)
        for g, e in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in (got, eager)), strict=True):
            assert truth.relative(g, e) < 1e-6 and g.norm() > 0  # sums of several uses, in another order


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [None, True], ids=["numbers", "lengths too"])
@pytest.mark.parametrize("name", CHANGING)
def test_one_graph_whichever_option_changes(compiler, name, dynamic):
    _in_one_graph(CHANGING[name][0], fixed(bias=True), CHANGING[name][1], dynamic)


def test_one_graph_whatever_changes(compiler):
    """All of them at once: every option of every per-token function is a symbol."""

    def step(batch, hidden, numbers):
        pairs = zip(CHANGING.values(), numbers, strict=True)
        return torch.stack([function(batch, hidden, number).square().sum() for (function, _), number in pairs])

    numbers = list(zip(*(numbers for _, numbers in CHANGING.values()), strict=True))[:2]
    _in_one_graph(step, fixed(bias=True), numbers, True)


def test_statistics_in_one_graph_whatever_changes(compiler):
    batch = fixed(bias=True)

    def step(hidden, number):
        found = kd.statistics(_head(batch, hidden), _teacher(batch, hidden), topk=number, collision=number + 1)
        return found.entropy, found.lse, found.topk_log_probs, found.teacher.collision

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for length, number in ((5, 2), (6, 3), (7, 5)):
        hidden = batch.student.hidden.detach()[:, :length]
        assert all(torch.equal(a, b) for a, b in zip(step(hidden, number), compiled(hidden, number), strict=True))


def test_a_number_that_is_none_is_refused_in_the_graph_too(compiler):
    """The checks are traced, not skipped."""
    batch = fixed(bias=True)
    compiled = torch.compile(CHANGING["temperature"][0], backend="aot_eager")
    for temperature in (0.7, 0.8, 1.3):
        compiled(batch, batch.student.hidden, temperature)
    for wrong in (2e3, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="temperature: expected a "):
            compiled(batch, batch.student.hidden, wrong)


@pytest.mark.parametrize("fused", [False, True], ids=["objective", "fused linear"])
def test_an_objective_with_changing_lengths_breaks_the_graph_once(compiler, fused):
    batch, objective, graphs = fixed(bias=True), kd.TSDKD(k=3), []
    called = kd.FusedLinearDistillationLoss(objective)

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def step(hidden, mask):
        student, teacher = _head(batch, hidden * 1.5), _teacher(batch, hidden)
        if fused:
            labels = torch.where(mask, batch.target[:, : mask.shape[1]], -100)
            return 2 * called(*student.tensors[:2], *teacher.tensors[:2], labels, student.bias)
        return 2 * objective(student, teacher, mask).loss

    compiled = torch.compile(step, backend=count, dynamic=True)
    for length in (8, 9, 10):
        hidden = batch.student.hidden.detach()[:, :length].clone().requires_grad_()
        leaves, mask = (hidden, batch.student.weight), batch.mask[:, :length]
        eager, got = step(hidden, mask), compiled(hidden, mask)
        assert torch.equal(eager, got)
        assert len(graphs) == 2 or length > 8, "before and after"
        for g, e in zip(*(torch.autograd.grad(out, leaves) for out in (got, eager)), strict=True):
            assert torch.equal(g, e) and g.norm() > 0
