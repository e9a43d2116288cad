"""No call allocates more than its memory budget, whatever is large: tokens, entries, candidates, stored entries, hidden
sizes, the length of one response. What native code takes beside torch is in test_gemm.py and test_memory.py.

Axes: N tokens, V vocabulary, H hidden, K candidates or stored entries.
"""

from dataclasses import dataclass

import pytest
import torch
from allocations import Allocations
from batches import costs, smallest_budget

import kdkernels as kd
from kdkernels.engine import plan
from kdkernels.sources.adapted import AdaptedHead

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SLACK = 1 << 17  # bytes: scalars, and what libraries take


@dataclass
class Problem:
    """An objective over N = 10 * length tokens, H = 32 for both sides where nothing else is said."""

    objective: object
    length: int
    vocabulary: int
    dtype: torch.dtype = F32
    student: str = "head"
    teacher: str = "head"
    hidden: int = 32
    stored: int = 0
    lengths: tuple[int, ...] = ()
    teacher_dtype: torch.dtype | None = None

    def head(self, how: str, shape: tuple[int, ...], grad: bool) -> kd.Head:
        dtype = self.dtype if grad else self.teacher_dtype or self.dtype
        hidden, weight = torch.randn(*shape, self.hidden).to(dtype), torch.randn(self.vocabulary, self.hidden).to(dtype)
        trained = grad
        if how == "hidden states of another order":  # frozen: autograd would copy a leaf's gradient into its order
            hidden, trained = hidden.transpose(0, 1).contiguous().transpose(0, 1), False
        if how == "entries apart":
            weight = weight.repeat_interleave(2, dim=1)[:, ::2]
        bias = torch.randn(self.vocabulary).to(self.dtype).requires_grad_(grad) if how == "bias" else None
        head = hidden.requires_grad_(trained), weight.requires_grad_(grad), bias
        if how == "adapted":
            inner, outer = torch.randn(*shape, 16).to(dtype), torch.randn(self.vocabulary, 16).to(dtype)
            return AdaptedHead(*head, inner=inner.requires_grad_(grad), outer=outer.requires_grad_(grad))
        return kd.Head(*head)

    def source(self, how: str, shape: tuple[int, ...], grad: bool) -> kd.Head | kd.Logits | kd.TopK:
        logits = (*shape, self.vocabulary)
        if how == "logits":
            return kd.Logits(torch.randn(logits).to(self.dtype).requires_grad_(grad))
        if how == "logits of another order":
            return kd.Logits(torch.randn(logits).to(self.dtype).transpose(0, 1).contiguous().transpose(0, 1))
        if how == "stored":
            best = torch.randn(logits).log_softmax(-1).topk(self.stored)
            return kd.TopK(best.indices, best.values)
        return self.head(how, shape, grad)

    def run(self) -> tuple[object, kd.Head | kd.Logits]:
        """call(memory_budget) -> loss, and the student whose gradients it has."""
        torch.manual_seed(0)
        lengths = self.lengths or (self.length,) * 10
        shape = (1, sum(lengths)) if self.lengths else (10, self.length)
        layout = kd.Layout(torch.arange(sum(lengths)), lengths, shape)
        student = self.source(self.student, shape, True)
        teacher = self.source(self.teacher, shape, False) if self.objective.needs_teacher else None
        more = {"target": torch.randint(0, self.vocabulary, shape)} if self.teacher != "stored" else {}
        if self.objective.by_author:
            more["from_teacher"] = torch.arange(shape[0]) % 2 == 0
        return lambda budget: self.objective(student, teacher, layout, memory_budget=budget, **more).loss, student


class Jeffreys(kd.objectives.Objective):
    """Both KLs at each token, and an entropy."""

    terms = {
        "forward": kd.objectives.DivergenceTerm(kd.ForwardKL()),
        "reverse": kd.objectives.DivergenceTerm(kd.ReverseKL()),
        "entropy": kd.objectives.EntropyTerm(),
    }

    def coefficients(self, tokens):
        return dict.fromkeys(self.terms, 1 / tokens.length.to(tokens.entropy.dtype))


def tsdkd(**more) -> kd.TSDKD:
    return kd.TSDKD(**{"k": 10, **more})


VCRD = kd.VCRD(weighting="likelihood_ratio")
PROBLEMS = {
    "TSDKD of few entries": Problem(tsdkd(), 500, 16),
    "adaptive TSDKD of few entries": Problem(tsdkd(opener=kd.AdaptiveOpener()), 500, 16),
    "GKD of few entries": Problem(kd.GKD(), 500, 16),
    "SFT of few entries": Problem(kd.SFT(), 500, 16),
    "DistiLLM2 of few entries": Problem(kd.DistiLLM2(), 500, 16),
    "VCRD of few entries": Problem(VCRD, 500, 16),
    "one long response": Problem(tsdkd(), 0, 59, lengths=(4,) * 300 + (4000,) + (4,) * 300),
    "many candidates": Problem(tsdkd(k=64), 100, 64),
    "collisions": Problem(VCRD, 200, 259),
    "TSDKD of many entries": Problem(tsdkd(), 12, 20000),
    "GKD of many entries": Problem(kd.GKD(), 12, 20000),
    "DistiLLM2 of many entries": Problem(kd.DistiLLM2(), 12, 20000),
    "two divergences": Problem(Jeffreys(), 12, 20000),
    "two divergences in fp16": Problem(Jeffreys(), 12, 20000, dtype=F16),
    "two divergences and stored entries": Problem(Jeffreys(), 12, 20000, teacher="stored", stored=8),
    "VCRD of many entries in fp16": Problem(VCRD, 12, 20000, dtype=F16),
    "few stored entries": Problem(kd.GKD(), 500, 16, teacher="stored", stored=8),
    "stored entries in bf16": Problem(kd.GKD(), 30, 9000, teacher="stored", stored=40, dtype=BF16),
    "many stored entries": Problem(kd.DistiLLM2(), 30, 1000, teacher="stored", stored=700),
    "logits": Problem(kd.GKD(), 30, 3000, student="logits", teacher="logits", dtype=BF16),
    "logits of another order": Problem(kd.GKD(), 30, 3000, teacher="logits of another order"),
    "hidden states of another order": Problem(
        tsdkd(), 40, 50, student="hidden states of another order", teacher="hidden states of another order", hidden=2000
    ),
    "entries apart": Problem(kd.GKD(), 2, 3000, student="entries apart", teacher="entries apart", hidden=200),
    "a bias": Problem(kd.GKD(), 100, 512, student="bias", dtype=BF16),
    "a teacher in fp16": Problem(kd.GKD(), 20, 3000, teacher_dtype=F16, hidden=200),
    "a teacher in fp32": Problem(kd.GKD(), 20, 3000, dtype=BF16, teacher_dtype=F32, hidden=200),
    "a low-rank adapter": Problem(kd.GKD(), 20, 3000, student="adapted", teacher="adapted"),
    "a low-rank adapter in bf16": Problem(kd.GKD(), 20, 3000, student="adapted", dtype=BF16),
    "a low-rank adapter in fp16": Problem(kd.GKD(), 20, 3000, student="adapted", dtype=F16),
    "wide hidden states": Problem(kd.GKD(), 20, 300, hidden=4000, dtype=BF16),
}  # fmt: skip


@pytest.mark.parametrize("chunk", [1.0, 0.1], ids=["one chunk", "chunks"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_no_call_takes_more_than_its_budget(backend, name, chunk):
    """The budget is what the plan says that a chunk of all tokens, or of a tenth of them, takes."""
    check(PROBLEMS[name], chunk)


def test_nor_in_fp64(monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", "eager")
    check(Problem(kd.DistiLLM2(), 12, 20000, dtype=torch.float64), 1.0)


def check(problem: Problem, chunk: float) -> None:
    call, student = problem.run()
    count = student.shape.numel()
    fixed, row, teacher_row = costs(call)
    budget = fixed + int(chunk * count) * (row + teacher_row)
    call(budget)  # libraries are up
    with Allocations() as seen:
        call(budget).backward()
    gradients = [t.grad for t in student.tensors if t is not None and t.requires_grad]
    assert gradients and all(g.norm() > 0 for g in gradients)
    outside = sum(g.nbytes for g in gradients)
    if isinstance(student, kd.Head) and (student.dtype == F16 or (student.dtype == BF16 and chunk < 1)):
        outside += 4 * (student.weight.numel() + getattr(student, "outer", torch.empty(0)).numel())  # fp32 sums of dW
    assert seen.peak - outside <= budget + SLACK
    logits = problem.vocabulary * student.dtype.itemsize
    assert seen.peak > int(chunk * count) * logits, "nothing was measured"


def test_many_tokens_fit_the_default_budget():
    """Of what is kept of each: 400000 tokens with ten entries each."""
    fixed, row, teacher_row = costs(Problem(kd.GKD(), 40000, 10, hidden=2).run()[0])
    assert fixed + 4096 * (row + teacher_row) < plan.DEFAULT_BUDGET


@pytest.mark.parametrize(
    "function",
    [
        lambda s, t, n: kd.entropy(s, memory_budget=n).sum(),
        lambda s, t, n: kd.divergence(s, t, kd.JSD(0.5), memory_budget=n).sum(),
        lambda s, t, n: kd.plackett_luce(s, t, k=40, memory_budget=n).sum(),
        lambda s, t, n: kd.statistics(s, t, topk=40, collision=20, memory_budget=n).entropy.sum(),
    ],
    ids=["entropy", "divergence", "plackett_luce", "statistics"],
)
def test_per_token_functions(backend, function):
    """At the least budget there is, one token at a time, forward and backward."""
    student, teacher = (Problem(kd.GKD(), 5, 50).head("head", (10, 5), grad) for grad in (True, False))
    budget = smallest_budget(lambda n: function(student, teacher, n))
    with Allocations() as seen:
        loss = function(student, teacher, budget)
        if loss.requires_grad:
            loss.backward()
    outside = sum(t.grad.nbytes for t in student.tensors if t is not None and t.grad is not None)
    assert seen.peak - outside <= budget + SLACK
