"""What is differentiated, when, how often, and which matrix products that takes."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import truth
from batches import OBJECTIVES, fixed, loss_of, run
from products import Products
from torch.utils.checkpoint import checkpoint

import kdkernels as kd
from kdkernels.compute import gemm
from kdkernels.engine import autograd, operators
from kdkernels.kernels import registry
from kdkernels.objectives import Needs

N, HS, HT, V = 18, 8, 12, 60  # of fixed(): response tokens of 60 positions, hidden sizes, vocabulary


def frozen(batch: truth.Batch, *names: str) -> truth.Batch:
    tensors = {name: getattr(batch.student, name).detach() for name in names}
    return replace(batch, student=replace(batch.student, **tensors))


@pytest.mark.parametrize("make", OBJECTIVES)
def test_only_response_tokens_are_multiplied_by_the_heads(backend, make):
    batch = fixed()
    with Products() as products:
        loss_of(make, batch).backward()
    assert products.between(N, HS, V) == 3  # logits, d_hidden, d_weight
    teacher = [rows for rows, *rest in products.shapes if rest == [HT, V]]  # one, or one per author
    assert sum(teacher) == (0 if make is kd.SFT else N) and len(teacher) <= 2
    assert len(products.shapes) == 3 + len(teacher)


@pytest.mark.parametrize("make", OBJECTIVES)
def test_a_frozen_head_costs_no_weight_gradient(backend, make, monkeypatch):
    batch = fixed()
    expected = truth.gradients(loss_of(make, batch), batch.student)

    def forbidden(*_):
        raise AssertionError("no weight gradient was asked for")

    monkeypatch.setattr(gemm, "WeightGradient", forbidden)
    batch = frozen(batch, "weight")
    with Products() as products:
        loss_of(make, batch).backward()
    assert products.between(N, HS, V) == 2
    assert torch.equal(batch.student.hidden.grad, expected[0])


@pytest.mark.parametrize("make", OBJECTIVES)
def test_a_detached_trunk_costs_no_hidden_gradient(backend, make):
    batch = fixed(bias=True)
    expected = truth.gradients(loss_of(make, batch), batch.student)
    batch = frozen(batch, "hidden")
    with Products() as products:
        got = truth.gradients(loss_of(make, batch), batch.student)
    assert products.between(N, HS, V) == 2
    assert all(torch.equal(g, e) for g, e in zip(got, expected[1:], strict=True))


def test_a_bias_alone(backend):
    batch = fixed(bias=True)
    expected = truth.gradients(loss_of(kd.GKD, batch), batch.student)[2]
    batch = frozen(batch, "hidden", "weight")
    with Products() as products:
        (got,) = truth.gradients(loss_of(kd.GKD, batch), batch.student)
    assert products.between(N, HS, V) == 1
    assert torch.equal(got, expected)


@pytest.mark.parametrize("make", OBJECTIVES)
def test_no_grad_does_no_gradient_work(backend, make, monkeypatch):
    batch = fixed()
    expected = loss_of(make, batch)
    kernels = registry.load(backend)[0]

    def forbidden(*_):
        raise AssertionError("no gradient was asked for")

    monkeypatch.setattr(kernels, "gradient_", forbidden)
    with torch.no_grad(), Products() as products:
        loss = loss_of(make, batch)
    assert not loss.requires_grad and torch.equal(loss, expected.detach())
    assert products.between(N, HS, V) == 1
    nothing_to_train = frozen(batch, "hidden", "weight")
    loss = loss_of(make, nothing_to_train)
    assert not loss.requires_grad and torch.equal(loss, expected.detach())


@pytest.mark.parametrize("make", OBJECTIVES)
def test_a_second_backward_gives_the_same(backend, make):
    batch = fixed(bias=True)
    loss = loss_of(make, batch)
    first = torch.autograd.grad(loss, truth.leaves(batch.student), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(5 * loss, truth.leaves(batch.student))
    for a, b, kept_a in zip(first, second, kept, strict=True):
        assert torch.equal(a, kept_a), "the buffers handed out belong to the caller"
        torch.testing.assert_close(b, 5 * a, rtol=1e-5, atol=1e-8)
        assert a.norm() > 0


@pytest.mark.parametrize("make", OBJECTIVES)
def test_a_second_backward_is_the_forwards_whatever_changed(backend, make):
    """Schedules change an objective's options between steps; the graph of an earlier step is still that step's."""
    batch, objective = fixed(), make()
    target = {"target": batch.target} if objective.needs_target else {}
    loss = run(objective, batch, **target).loss
    first = torch.autograd.grad(loss, truth.leaves(batch.student), retain_graph=True)
    objective.beta, objective.temperature, objective.alpha, objective.k = 0.1, 3.0, 0.5, 2
    objective.coefficients, objective.reads, objective.selects = None, Needs(collision=9), False
    second = torch.autograd.grad(loss, truth.leaves(batch.student))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gradients_accumulate(backend):
    batches = [fixed(), fixed()]
    batches[1].student = replace(batches[1].student, weight=batches[0].student.weight)
    batches[1].target = batches[0].target.flip(0)
    weight = batches[0].student.weight
    expected = torch.zeros_like(weight)
    for batch in batches:
        expected += torch.autograd.grad(loss_of(kd.SFT, batch), weight)[0]
    for batch in batches:
        loss_of(kd.SFT, batch).backward()
    torch.testing.assert_close(weight.grad, expected)


def test_one_loss_used_twice_and_scaled(backend):
    batch = fixed()
    expected = truth.gradients(loss_of(kd.GKD, batch), batch.student)
    loss = loss_of(kd.GKD, batch)
    for g, e in zip(truth.gradients(3 * loss - loss / 2, batch.student), expected, strict=True):
        torch.testing.assert_close(g, 2.5 * e, rtol=1e-5, atol=1e-8)


def test_gradients_flow_through_computed_weights(backend):
    """A low-rank update of the head gets its gradient."""
    batch = fixed()
    expected = truth.gradients(loss_of(kd.GKD, batch), batch.student)[1]
    up, down = torch.randn(V, 2, requires_grad=True), torch.randn(2, HS)
    base = batch.student.weight.detach()
    batch.student = replace(batch.student, weight=base + (up - up.detach()) @ down)
    loss_of(kd.GKD, batch).backward()
    torch.testing.assert_close(up.grad, expected @ down.t())


def test_changing_an_input_before_backward_is_an_error(backend):
    batch = fixed()
    loss = loss_of(kd.GKD, batch)
    with torch.no_grad():
        batch.student.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["hidden", "weight"])
def test_changing_the_teacher_before_backward_is_an_error(backend, name):
    batch = fixed()
    value = kd.divergence(batch.student, batch.teacher, kd.JSD(0.9)).sum()
    with torch.no_grad():
        getattr(batch.teacher, name).mul_(3.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_there_is_no_second_derivative(backend):
    """A gradient penalty would silently be a constant: refused when the graph of the gradient is asked for."""
    batch = fixed()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss_of(kd.GKD, batch), batch.student.hidden, create_graph=True)


def test_backward_after_grad_mode_changed(backend):
    """What is needed is decided in the forward, where grad mode is visible."""
    batch = fixed()
    expected = truth.gradients(loss_of(kd.GKD, batch), batch.student)
    loss = run(kd.GKD(), batch).loss
    with torch.no_grad():
        got = truth.gradients(loss, batch.student)
    assert all(torch.equal(g, e) for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("make", OBJECTIVES)
def test_autocast_casts_the_operands(backend, make):
    """The numbers of bf16 operands, the gradients in the parameters' own dtype; hidden states may be bf16 already."""
    batch = fixed(bias=True)
    narrow = batch.to(torch.bfloat16)
    expected_loss = loss_of(make, narrow)
    expected = truth.gradients(expected_loss, narrow.student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide_loss = loss_of(make, batch)
        hidden = batch.student.hidden.detach().to(torch.bfloat16).requires_grad_()
        mixed = replace(batch, student=replace(batch.student, hidden=hidden))
        mixed_loss = loss_of(make, mixed)
        statistics = kd.statistics(batch.student, batch.teacher)
    for loss, student in ((wide_loss, batch.student), (mixed_loss, mixed.student)):
        assert torch.equal(loss, expected_loss)
        for leaf, g, e in zip(truth.leaves(student), truth.gradients(loss, student), expected, strict=True):
            assert g.dtype == leaf.dtype and torch.equal(g, e.to(g.dtype))
    assert torch.equal(statistics.entropy, kd.statistics(narrow.student).entropy)
    assert torch.equal(statistics.teacher.entropy, kd.statistics(narrow.teacher).entropy)


def test_backward_inside_autocast_casts_nothing(backend):
    batch = fixed()
    loss = loss_of(kd.GKD, batch)
    first = torch.autograd.grad(loss, truth.leaves(batch.student), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        second = torch.autograd.grad(loss, truth.leaves(batch.student))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast_leaves_fp64_alone():
    """As PyTorch's does: in bf16 the entropy would err by a thousandth. A head of two dtypes is refused."""
    batch = fixed().to(torch.float64)
    expected = loss_of(kd.GKD, batch)
    d_expected = truth.gradients(expected, batch.student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(kd.GKD, batch)
        entropy = kd.entropy(batch.student)
        with pytest.raises(TypeError, match=r"weight: expected dtype torch\.float64"):
            replace(batch.student, weight=batch.student.weight.float())
    assert torch.equal(loss, expected) and torch.equal(entropy, kd.entropy(batch.student))
    assert all(map(torch.equal, truth.gradients(loss, batch.student), d_expected))


def test_a_second_backward_after_autocast(backend):
    batch = fixed()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(kd.GKD, batch)
    first = torch.autograd.grad(loss, truth.leaves(batch.student), retain_graph=True)
    second = torch.autograd.grad(loss, truth.leaves(batch.student))
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(first, second, strict=True))


# ---- per-token functions ---------------------------------------------------------------------------------------------

PER_TOKEN = {
    "cross_entropy": lambda b: kd.cross_entropy(b.student, b.target),
    "entropy": lambda b: kd.entropy(b.student),
    "divergence": lambda b: kd.divergence(b.student, b.teacher, kd.SkewKL(0.1)),
    "plackett_luce": lambda b: kd.plackett_luce(b.student, b.teacher, k=3),
}


@pytest.mark.parametrize("trained", [(), ("hidden",), ("weight",), ("bias",), ("hidden", "bias"), ("weight", "bias")])
@pytest.mark.parametrize("name", PER_TOKEN)
def test_gradients_of_those_that_require_them(backend, name, trained):
    """The same numbers, and only their products: one for the values, one for the logits again, one for each matrix."""
    batch = fixed(bias=True)
    expected = dict(
        zip(("hidden", "weight", "bias"), truth.gradients(PER_TOKEN[name](batch).sum(), batch.student), strict=True)
    )
    batch = frozen(batch, *(set(expected) - set(trained)))
    with Products() as products:
        value = PER_TOKEN[name](batch)
        assert value.requires_grad == bool(trained)
        got = torch.autograd.grad(value.sum(), truth.leaves(batch.student)) if trained else []
    matrices = len(set(trained) - {"bias"})
    assert products.between(batch.mask.numel(), HS, V) == 1 + bool(trained) + matrices
    for key, g in zip(trained, got, strict=True):
        assert torch.equal(g, expected[key]) and g.norm() > 0


@pytest.mark.parametrize("name", PER_TOKEN)
def test_per_token_values_serve_several_backwards(backend, name):
    batch = fixed(bias=True)
    value = PER_TOKEN[name](batch)
    first = torch.autograd.grad(value.sum(), truth.leaves(batch.student), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad((value * 4).sum(), truth.leaves(batch.student))
    for a, b, kept_a in zip(first, second, kept, strict=True):
        assert torch.equal(a, kept_a) and torch.equal(b, 4 * a) and a.norm() > 0


def test_per_token_gradients_have_no_derivative(backend):
    batch = fixed()
    (gradient,) = torch.autograd.grad(kd.entropy(batch.student).sum(), batch.student.hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("name", PER_TOKEN)
def test_per_token_values_under_no_grad(backend, name, monkeypatch):
    batch = fixed()
    expected = PER_TOKEN[name](batch)
    monkeypatch.setattr(operators, "token_gradients", None)
    with torch.no_grad():
        value = PER_TOKEN[name](batch)
    assert not value.requires_grad and torch.equal(value, expected)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_autocast_casts_the_operands_of_per_token_functions(backend, name):
    batch = fixed(bias=True)
    narrow = batch.to(torch.bfloat16)
    expected = PER_TOKEN[name](narrow)
    gradients = truth.gradients(expected.sum(), narrow.student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = PER_TOKEN[name](batch)
    assert torch.equal(value, expected)
    for g, e in zip(truth.gradients(value.sum(), batch.student), gradients, strict=True):
        assert g.dtype == torch.float32 and torch.equal(g, e.float()) and g.norm() > 0


# ---- checkpointing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "loss",
    [lambda b: run(kd.TSDKD(k=4), b).loss, lambda b: run(kd.SFT(), b, target=b.target).loss]
    + [lambda b, f=f: f(b).square().sum() for f in PER_TOKEN.values()],
    ids=["TSDKD", "SFT", *PER_TOKEN],
)
def test_checkpoint(backend, loss, use_reentrant):
    """The loss of a trunk's hidden states, computed again in the backward."""
    batch = fixed(bias=True)
    trunk = torch.randn(HS, HS, requires_grad=True)
    leaves = [trunk, *truth.leaves(batch.student)]

    def step(trunk, hidden, weight, bias):
        return loss(replace(batch, student=kd.Head(hidden @ trunk, weight, bias)))

    plain = step(*leaves)
    expected = torch.autograd.grad(plain, leaves)
    again = checkpoint(step, *leaves, use_reentrant=use_reentrant)
    again.backward()
    assert torch.equal(again, plain)
    for leaf, e in zip(leaves, expected, strict=True):
        assert torch.equal(leaf.grad, e) and e.norm() > 0


# ---- inference mode --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_of_inference_mode(backend, dtype):
    """Its tensors cannot be saved for a backward, and need not be."""
    batch = fixed(dtype)
    with torch.inference_mode():
        teacher = kd.Head(batch.teacher.hidden.clone(), batch.teacher.weight.clone())
        layout = kd.Layout.from_mask(batch.mask)
    for value in (
        lambda t: kd.divergence(batch.student, t, kd.JSD(0.9)).sum(),
        lambda t: kd.divergence(batch.student, t, kd.JSD(0.9), rows=layout).sum(),
        lambda t: kd.GKD()(batch.student, t, layout).loss,
    ):
        got = truth.gradients(value(teacher), batch.student)
        expected = truth.gradients(value(replace(batch.teacher)), batch.student)
        assert all(torch.equal(g, e) and g.norm() > 0 for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_of_inference_mode(backend, frozen):
    """The trunk's states, or the head; a second backward computes with it again."""
    batch = fixed()
    with torch.inference_mode():
        tensor = getattr(batch.student, frozen).detach().clone()
    usual = replace(batch.student, **{frozen: getattr(batch.student, frozen).detach()})
    student = replace(usual, **{frozen: tensor})
    for value in (
        lambda s: kd.divergence(s, batch.teacher, kd.JSD(0.9)).sum(),
        lambda s: kd.GKD()(s, batch.teacher, batch.mask).loss,
    ):
        loss, (expected,) = value(student), truth.gradients(value(usual), usual)
        for again in (True, False):
            (got,) = torch.autograd.grad(loss, truth.leaves(student), retain_graph=again)
            assert torch.equal(got, expected) and got.norm() > 0


def test_on_a_gpu_a_kernel_sees_whether_there_is_anything_to_scale(monkeypatch):
    """Nothing is read from the device, as a CPU reads it to save the pass."""
    seen, numbers = [], torch.empty(3, 4, device="meta")
    backend = SimpleNamespace(scale_=lambda gradient, factor: seen.append((gradient, factor.shape, factor.dtype)))
    monkeypatch.setattr(autograd, "backend_for", lambda device, dtype: backend)
    autograd.scale_([numbers, None], [1.0, 1.0], torch.empty((), device="meta"))
    assert seen == [(numbers, torch.Size([]), torch.float32)]
    eager, factor = torch.ones(3, dtype=torch.bfloat16), torch.tensor(1.5)
    registry.load("eager")[0].scale_(eager, factor)
    assert eager.dtype == torch.bfloat16 and (eager == 1.5).all()
