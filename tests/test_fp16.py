"""fp16 operands: small coefficients and small probabilities survive each other; sums over tokens stay in range.

The yardstick is eager PyTorch under fp16 autocast: fp16 logits, everything else in fp32, a loss scale.
"""

from dataclasses import replace

import pytest
import torch
import truth
from batches import fixed, run, smallest_budget

import kdkernels as kd
from kdkernels import reference
from kdkernels.engine import autograd

F16, F64 = torch.float16, torch.float64

# name -> (the objective, its formula of a batch and TSD-KD's selection)
OBJECTIVES = {
    "GKD": (kd.GKD, lambda b, s: truth.gkd(b)),
    "TSDKD": (
        lambda: kd.TSDKD(k=4, indirect_weight=1e-3, direct_weight=0.3, entropy_weight=1e-4),
        lambda b, s: sum(
            truth.tsd_kd(b, s, 0.9, indirect_weight=1e-3, direct_weight=0.3, entropy_weight=1e-4).values()
        ),
    ),
    "SFT": (kd.SFT, lambda b, s: truth.sft(b)),
    "DistiLLM2": (kd.DistiLLM2, lambda b, s: truth.distillm2(b)),
    "VCRD": (
        lambda: kd.VCRD(weighting="uniform", reduction="responses", lambda_student=1e-4, lambda_teacher=1e-3),
        lambda b, s: truth.vcrd(b, means=True, lambda_student=1e-4, lambda_teacher=1e-3),
    ),
}


@pytest.fixture(autouse=True)
def autocast_yardstick(monkeypatch):
    """Dense fp16 logits are widened before a softmax, as autocast does."""
    dense = truth.dense_logits

    def widened(head, vocabulary):
        z = dense(head, vocabulary)
        return z.float() if z.dtype == F16 else z

    monkeypatch.setattr(truth, "dense_logits", widened)


def selection(batch: truth.Batch, k: int) -> truth.Selection:
    """Of the fp16 logits that the engine sees, whose ties go to the smaller id and to the student's rank."""
    with torch.no_grad():
        z_s, z_t = truth.token_logits(batch)
        h = truth.entropy(z_s.double())
    proposed = reference.candidates(z_s, k)
    order = reference.teacher_order(z_t.gather(-1, proposed), z_t.max(-1).values)
    ranked = proposed.gather(-1, order)
    parts = truth.slices(batch)
    chosen = [torch.cat([rule(h[r], 0.1) for r in parts]) for rule in (reference.opener, reference.most_uncertain)]
    return truth.Selection(ranked, *chosen)


def check(name: str, batch: truth.Batch, loss_scale: float, **more) -> None:
    """Gradients after a loss scale within twice eager's error. ``batch`` holds fp16's numbers in fp64."""
    make, formula = OBJECTIVES[name]
    objective, narrow = make(), batch.to(F16)
    more |= {"target": batch.target} if objective.needs_target else {}
    chosen = selection(narrow, 4) if name == "TSDKD" else None
    got = truth.gradients(run(objective, narrow, **more).loss * loss_scale, narrow.student)
    eager = truth.gradients(formula(narrow, chosen) * loss_scale, narrow.student)
    exact = truth.gradients(formula(batch, chosen) * loss_scale, batch.student)
    for g, e, x, what in zip(got, eager, exact, ("dX", "dW", "db"), strict=False):
        assert g.dtype == F16
        truth.assert_accurate(g, e, x, f"{name} {what}")


def of(lengths, vocabulary, spread=2.0, **more) -> truth.Batch:
    sizes = {"vocabulary": vocabulary, "hidden_s": 16, "hidden_t": 24}
    return fixed(F16, lengths, max(lengths), spread=spread, **sizes, **more).to(F64)


def weighted(batch: truth.Batch, *factors: float) -> truth.Batch:
    """A factor for each row, varied by token."""
    weights = torch.tensor(factors, dtype=F64)[:, None] * (0.5 + torch.rand(batch.mask.shape, dtype=F64))
    return replace(batch, weights=weights.float().double())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_small_coefficients_keep_their_gradient(backend, name):
    """Weights of 1e-5 over responses of tens of tokens: every product with a probability is below fp16's least."""
    batch = weighted(of((60, 30, 40, 20), 400, bias=True), *[1e-5] * 4)
    check(name, batch, 2.0**26 if name == "VCRD" else 2.0**24)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_coefficients_that_differ_from_chunk_to_chunk(backend, name):
    """The largest come in the middle: the sums of dW follow them."""
    batch = weighted(of((60, 30, 40, 20), 400, bias=True), 1e-5, 1e-2, 1.0, 1e-6)
    objective, narrow = OBJECTIVES[name][0](), batch.to(F16)
    more = {"target": batch.target} if objective.needs_target else {}
    least = smallest_budget(lambda n: run(objective, narrow, memory_budget=n, **more))
    check(name, batch, 2.0**10, memory_budget=least + 40_000)


def test_a_vocabulary_of_32000(backend):
    """The issue's case: 1 / 512 times a probability of 1 / 32000 was rounded away, dX wrong by .32 and dW by .41."""
    check("GKD", of((512,), 32000), 2.0**16)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "vocabulary"), [(512, 32000), (256, 151936)])
@pytest.mark.parametrize("spread", [0.5, 2.0])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_large_vocabularies(backend, name, spread, length, vocabulary):
    check(name, of((length,), vocabulary, spread), 2.0**28 if name == "VCRD" else 2.0**16)


@pytest.mark.parametrize("teacher", ["TopK", "Logits"])
def test_stored_entries_and_logits(backend, teacher):
    """Each token's gradient of logits has a factor of its own, and so does that of stored entries."""
    batch = of((60, 30), 400)
    narrow = batch.to(F16)
    weights = weighted(batch, 1e-5, 1e-7).weights
    with torch.no_grad():
        z_t = truth.dense_logits(batch.teacher, 400)
        z_s = truth.dense_logits(narrow.student, 400).half()
    if teacher == "TopK":
        top = z_t.log_softmax(-1).topk(20)
        source = kd.TopK(top.indices, top.values)
    else:
        source = kd.Logits(z_t.half())
    leaf = z_s.clone().requires_grad_()
    out = kd.GKD()(kd.Logits(leaf), source, batch.mask, weights=weights)
    (got,) = torch.autograd.grad(out.loss * 2.0**34, leaf)

    def expected(z):
        total = 0.0
        for row, n in enumerate((60, 30)):
            here = slice(2, 2 + n)
            if teacher == "TopK":
                d = reference.topk_divergence(
                    z[row, here], top.indices[row, here], top.values[row, here].to(z.dtype), kd.JSD(0.9)
                )
            else:
                d = reference.divergence(z[row, here], source.logits[row, here].to(z.dtype), kd.JSD(0.9))
            total = total + (weights[row, here] * d).mean() / 2
        return torch.autograd.grad(total * 2.0**34, z)[0]

    eager = expected(z_s.float().requires_grad_()).half()
    exact = expected(z_s.double().requires_grad_())
    for row in range(2):
        truth.assert_accurate(got[row], eager[row], exact[row], f"response {row}")


@pytest.mark.parametrize("name", ["cross_entropy", "divergence", "entropy", "plackett_luce"])
def test_per_token_functions_under_any_weighting(backend, name):
    """Tokens whose incoming gradients lie 2^20 apart."""
    batch = of((60, 30), 400, bias=True)
    narrow = batch.to(F16)
    layout = kd.Layout.from_mask(batch.mask)
    incoming = torch.randn(batch.mask.shape, dtype=F64) * torch.tensor([2.0**-27, 2.0**-7])[:, None]
    k = selection(narrow, 4).ranked
    functions = {
        "cross_entropy": (
            lambda b: kd.cross_entropy(b.student, b.target, rows=layout),
            lambda s, t: truth.cross_entropy(s, batch.target.flatten()[layout.index]),
        ),
        "divergence": (
            lambda b: kd.divergence(b.student, b.teacher, kd.JSD(0.9), 0.5, rows=layout),
            lambda s, t: truth.divergence(s, t, "jsd.9", 0.5),
        ),
        "entropy": (lambda b: kd.entropy(b.student, rows=layout), lambda s, t: truth.entropy(s)),
        "plackett_luce": (
            lambda b: kd.plackett_luce(b.student, b.teacher, 4, rows=layout),
            lambda s, t: truth.plackett_luce(s.gather(-1, k)),
        ),
    }
    function, formula = functions[name]
    loss_scale = 2.0**12
    value = function(narrow)
    got = torch.autograd.grad(value, truth.leaves(narrow.student), (incoming * loss_scale).to(value.dtype))

    def expected(b):
        value = formula(*truth.token_logits(b))
        weight = (incoming * loss_scale).flatten()[layout.index].to(value.dtype)
        return torch.autograd.grad(value, truth.leaves(b.student), weight)

    eager, exact = expected(narrow), expected(batch)
    for g, e, x in zip(got, eager, exact, strict=True):
        truth.assert_accurate(g, e, x, name)
    for row in range(2):  # the small ones on their own: d hidden has a row for each token
        truth.assert_accurate(got[0][row], eager[0][row], exact[0][row], f"{name}, response {row}", slack=2)


@pytest.mark.parametrize("mean", ["objective", "per token"])
def test_a_mean_over_a_thousand_tokens(backend, mean):
    """A mean over 1000 tokens with 3000 entries each: q / 1000 has no fp16 value."""
    batch = fixed(F16, (1000,), longest=1000, vocabulary=3000, spread=0.5)
    batch.target %= 10  # the gradient of all other entries is nothing but q
    exact = batch.to(F64)

    def loss(b):
        if mean == "objective":
            return run(kd.SFT(), b, target=b.target).loss
        return kd.cross_entropy(b.student, b.target, rows=kd.Layout.from_mask(b.mask)).sum() / 1000

    got = truth.gradients(loss(batch), batch.student)
    expected = truth.gradients(truth.sft(exact), exact.student)
    assert all(g.dtype == F16 for g in got)
    assert truth.relative(got[1][10:], expected[1][10:]) < 0.001


@pytest.mark.parametrize("chunks", ["one chunk", "chunks"])
def test_sums_over_tokens_stay_in_range(backend, chunks):
    """4000 tokens push one entry the same way: 120000 before the mean is taken, beyond fp16's largest number."""
    hidden = torch.full((1, 4000, 4), 30.0, dtype=F16, requires_grad=True)
    weight, bias = torch.zeros(50, 4, dtype=F16, requires_grad=True), torch.zeros(50, dtype=F16, requires_grad=True)
    target = torch.full((1, 4000), 7)

    def loss(budget=None):
        student, mask = kd.Head(hidden, weight, bias), torch.ones(1, 4000, dtype=torch.bool)
        return kd.SFT()(student, None, mask, target=target, memory_budget=budget).loss

    loss(smallest_budget(loss) + 200_000 if chunks == "chunks" else None).backward()
    d = torch.full((50,), 1 / 50, dtype=F64)
    d[7] -= 1
    assert truth.relative(weight.grad, (d * 30)[:, None].expand(50, 4)) < 1e-3
    assert truth.relative(bias.grad, d) < 1e-3


@pytest.mark.parametrize("factor", [1e-37, 1e-34, 1e-28, 1e28])
def test_weights_of_any_size_leave_gradients_finite(backend, factor):
    """Sums so small that the power which fp16 holds them best with is beyond fp32's range (1e-34: a bias of NaN)."""
    batch = fixed(F16, bias=True)
    weights = torch.full(batch.mask.shape, factor)
    loss = kd.GKD()(batch.student, batch.teacher, batch.mask, weights=weights).loss
    wide = batch.to(F64)
    exact = truth.gradients(truth.gkd(wide), wide.student) if factor > 1e-30 else None
    for i, got in enumerate(truth.gradients(loss / factor, batch.student)):
        assert got.isfinite().all()
        assert exact is None or truth.relative(got, exact[i]) < 0.02


def test_amp(backend):
    """fp32 weights under fp16 autocast with a GradScaler, over two accumulated batches, one of them differentiated
    twice: the gradients of the sum."""
    batches = [weighted(of((60, 30), 400), 1e-4, 1e-5), weighted(of((20, 50), 400), 1e-5, 1e-3)]
    weight = batches[0].student.weight.detach().float().requires_grad_()
    optimizer, scaler = torch.optim.SGD([weight], 1.0), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    for batch in batches:
        hidden, teacher = batch.student.hidden.detach().float(), truth.to(batch.teacher, torch.float32)
        with torch.autocast("cpu", dtype=F16):
            loss = kd.GKD()(kd.Head(hidden, weight), teacher, batch.mask, weights=batch.weights).loss
        scaler.scale(loss).backward(retain_graph=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)

    def expected(dtype):
        w = weight.detach().to(dtype).requires_grad_()
        total = 0.0
        for batch, times in zip(batches, (1, 2), strict=True):
            b = batch.to(dtype)
            total = total + times * truth.gkd(replace(b, student=replace(b.student, weight=w)))
        return torch.autograd.grad(total * 2.0**20, w)[0] / 2.0**20

    exact = expected(F64)
    assert weight.grad.dtype == torch.float32 and scaler.get_scale() == 2.0**20
    truth.assert_accurate(weight.grad, expected(F16).float(), exact, "dW", F16)


def test_a_token_that_is_not_finite_keeps_to_its_row(backend):
    """One token of NaN, one whose weight is infinite: the other tokens' d hidden is what it is without them."""
    batch = of((20, 10), 400).to(F16)
    weights = torch.full(batch.mask.shape, 1e-5)

    def d_hidden(spoil: bool):
        hidden, w = batch.student.hidden.detach().clone(), weights.clone()
        if spoil:
            hidden[0, 5], w[1, 4] = torch.nan, torch.inf
        hidden.requires_grad_()
        loss = kd.GKD()(kd.Head(hidden, batch.student.weight), batch.teacher, batch.mask, weights=w).loss
        return torch.autograd.grad(loss * 2.0**24, hidden)[0]

    clean, spoiled = d_hidden(False), d_hidden(True)
    kept = batch.mask.clone()
    kept[0, 5] = kept[1, 4] = False
    assert torch.equal(spoiled[kept], clean[kept]) and clean[kept].norm() > 0
    assert not spoiled[0, 5].isfinite().any() and not spoiled[1, 4].isfinite().all()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [F16, torch.bfloat16, torch.float32])
def test_gradients_are_scaled_once(device, dtype):
    """By what the products left and by the incoming gradient, on CPUs and elsewhere (meta stands for a GPU)."""
    incoming = torch.tensor(2.0**-20, device=device)
    each = torch.tensor([[2.0**10], [2.0**-4]], device=device)  # a factor for every row
    for factors, grad, expected in (
        ((1.0, 1.0), 1.0, (1.0, 1.0)),
        ((each, torch.tensor(2.0**18, device=device)), 1.0, (each, 2.0**18)),
        ((each, torch.tensor(2.0**30, device=device)), incoming, (each * incoming, 2.0**10)),
        ((1.0, 1.0), incoming, (incoming, incoming)),
    ):
        gradients = [torch.full((2, 3), 2.0**-10, dtype=dtype, device=device) for _ in range(2)]
        autograd.scale_([*gradients, None], [*factors, 1.0], grad)
        for got, factor in zip(gradients, expected, strict=True):
            wanted = (torch.full((2, 3), 2.0**-10, device=device) * factor).to(dtype)
            assert got.dtype == dtype and (device == "meta" or torch.equal(got, wanted))
