"""``rows=``: only the positions asked for are computed; what a Layout or rows= spares the device; modules."""

from dataclasses import replace

import pytest
import torch
import truth
from batches import costs, fixed, run
from products import Products
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels.engine import operators

N, HS, HT, V = 18, 8, 12, 60
FUNCTIONS = {
    "cross_entropy": lambda b, **more: kd.cross_entropy(b.student, b.target, **more),
    "entropy": lambda b, **more: kd.entropy(b.student, **more),
    "divergence": lambda b, **more: kd.divergence(b.student, b.teacher, kd.JSD(0.5), **more),
    "plackett_luce": lambda b, **more: kd.plackett_luce(b.student, b.teacher, k=3, **more),
}
MODULES = {
    "cross_entropy": lambda b: kd.modules.CrossEntropy()(b.student, b.target),
    "entropy": lambda b: kd.modules.Entropy()(b.student),
    "divergence": lambda b: kd.modules.Divergence(kd.JSD(0.5))(b.student, b.teacher),
    "plackett_luce": lambda b: kd.modules.PlackettLuce(k=3)(b.student, b.teacher),
}


def forms(mask: torch.Tensor) -> dict:
    """The same positions as a mask, a layout and in a random order."""
    index = mask.flatten().nonzero()[:, 0]
    return {"mask": mask, "layout": kd.Layout.from_mask(mask), "index": index[torch.randperm(len(index))]}


@pytest.mark.parametrize("form", ["mask", "layout", "index"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_rows(backend, name, form):
    batch, function = fixed(bias=True), FUNCTIONS[name]
    whole = function(batch)
    incoming = torch.randn(whole.shape)
    expected = torch.autograd.grad(whole, truth.leaves(batch.student), incoming * batch.mask)
    with Products() as products:
        value = function(batch, rows=forms(batch.mask)[form])
        got = torch.autograd.grad(value, truth.leaves(batch.student), incoming)
    sides = 2 if name in ("divergence", "plackett_luce") else 1
    assert products.between(N, HS, V) == 4 and len(products.shapes) == 2 + 2 * sides
    assert (value[~batch.mask] == 0).all()
    torch.testing.assert_close(value[batch.mask], whole[batch.mask])
    for g, e in zip(got, expected, strict=True):
        assert e.norm() > 0
        torch.testing.assert_close(g, e)


def test_rows_of_statistics(backend):
    batch = fixed()
    whole = kd.statistics(batch.student, batch.teacher, topk=3, target=batch.target, collision=5)
    with Products() as products:
        some = kd.statistics(batch.student, batch.teacher, 3, batch.target, collision=5, rows=batch.mask)
    assert [shape[0] for shape in products.shapes] == [N, N]
    for side, of_all in ((some, whole), (some.teacher, whole.teacher)):
        for name in ("lse", "entropy", "argmax", "topk_indices", "topk_log_probs", "target_log_prob", "collision"):
            value, expected = getattr(side, name), getattr(of_all, name)
            if expected is None:
                assert value is None and name.startswith("topk") and side is some.teacher
                continue
            assert (value[~batch.mask] == 0).all() and value[batch.mask].double().norm() > 0
            torch.testing.assert_close(value[batch.mask], expected[batch.mask])


def test_rows_and_ignored_targets(backend):
    batch = fixed()
    batch.target[batch.mask.nonzero()[0].tolist()[0], 2] = -100
    with Products() as products:
        value = kd.cross_entropy(batch.student, batch.target, rows=batch.mask)
    assert products.between(N - 1, HS, V) == 1
    assert torch.equal(value == 0, ~batch.mask | (batch.target == -100))


@pytest.mark.parametrize("rows", [torch.zeros(5, 12, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)], ids=str)
def test_no_rows(backend, rows):
    batch = fixed()
    value = kd.entropy(batch.student, rows=rows)
    value.sum().backward()
    assert (value == 0).all() and (batch.student.weight.grad == 0).all() and (batch.student.hidden.grad == 0).all()


def test_statistics_of_nothing(backend):
    batch = fixed()
    student = replace(batch.student, hidden=batch.student.hidden[:0])
    teacher = replace(batch.teacher, hidden=batch.teacher.hidden[:0])
    got = kd.statistics(student, teacher, topk=3, target=batch.target[:0], collision=2)
    assert got.entropy.shape == got.teacher.lse.shape == got.target_log_prob.shape == (0, 12)
    assert got.topk_indices.shape == (0, 12, 3) and got.topk_indices.dtype == torch.int64


@pytest.mark.parametrize("name", FUNCTIONS)
def test_modules_store_options(backend, name):
    batch = fixed()
    assert torch.equal(MODULES[name](batch), FUNCTIONS[name](batch))


# ---- no synchronisation ----------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Fails where a GPU would have to be waited for: a number is read, or a shape depends on data."""

    reading = ("_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "equal", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._overloadpacket.__name__
        if function.namespace == "kdkernels" and name.startswith("token_"):
            with self:
                return getattr(operators, f"_{name}")(*args)
        assert name not in self.reading, f"{name} reads from the device"
        if name in ("index", "index_put", "index_put_"):
            assert all(i is None or i.dtype != torch.bool for i in args[1]), f"{name} with a mask reads from the device"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """What only CPUs look at, because there it costs nothing, is left out."""
    monkeypatch.setattr(operators, "check_range", lambda *_, **__: None)
    monkeypatch.setattr(kd.objectives.base, "check_range", lambda *_, **__: None)


def test_the_watch_sees_a_read():
    with pytest.raises(AssertionError, match="nonzero reads"), Watch():
        kd.Layout.from_mask(torch.ones(2, 2, dtype=torch.bool))
    with pytest.raises(AssertionError, match="_local_scalar_dense reads"), Watch():
        torch.ones(()).item()


@pytest.mark.parametrize("make", [lambda: kd.TSDKD(k=4, opener=0.5), kd.GKD], ids=["TSDKD", "GKD"])
def test_an_objective_with_a_layout_reads_nothing(backend, make, as_on_a_gpu):
    batch = fixed(bias=True, weights=True)
    batch.mask, batch.teacher_mask, objective = kd.Layout.from_mask(batch.mask), None, make()
    with Watch():
        out = run(objective, batch, target=batch.target)
    out.loss.backward()
    assert out.loss > 0 and batch.student.weight.grad.norm() > 0


@pytest.mark.parametrize("make", [lambda: kd.TSDKD(k=4, opener=0.5), kd.GKD], ids=["TSDKD", "GKD"])
@pytest.mark.parametrize("tokens", [None, 6], ids=["one chunk", "chunks"])
def test_a_second_call_with_a_layout_brings_nothing_to_the_device(backend, make, tokens, as_on_a_gpu, monkeypatch):
    """Nor reads from it: so it can be captured in a CUDA graph, which bears no copies of what Python computed."""
    batch = fixed(bias=True)
    batch.mask, batch.teacher_mask, objective = kd.Layout.from_mask(batch.mask), None, make()
    more = {"target": batch.target}
    if tokens:
        constant, student, teacher = costs(lambda n: run(objective, batch, memory_budget=n, **more))
        more["memory_budget"] = constant + tokens * student + teacher
    first = run(objective, batch, **more)
    for name in ("tensor", "as_tensor", "from_numpy"):
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("a tensor is made of numbers of Python's"))
    with Watch():
        second = run(objective, batch, **more)
    second.loss.backward()
    assert torch.equal(first.loss, second.loss) and batch.student.weight.grad.norm() > 0


@pytest.mark.parametrize("name", ["divergence", "entropy", "plackett_luce"])
def test_per_token_functions_with_a_layout_read_nothing(backend, name, as_on_a_gpu):
    batch = fixed(bias=True)
    layout = kd.Layout.from_mask(batch.mask)
    with Watch():
        FUNCTIONS[name](batch, rows=None if name == "entropy" else layout)
