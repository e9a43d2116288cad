"""Losses of several terms, against full logits in fp64: two divergences at each token, terms of groups, terms beside a
teacher known at K entries; what a program may not say."""

from dataclasses import dataclass

import pytest
import torch
import truth
from batches import fixed, run, smallest_budget
from test_topk import reference_divergence, stored

import kdkernels as kd
from kdkernels.engine.terms import Evaluated
from kdkernels.objectives import (
    CrossEntropyTerm,
    DivergenceTerm,
    EntropyTerm,
    Needs,
    Objective,
    PlackettLuceTerm,
    Term,
    weighted,
)

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Blend(Objective):
    """Both KLs at each token, the forward one the more the surer the teacher is; a response counts the more the more
    the student has to learn from it, which both models' entropies of the whole response say."""

    selects = selects_by_teacher = True

    def __init__(self, temperature: float = 1.0):
        super().__init__()
        forward, reverse = DivergenceTerm(kd.ForwardKL(), temperature), DivergenceTerm(kd.ReverseKL(), temperature)
        self.terms = {"forward": forward, "reverse": reverse, "entropy": EntropyTerm()}

    def select(self, tokens, layout):
        gap = layout.sums((tokens.entropy - tokens.teacher.entropy).double()) / layout.response_lengths
        return {"response": torch.sigmoid(gap)[layout.response].to(tokens.entropy.dtype)}

    def coefficients(self, tokens):
        share, mean = torch.exp(-tokens.teacher.entropy), weighted(tokens.selected["response"], tokens) / tokens.length
        return {"forward": share * mean, "reverse": (1 - share) * mean, "entropy": 0.1 * mean}


def blend(batch: truth.Batch, temperature: float = 1.0) -> torch.Tensor:
    """The same of full logits."""
    z_s, z_t = truth.token_logits(batch)
    p, q = (z_t / temperature).log_softmax(-1), (z_s / temperature).log_softmax(-1)
    entropies, total = (truth.entropy(z_s).detach(), truth.entropy(z_t)), 0.0
    w, share = truth.token_weights(batch, z_s), torch.exp(-entropies[1])
    each = w * (share * truth.kl(p, q) + (1 - share) * truth.kl(q, p) + 0.1 * truth.entropy(z_s))
    for r in truth.slices(batch):
        total = total + torch.sigmoid((entropies[0][r] - entropies[1][r]).mean()) * each[r].mean()
    return total / len(batch.responses)


def check(make, formula, dtype=F32, **options) -> None:
    """Loss and gradients of a batch in ``dtype`` within the error rule."""
    batch = fixed(dtype, bias=True)
    out = run(make(), batch, target=batch.target, **options)
    got = [out.loss.detach()[None], *truth.gradients(out.loss, batch.student)]

    def expected(dtype):
        same = batch.to(dtype)
        loss = formula(same)
        return [loss.detach()[None], *truth.gradients(loss, same.student)]

    for g, yardstick, exact in zip(got, expected(dtype), expected(F64), strict=True):
        truth.assert_accurate(g, yardstick, exact, "loss or gradient", dtype, slack=4 if g.numel() < 64 else 1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_two_divergences_at_each_token(backend, dtype, temperature):
    check(lambda: Blend(temperature), lambda batch: blend(batch, temperature), dtype)


def test_two_divergences_with_fp32_logits(backend):
    """Both gradients lie in bf16 over fp32 logits."""
    check(Blend, blend, BF16, logits_dtype=F32)


def test_three_divergences(backend):
    """Twice the same one and once another are three."""

    class Three(kd.GKD):
        terms = {str(i): DivergenceTerm(d) for i, d in enumerate([kd.JSD(0.9), kd.JSD(0.9), kd.JSD(0.1)])}

        def coefficients(self, tokens):
            mean = 1 / tokens.length.to(tokens.entropy.dtype)
            return {"0": mean, "1": mean, "2": 3 * mean}

    check(Three, lambda batch: 2 * truth.gkd(batch, 0.9) + 3 * truth.gkd(batch, 0.1))


def test_chunks_of_two_divergences(backend):
    """The least budgets: pieces of responses, and a statistics pass of both models."""
    batch = fixed(F32, bias=True)

    def outcome(budget):
        out = run(Blend(), batch, target=batch.target, memory_budget=budget)
        return [out.loss.detach()[None], *truth.gradients(out.loss, batch.student)]

    least = smallest_budget(outcome)
    for budget in (least, least + 5000):
        for pieces, whole in zip(outcome(budget), outcome(None), strict=True):
            assert truth.relative(pieces, whole) < 1e-5


def test_a_second_backward(backend):
    batch = fixed(F32)
    loss = run(Blend(), batch).loss
    first, second = (torch.autograd.grad(loss, truth.leaves(batch.student), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) and a.norm() > 0 for a, b in zip(first, second, strict=True))


# ---- groups ----------------------------------------------------------------------------------------------------------


class Mixed(Objective):
    """The teacher's responses by likelihood, the student's own by the reverse KL, an entropy everywhere."""

    terms = {
        "likelihood": CrossEntropyTerm(group="teacher"),
        "reverse": DivergenceTerm(kd.ReverseKL(), group="student"),
        "entropy": EntropyTerm(),
    }

    def coefficients(self, tokens):
        mean = 1 / tokens.length.to(tokens.entropy.dtype)
        return {"likelihood": mean, "reverse": 2 * mean, "entropy": 3 * mean}


def test_terms_of_groups(backend):
    def formula(batch):
        z_s, z_t = truth.token_logits(batch)
        p, q = z_t.log_softmax(-1), z_s.log_softmax(-1)
        index = torch.tensor([i for r in batch.responses for i in r])
        likelihood, entropy = truth.cross_entropy(z_s, batch.target.flatten()[index]), truth.entropy(z_s)
        means = [
            (likelihood[r] if written else 2 * truth.kl(q[r], p[r])).mean() + 3 * entropy[r].mean()
            for r, written in zip(truth.slices(batch), batch.written, strict=True)
        ]
        return torch.stack(means).mean()

    check(Mixed, formula)


def test_a_group_without_tokens(backend):
    batch = fixed(F32)
    batch.from_teacher = torch.zeros(len(batch.mask), dtype=torch.bool)
    out = run(Mixed(), batch, target=batch.target)
    assert out.metrics["likelihood"] == 0 and out.metrics["reverse"] > 0
    assert all(g.norm() > 0 and g.isfinite().all() for g in truth.gradients(out.loss, batch.student))


# ---- a teacher known at K entries ------------------------------------------------------------------------------------


class Beside(Objective):
    """Two divergences, an entropy and a cross-entropy; nothing of the teacher but the divergences."""

    terms = {
        "forward": DivergenceTerm(kd.ForwardKL()),
        "entropy": EntropyTerm(),
        "reverse": DivergenceTerm(kd.ReverseKL()),
        "cross_entropy": CrossEntropyTerm(),
    }
    alone = ("forward", "reverse")

    def coefficients(self, tokens):
        mean = 1 / tokens.length.to(tokens.entropy.dtype)
        return {name: (i + 1) * mean for i, name in enumerate(self.terms)}


class Alone(Beside):
    terms = {name: Beside.terms[name] for name in Beside.alone}


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("make", [Beside, Alone])
def test_terms_beside_stored_entries(backend, make, renormalize):
    """What one divergence makes of the logits is nothing that the other terms see."""
    batch = fixed(F32)
    teacher = stored(truth.dense_logits(truth.to(batch.teacher, F64), 60), 8, renormalize, F32)
    out = make()(batch.student, teacher, batch.mask, target=batch.target)
    exact = truth.to(batch.student, F64)
    z = truth.dense_logits(exact, 60)
    values = {
        "forward": reference_divergence(exact, teacher, kd.ForwardKL(), 1.0).view(batch.mask.shape),
        "entropy": truth.entropy(z),
        "reverse": reference_divergence(exact, teacher, kd.ReverseKL(), 1.0).view(batch.mask.shape),
        "cross_entropy": truth.cross_entropy(z.flatten(0, 1), batch.target.flatten()).view(batch.mask.shape),
    }
    token = sum((i + 1) * values[name] for i, name in enumerate(make.terms))
    expected = torch.stack([row[m].mean() for row, m in zip(token, batch.mask, strict=True) if m.any()]).mean()
    assert truth.relative(out.loss.detach()[None], expected.detach()[None]) < 1e-5
    for g, e in zip(truth.gradients(out.loss, batch.student), truth.gradients(expected, exact), strict=True):
        assert truth.relative(g, e) < 1e-5


def test_a_ranking_needs_all_entries(backend):
    class Ranked(Alone):
        terms = Alone.terms | {"ranking": PlackettLuceTerm(3)}

    batch = fixed(F32)
    teacher = stored(truth.dense_logits(batch.teacher, 60), 8)
    with pytest.raises(TypeError, match=r"teacher: .*TopK"):
        Ranked()(batch.student, teacher, batch.mask)


# ---- a term of one's own -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JeffreysTerm(Term):
    """KL(p || q) + KL(q || p), without a group."""

    temperature: float = 1.0
    needs = Needs(teacher=True)
    divergences = 2

    def evaluated(self, view):
        parts = []
        for divergence in (kd.ForwardKL(), kd.ReverseKL()):
            rows = view.logits_to_use_up()
            parts.append((view.producer.divergence(rows, view.teacher, divergence, self.temperature), rows))

        def add(gradient, c):
            for compared, rows in parts:
                gradient.add_divergence(compared, rows, c)

        return Evaluated(sum(compared.value for compared, _ in parts), add)


class Jeffreys(Objective):
    terms = {"entropy": EntropyTerm(), "jeffreys": JeffreysTerm()}

    def coefficients(self, tokens):
        return dict.fromkeys(self.terms, 1 / tokens.length.to(tokens.entropy.dtype))


class Apart(Jeffreys):
    terms = {"entropy": EntropyTerm(), "a": DivergenceTerm(kd.ForwardKL()), "b": DivergenceTerm(kd.ReverseKL())}


@pytest.mark.parametrize("known", ["all entries", "eight entries"])
def test_a_term_of_two_divergences(backend, known):
    batch = fixed(F32)
    if known == "eight entries":
        batch.teacher = stored(truth.dense_logits(batch.teacher, 60), 8)
    one, two = (run(objective, batch) for objective in (Jeffreys(), Apart()))
    assert truth.relative(one.loss.detach()[None], two.loss.detach()[None]) < 1e-6
    for g, e in zip(truth.gradients(one.loss, batch.student), truth.gradients(two.loss, batch.student), strict=True):
        assert truth.relative(g, e) < 1e-6


def test_a_term_says_how_many_divergences_it_evaluates():
    """Two gradients over the same logits would be one of them."""

    @dataclass(frozen=True)
    class Silent(JeffreysTerm):
        divergences = 1

    class Wrong(Jeffreys):
        terms = {"entropy": EntropyTerm(), "jeffreys": Silent()}

    with pytest.raises(RuntimeError, match="divergences: expected each term to say how many"):
        run(Wrong(), fixed(F32))


# ---- what a program may not say --------------------------------------------------------------------------------------


def test_one_temperature():
    class Two(Alone):
        terms = {"a": DivergenceTerm(kd.ForwardKL(), 2.0), "b": DivergenceTerm(kd.ForwardKL())}

    batch = fixed(F32)
    with pytest.raises(ValueError, match=r"temperature: expected the same .*\[1.0, 2.0\]"):
        run(Two(), batch)


@pytest.mark.parametrize("given", [{"forward"}, {"forward", "reverse", "revrese"}])
def test_coefficients_are_of_the_terms(given):
    class Wrong(Alone):
        def coefficients(self, tokens):
            return dict.fromkeys(given, tokens.entropy)

    batch = fixed(F32)
    with pytest.raises(ValueError, match=r"coefficients: expected one for each of the terms \['forward', 'reverse'\]"):
        run(Wrong(), batch)


@pytest.mark.parametrize("method", ["coefficients", "select"])
@pytest.mark.parametrize(
    ("given", "error", "got"),
    [
        (lambda tokens: {"forward": tokens.entropy[:, None], "reverse": tokens.entropy}, ValueError, r"\[18, 1\]"),
        (lambda tokens: dict.fromkeys(Alone.terms, tokens.entropy[:-1]), ValueError, r"\[17\]"),
        (lambda tokens: dict.fromkeys(Alone.terms, tokens.entropy.mean()), ValueError, r"\[\]"),
        (lambda tokens: dict.fromkeys(Alone.terms, 0.5), ValueError, "0.5"),
        (lambda tokens: tokens.entropy, TypeError, "Tensor"),
    ],
    ids=["column", "too few", "one number", "float", "no dict"],
)
def test_a_number_for_each_token(method, given, error, got):
    wrong = type("Wrong", (Alone,), {"selects": True, method: lambda self, tokens, *layout: given(tokens)})
    with pytest.raises(error, match=rf"{method}: expected .*, got {got}$"):
        run(wrong(), fixed(F32))


@pytest.mark.parametrize(
    ("attributes", "error", "message"),
    [
        ({"terms": {}}, TypeError, "terms: Wrong has none"),
        ({"terms": [EntropyTerm()]}, TypeError, "terms: expected a dict"),
        ({"terms": {"forward": kd.ForwardKL()}}, TypeError, "terms: expected a term .* for 'forward', got Divergence"),
        ({"terms": {"forward": EntropyTerm}}, TypeError, "terms: expected a term .* for 'forward', got <class"),
        ({"terms": {"loss": EntropyTerm()}}, ValueError, "terms: expected other names .*'loss'"),
        ({"reductions": ("prompts",)}, ValueError, "reduction: expected one of prompts, got 'responses'"),
        (
            {"reduction": "prompts", "reductions": ("prompts",)},
            ValueError,
            "reduction: expected another where nobody says who wrote a response, got 'prompts'",
        ),
        ({"reads": Needs(collision=61)}, ValueError, "collision: expected at most the vocabulary's 60 entries, got 61"),
    ],
    ids=str,
)
def test_what_an_objective_says(attributes, error, message):
    batch, wrong = fixed(F32), type("Wrong", (Alone,), attributes)
    with pytest.raises(error, match=message):
        wrong()(batch.student, batch.teacher, batch.mask, target=batch.target)


def test_an_error_in_terms_is_told():
    class Misspelt(Alone):
        @property
        def terms(self):
            return {"forward": DivergenceTerm(kd.JSD(self.betta))}

    batch = fixed(F32)
    for ask in (lambda: run(Misspelt(), batch), lambda: Misspelt().needs_teacher):
        with pytest.raises(AttributeError, match="no attribute 'betta'"):
            ask()
    with pytest.raises(AttributeError, match="no attribute 'gamma'"):
        Misspelt().gamma  # noqa: B018


def test_a_selection_by_teacher_needs_all_entries():
    class Selected(Blend):
        def __init__(self):
            super().__init__()
            self.terms = {"entropy": EntropyTerm()}

    assert Selected().needs_teacher
    batch = fixed(F32)
    with pytest.raises(TypeError, match=r"teacher: expected .*, got NoneType"):
        Selected()(batch.student, None, batch.mask)
    with pytest.raises(TypeError, match=r"teacher: .*TopK.*all entries"):
        Blend()(batch.student, stored(truth.dense_logits(batch.teacher, 60), 8), batch.mask)


def test_groups_are_authors():
    class Wrong(Alone):
        terms = {"forward": DivergenceTerm(kd.ForwardKL(), group="judge")}

    batch = fixed(F32)
    with pytest.raises(ValueError, match=r"forward: expected a term of the group teacher or student, got 'judge'"):
        run(Wrong(), batch)


def test_terms_say_what_they_need():
    assert PlackettLuceTerm(5).needs | CrossEntropyTerm().needs == Needs(
        candidates=5, target=True, teacher=True, all_entries=True
    )
    assert Mixed().needs_target and Mixed().needs_teacher and not kd.SFT().needs_teacher
    with pytest.raises(TypeError, match="divergence: expected one such as"):
        DivergenceTerm(0.9)
    with pytest.raises(ValueError, match="k: expected"):
        PlackettLuceTerm(0)
