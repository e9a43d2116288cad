"""The operators under PyTorch's own checks, and compiled numbers equal to eager ones."""

import pytest
import torch
import truth
from batches import fixed

import kdkernels as kd
from kdkernels import operators

# Dynamo looks for gradients of tensors that have none, and hides PyTorch's remark from users, not from "error".
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # PyTorch's own, where it imports its compiler
]


def source(kind: str, grad: bool) -> kd.heads.Source:
    torch.manual_seed(0)
    if kind == "Head":
        tensors = torch.randn(2, 3, 4), torch.randn(11, 4), torch.randn(11)
        return kd.Head(*(t.requires_grad_(grad) for t in tensors), softcap=5.0, scale=0.5, vocab_size=10)
    logits = torch.randn(2, 3, 10)
    if kind == "Logits":
        return kd.Logits(logits.requires_grad_(grad))
    return kd.TopK(logits.topk(4).indices, logits.log_softmax(-1).topk(4).values)


def arguments(student: str, teacher: str | None, term: str, needs=(True, True, True), target=None, rows=None) -> tuple:
    student, teacher = source(student, True), teacher and source(teacher, False)
    kind = [1.0, 0.0, 0.3] if term == "divergence" else []
    needs = list(needs[: len(student.tensors)])
    sides = (*operators.unpacked(student), *operators.unpacked(teacher))
    return *sides, target, rows, term, kind, 1.0, 3 if term == "plackett_luce" else 0, -100, None, None, needs


TARGET = torch.tensor([[0, 1, 2], [-100, 9, 3]])
CALLS = {
    "divergence of heads": lambda: arguments("Head", "Head", "divergence"),
    "divergence of some": lambda: arguments("Head", "Logits", "divergence", (True, False, True), rows=TARGET > 0),
    "divergence from stored words": lambda: arguments("Logits", "TopK", "divergence"),
    "cross-entropy": lambda: arguments("Head", None, "cross_entropy", (False, True, False), target=TARGET),
    "Plackett-Luce": lambda: arguments("Logits", "Head", "plackett_luce", rows=torch.tensor([5, 0])),
}


@pytest.mark.parametrize("name", CALLS)
def test_token_values_is_a_good_operator(name):
    """Its schema, its fake kernel, its autograd formula, also with dynamic shapes."""
    torch.library.opcheck(operators.token_values, CALLS[name]())


def test_token_statistics_is_a_good_operator():
    sides = *operators.unpacked(source("Head", False)), *operators.unpacked(source("Logits", False))
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

    def step(hidden, weight, bias, teacher_hidden, teacher_weight, target, mask, ids, log_probs):
        student = kd.Head(hidden * 1.5, weight, bias, softcap=9.0, scale=0.5)
        teacher = kd.Head(teacher_hidden, teacher_weight)
        values = [
            kd.divergence(student, teacher, kd.JSD(0.9), 0.7),
            kd.cross_entropy(student, target, rows=mask),
            kd.modules.Entropy()(kd.Logits(hidden.sin()), rows=torch.arange(3)),
            kd.plackett_luce(student, kd.Logits(teacher_hidden @ teacher_weight.t()), k=3),
            kd.divergence(kd.Logits(hidden[:2, :3]), kd.TopK(ids, log_probs), kd.ForwardKL()),
        ]
        statistics = kd.statistics(student, teacher, topk=3, target=target, collision=4)
        loss = sum((value * value).sum() for value in values)
        return loss, statistics.entropy, statistics.topk_indices, statistics.teacher.collision

    heads = *leaves, batch.teacher.hidden, batch.teacher.weight
    inputs = *heads, batch.target, batch.mask, stored.indices, stored.values
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
