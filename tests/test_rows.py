"""Row kernels of every backend against fp64. Axes: C tokens, V vocabulary, K candidates."""

from dataclasses import dataclass

import pytest
import torch
import truth
from truth import assert_accurate

import kdkernels as kd
from kdkernels.kernels import Coefficients, backend_for

INF, NAN = float("inf"), float("nan")
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DTYPES = {F32: "fp32", BF16: "bf16", F16: "fp16"}
FAMILY = [name for name in truth.DIVERGENCES if name not in ("jsd0", "jsd1")]
DISTRIBUTIONS = ["normal", "peaked", "flat", "close", "huge", "masked"]
TRANSFORMS = [(1.0, None), (0.25, None), (1.0, 3.0), (0.5, 30.0)]
MASKED = slice(None, None, 7)  # the entries "masked" sets to -inf


def distribution(name: str, rows: int, entries: int, dtype=F32, seed=0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    s, t = 3 * torch.randn(rows, entries), 3 * torch.randn(rows, entries)
    if name == "peaked":
        s[:, entries // 3] += 25
        t[:, entries // 2] += 25
    elif name == "flat":
        s, t = s / 300, t / 300
    elif name == "close":
        t = s + torch.randn(rows, entries) / 30
    elif name == "huge":
        s, t = s * 3e3, t * 3e3
    elif name == "masked":
        s[:, MASKED] = t[:, MASKED] = -INF
    return s.to(dtype), t.to(dtype)


def z_of(x: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    z = x * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@dataclass
class Weights:
    """Random coefficients of every term; ids hold duplicates."""

    dense: torch.Tensor
    ids: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def random(cls, rows: int, entries: int, seed=1):
        torch.manual_seed(seed)
        ids = torch.randint(0, entries, (rows, 5))
        ids[:, 3], ids[:, 4] = ids[:, 1], entries - 1
        return cls(torch.randn(3, rows) / rows, ids, torch.randn(rows, 5) / rows)

    def loss(self, x_s, x_t, name, temperature, scale=1.0, softcap=None):
        """What ``gradient_`` is the gradient of, in the dtype of x_s. Masked entries take part in nothing."""
        z, z_t = z_of(x_s, scale, softcap), z_of(x_t, scale, softcap)
        seen = ~torch.isinf(x_s[0].detach())
        added = torch.where(torch.isinf(z.gather(-1, self.ids)), 0, self.scatter.to(z.dtype) * z.gather(-1, self.ids))
        z, z_t = z[:, seen], z_t[:, seen]
        c_divergence, c_entropy, c_softmax = self.dense.to(z.dtype)
        per_token = c_entropy * truth.entropy(z) + c_softmax * z.logsumexp(-1) + added.sum(-1)
        return (per_token + c_divergence * truth.divergence(z, z_t, name, temperature)).sum()


def dense_gradient(weights: Weights, x_s, x_t, dtype, *options) -> torch.Tensor:
    """By autograd, computed in ``dtype``, with respect to logits of their own dtype."""
    x = x_s.detach().to(torch.promote_types(dtype, x_s.dtype) if dtype == F64 else x_s.dtype).requires_grad_()
    return torch.autograd.grad(weights.loss(x.to(dtype), x_t.to(dtype), *options), x)[0]


def engine_gradient(weights: Weights, x_s, x_t, name, temperature, scale=1.0, softcap=None, out_dtype=None):
    """Value and gradient of the backend in force; the gradient lies over (a copy of) the student's logits."""
    backend, divergence = backend_for(x_s.device, x_s.dtype), truth.DIVERGENCES[name][0]
    buffer = x_s.clone()
    s = backend.statistics(buffer, scale, softcap, temperature, 1, None)
    t = backend.statistics(x_t, scale, softcap, temperature, 1, None)
    value, sums = backend.divergence(s, t, divergence, temperature)
    out = buffer.view(out_dtype or buffer.dtype)[:, : buffer.shape[1]]
    ids = weights.ids
    if torch.isinf(x_s).any():  # what is added at a masked entry is not this test's matter
        ids = weights.ids.masked_fill(torch.isinf(x_s.gather(-1, weights.ids)), 1)
    scatter = torch.where(ids == weights.ids, weights.scatter, 0)
    backend.gradient_(s, t, divergence, temperature, sums, Coefficients(weights.dense, ids, scatter), out)
    return value, out


@pytest.mark.parametrize("make", [kd.SkewKL, kd.SkewReverseKL, kd.JSD])
@pytest.mark.parametrize("share", [1e-3, 1e-6, 1e-9])
def test_mixtures_close_to_an_end(backend, make, share):
    """Next to a KL, the share decides over the entries that only one model has; log(share) must not come from 1 - 1."""
    s, t = distribution("peaked", 7, 2047)
    if make is kd.JSD:  # of the size of the share, so of its own rounding
        for beta in (share, 1 - share):
            assert kd.divergence(kd.Logits(s), kd.Logits(t), kd.JSD(beta)).isfinite().all()
        return
    x = s.clone().requires_grad_()
    value = kd.divergence(kd.Logits(x), kd.Logits(t), make(share))
    results = [(value.detach(), *torch.autograd.grad(value.sum(), x))]
    for dtype in (F32, F64):
        z = s.to(dtype), t.to(dtype), make(share)
        results.append((kd.reference.divergence(*z), kd.reference.divergence_gradient(*z)))
    for what, *each in zip(("value", "gradient"), *results, strict=True):
        assert_accurate(*each, what)


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_statistics(backend, name, transform, temperature, dtype):
    scale, softcap = transform
    x, _ = distribution(name, 7, 2047, dtype)
    rows = backend_for(x.device, dtype).statistics(x, scale, softcap, temperature, 3, None)
    seen = ~torch.isinf(x[0])

    def expected(dtype):
        z = z_of(x.to(dtype), scale, softcap)
        z = z if softcap else z[:, seen]
        top = z.max(-1).values
        shifted = z - top[:, None]
        tempered = (shifted / temperature).logsumexp(-1)
        return {"max": top, "log_sum": shifted.logsumexp(-1), "entropy": truth.entropy(z), "tempered": tempered}

    exact, eager = expected(F64), expected(F32)
    got = {"max": rows.max, "log_sum": rows.log_sum, "entropy": rows.entropy, "tempered": rows.stats[:, 3]}
    for key, value in got.items():
        assert value.dtype == F32
        worst = (value - exact[key]).abs().max()
        if key in ("log_sum", "tempered") and worst < 1e-6:
            continue  # an absolute error of log q is a relative one of q
        if worst < 1e-15:
            continue  # with logits of 1e4 an entropy is 1e-20: below what the formula resolves in fp64
        assert_accurate(value, eager[key], exact[key], key)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize("entries", [1, 2, 15, 16, 17, 97, 1023, 1024, 1025, 3001])
@pytest.mark.parametrize("values", ["random", "ties", "equal", "ascending", "descending", "masked"])
def test_top_k_is_exact(backend, entries, values, dtype):
    """The order of a stable descending sort: ties to the smaller index; gathered logits are the logits."""
    torch.manual_seed(entries)
    x = {
        "random": torch.randn(4, entries),
        "ties": torch.randint(0, 5, (4, entries)).float(),
        "equal": torch.full((4, entries), 1.5),
        "ascending": torch.arange(4 * entries).view(4, entries).float(),
        "descending": -torch.arange(4 * entries).view(4, entries).float(),
        "masked": torch.randn(4, entries).masked_fill(torch.rand(4, entries) < 0.5, -INF),
    }[values].to(dtype)
    if values == "masked":
        x[:, 0] = 0.0
    gather = torch.randint(0, entries, (4, 3))
    for k in {1, min(10, entries), min(entries, 300)}:
        rows = backend_for(x.device, dtype).statistics(x, 1.0, None, 1.0, k, gather)
        expected = x.float().sort(dim=-1, descending=True, stable=True)
        assert torch.equal(rows.top_indices, expected.indices[:, :k])
        assert torch.equal(rows.top_values, expected.values[:, :k])
        assert torch.equal(rows.argmax, expected.indices[:, 0])
        assert torch.equal(rows.gathered, x.float().gather(-1, gather))


def test_top_k_of_transformed_logits(backend):
    """A soft-cap makes near-ties: no entry left out may lie above one taken by more than rounding."""
    x, _ = distribution("normal", 5, 1500)
    rows = backend_for(x.device, F32).statistics(x, 2.0, 5.0, 1.0, 20, None)
    z = z_of(x.double(), 2.0, 5.0)
    chosen = torch.zeros_like(z, dtype=torch.bool).scatter(-1, rows.top_indices, True)
    assert (chosen.sum(-1) == 20).all()
    assert (z.masked_fill(~chosen, INF).min(-1).values >= z.masked_fill(chosen, -INF).max(-1).values - 2e-6).all()
    assert (rows.top_values.diff(dim=-1) <= 0).all()
    torch.testing.assert_close(rows.top_values.double(), z.gather(-1, rows.top_indices), rtol=1e-6, atol=0)


def test_large_logits_keep_their_entropy(backend):
    """A single rounded lse = max + log-sum loses the entropy at |z| ~ 1e4."""
    x = torch.tensor([[10000.0, 9999.0, 9998.5, -10000.0], [-10000.0, -10001.0, -9999.0, -10002.0]])
    rows = backend_for(x.device, F32).statistics(x, 1.0, None, 1.0, 1, None)
    torch.testing.assert_close(rows.entropy.double(), truth.entropy(x.double()), rtol=1e-6, atol=0)


def vanishes(x: torch.Tensor, backend: str) -> bool:
    """Exactly 0; for the eager backend, which computes as the formulas read, up to rounding."""
    return bool((x == 0).all()) if backend != "eager" else x.abs().max() < 1e-6


# ---- divergence and gradient -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("shape", DISTRIBUTIONS)
def test_divergence_and_gradient(backend, shape, name, temperature, dtype):
    x_s, x_t = distribution(shape, 8, 1500, dtype)
    check_gradient(x_s, x_t, name, temperature)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_scale_and_softcap(backend, name, transform):
    x_s, x_t = distribution("normal", 8, 1500)
    check_gradient(x_s, x_t, name, 1.0, *transform)


@pytest.mark.parametrize("entries", [2, 15, 97, 1023, 1024, 1025, 2048])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_sizes(backend, entries, dtype):
    x_s, x_t = distribution("normal", 5, entries, dtype)
    check_gradient(x_s, x_t, "skl", 1.0)


def test_a_real_vocabulary(backend):
    x_s, x_t = distribution("normal", 2, 151936)
    check_gradient(x_s, x_t, "jsd.9", 1.0)


def check_gradient(x_s, x_t, name, temperature, scale=1.0, softcap=None):
    weights, options = Weights.random(*x_s.shape), (name, temperature, scale, softcap)
    value, got = engine_gradient(weights, x_s, x_t, *options)
    exact = dense_gradient(weights, x_s, x_t, F64, *options)
    eager = dense_gradient(weights, x_s, x_t, F32, *options)
    # fp32 arithmetic and one rounding: also where the logits are bf16, the floor is that of fp32
    assert_accurate(got, eager, exact, "gradient", F32)

    def values(dtype):
        seen = ~torch.isinf(x_s[0])
        z_s, z_t = (z_of(x.to(dtype), scale, softcap)[:, seen] for x in (x_s, x_t))
        return truth.divergence(z_s, z_t, name, temperature)

    assert_accurate(value, values(F32), values(F64), "value")


def test_one_entry(backend):
    """V = 1: nothing to choose, everything 0."""
    x_s, x_t = torch.tensor([[3.0], [-2.0]]), torch.tensor([[0.5], [7.0]])
    weights = Weights(torch.ones(3, 2), torch.zeros(2, 1, dtype=torch.int64), -torch.ones(2, 1))
    for name in FAMILY:
        value, gradient = engine_gradient(weights, x_s, x_t, name, 0.7)
        assert vanishes(value, backend) and vanishes(gradient, backend)
    rows = backend_for(x_s.device, F32).statistics(x_s, 1.0, None, 1.0, 1, None)
    assert rows.entropy.tolist() == rows.log_sum.tolist() == [0, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", FAMILY)
def test_identical_logits_cancel_exactly(backend, name, temperature):
    x, _ = distribution("normal", 6, 1500)
    x[:, 5] = -INF
    weights = Weights.random(6, 1500)
    weights.dense[1:], weights.scatter[:] = 0, 0
    value, gradient = engine_gradient(weights, x, x.clone(), name, temperature)
    assert vanishes(value, backend) and vanishes(gradient, backend)


@pytest.mark.parametrize("name", FAMILY)
def test_never_negative(backend, name):
    for seed in range(5):
        for noise in (1e-7, 1e-5, 1e-3):
            x, _ = distribution("normal", 16, 1200, seed=seed)
            rows = backend_for(x.device, F32)
            other = x + noise * torch.randn_like(x)
            s, t = (rows.statistics(each, 1.0, None, 1.0, 1, None) for each in (x, other))
            assert rows.divergence(s, t, truth.DIVERGENCES[name][0], 1.0)[0].min() > -4e-6


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5])
def test_jsd_is_symmetric_under_exchange(backend, beta):
    x, y = distribution("normal", 6, 1500)
    rows = backend_for(x.device, F32)
    s, t = (rows.statistics(each, 1.0, None, 1.0, 1, None) for each in (x, y))
    there, back = rows.divergence(s, t, kd.JSD(beta), 1.0)[0], rows.divergence(t, s, kd.JSD(1 - beta), 1.0)[0]
    torch.testing.assert_close(there, back, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["jsd.1", "jsd.9", "skl", "srkl"])
def test_entries_that_one_model_masks(backend, name):
    """Interior mixtures are finite there, with the reference's numbers."""
    x_s, x_t = distribution("normal", 6, 300)
    x_s[:, 3], x_t[:, 4], x_s[:, 9], x_t[:, 9] = -INF, -INF, -INF, -INF
    weights = Weights.random(6, 300)
    weights.dense[1:], weights.scatter[:] = 0, 0
    value, gradient = engine_gradient(weights, x_s, x_t, name, 1.0)
    divergence = truth.DIVERGENCES[name][0]
    expected = kd.reference.divergence(x_s.double(), x_t.double(), divergence)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    expected = weights.dense[0, :, None] * kd.reference.divergence_gradient(x_s.double(), x_t.double(), divergence)
    assert truth.relative(gradient, expected) < 1e-5
    assert (gradient[:, [3, 9]] == 0).all()


def divergence_gradient(x_s, x_t, name, temperature=1.0):
    """Of the divergence alone: the backend's, eager PyTorch's in fp32, the truth."""
    weights = Weights.random(*x_s.shape)
    weights.dense[1:], weights.scatter[:] = 0, 0
    eager, exact = (dense_gradient(weights, x_s, x_t, dtype, name, temperature) for dtype in (F32, F64))
    return engine_gradient(weights, x_s, x_t, name, temperature)[1], eager, exact


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", ["normal", "peaked", "masked"])
def test_a_skewed_kl_where_the_models_hardly_overlap(backend, shape, temperature):
    """There the gradient is a small difference of large means unless it is written otherwise."""
    x_s, x_t = distribution(shape, 8, 1500)
    assert_accurate(*divergence_gradient(x_s, x_t, "skl", temperature), "gradient", slack=2)


def test_nothing_moves_an_entry_that_the_student_masks(backend):
    """Though the teacher gives it probability, so that the forward KL is infinite."""
    x_s, x_t = distribution("normal", 6, 300)
    x_s[::2, 7] = -INF
    weights = Weights(torch.ones(3, 6), torch.zeros(6, 0, dtype=torch.int64), torch.zeros(6, 0))
    weights.dense[1:] = 0
    value, got = engine_gradient(weights, x_s, x_t, "forward", 1.0)
    assert value.isinf().tolist() == [True, False] * 3
    expected = kd.reference.divergence_gradient(x_s.double(), x_t.double(), kd.ForwardKL())
    assert truth.relative(got, expected) < 1e-6 and (got[::2, 7] == 0).all() and (got[1::2, 7] != 0).all()


def test_a_row_without_entries_is_nothing(backend):
    x, _ = distribution("normal", 3, 300)
    x[1] = -INF
    stats = backend_for(x.device, F32).statistics(x, 1.0, None, 0.7, 1, None)
    assert stats.entropy.isnan().tolist() == stats.log_sum.isnan().tolist() == [False, True, False]
    assert stats.max.isnan().tolist() == [False, True, False]


def test_a_kl_that_is_infinite_says_so(backend):
    x_s, x_t = distribution("normal", 2, 300)
    x_t[0, 4] = x_s[1, 4] = -INF
    rows = backend_for(x_s.device, F32)
    s, t = (rows.statistics(each, 1.0, None, 1.0, 1, None) for each in (x_s, x_t))
    forward, reverse = (rows.divergence(s, t, each, 1.0)[0].tolist() for each in (kd.ForwardKL(), kd.ReverseKL()))
    assert reverse[0] == INF and 0 < reverse[1] < INF
    assert forward[1] == INF and 0 < forward[0] < INF


# ---- memory and bad numbers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16], ids=DTYPES.get)
@pytest.mark.parametrize("entries", [1, 97, 1023, 2049])
def test_narrow_gradient_over_fp32_logits(backend, entries, dtype):
    """The narrow gradient in place is bitwise the wide one, rounded."""
    x_s, x_t = distribution("normal", 5, entries)
    weights = Weights.random(5, entries)
    _, wide = engine_gradient(weights, x_s, x_t, "jsd.9", 1.0)
    _, narrow = engine_gradient(weights, x_s, x_t, "jsd.9", 1.0, out_dtype=dtype)
    assert narrow.dtype == dtype and torch.equal(narrow, wide.to(dtype))
    assert entries == 1 or wide.norm() > 0


@pytest.mark.parametrize("dtype", [BF16, F16], ids=DTYPES.get)
def test_rounding_is_torchs(backend, dtype):
    """To nearest, ties to even, with infinities, NaN and subnormal numbers."""
    info = torch.finfo(dtype)
    ulp, tiny = info.eps, info.smallest_normal * info.eps
    values = [1 + ulp / 2, 1 + 3 * ulp / 2, -1 - ulp / 2, 1 + ulp / 2 + 2e-7, INF, -INF, NAN, 0.0, -0.0]
    values += [info.max, -info.max * (1 + ulp / 5), info.max * (1 + ulp / 4), 3e38, info.tiny * 0.99]
    values += [tiny, 1.5 * tiny, -2.5 * tiny, tiny / 2, tiny * 0.51] if dtype == F16 else [1e-39]
    x, scatter = torch.zeros(1, len(values)), torch.tensor([values])
    out = x.view(dtype)[:, : len(values)]
    rows = backend_for(x.device, F32)
    s = rows.statistics(x, 1.0, None, 1.0, 1, None)
    coefficients = Coefficients(torch.zeros(3, 1), torch.arange(len(values))[None], scatter)
    rows.gradient_(s, None, None, 1.0, None, coefficients, out)
    torch.testing.assert_close(out, scatter.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
def test_rows_with_room_between_them(backend, dtype):
    """Logits may be columns of a wider buffer; what lies beside them is neither read nor written."""
    x_s, x_t = distribution("normal", 5, 1023, dtype)
    weights = Weights.random(5, 1023)
    value, gradient = engine_gradient(weights, x_s, x_t, "jsd.9", 0.7)
    rows, divergence = backend_for(x_s.device, dtype), kd.JSD(0.9)
    wide_s, wide_t = (torch.full((5, 1100), NAN, dtype=dtype) for _ in range(2))
    wide_s[:, :1023], wide_t[:, :1023] = x_s, x_t
    view = wide_s[:, :1023]
    s, t = (rows.statistics(each[:, :1023], 1.0, None, 0.7, 1, None) for each in (wide_s, wide_t))
    got, sums = rows.divergence(s, t, divergence, 0.7)
    rows.gradient_(s, t, divergence, 0.7, sums, Coefficients(weights.dense, weights.ids, weights.scatter), view)
    assert torch.equal(got, value) and torch.equal(view, gradient)
    assert wide_s[:, 1023:].isnan().all()


@pytest.mark.parametrize("bad", [NAN, -NAN, "payload", INF], ids=["nan", "-nan", "all bits set", "inf"])
@pytest.mark.parametrize("entry", [0, 21, 1024, 1499], ids=lambda w: f"entry{w}")
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_bad_row_is_seen_and_stays_alone(backend, who, entry, bad):
    x_s, x_t = distribution("normal", 3, 1500)
    weights = Weights.random(3, 1500)
    weights.ids[1], weights.ids[1, 0] = 7, 8
    good = {name: engine_gradient(weights, x_s, x_t, name, 1.0) for name in FAMILY}
    spoilt = x_s if who == "student" else x_t
    if bad == "payload":
        spoilt.view(torch.int32)[1, entry] = -1
    else:
        spoilt[1, entry] = bad
    rows = backend_for(x_s.device, F32).statistics(spoilt.clone(), 1.0, None, 1.0, 3, None)
    assert not rows.entropy[1].isfinite()
    for name, (value, gradient) in good.items():
        bad_value, bad_gradient = engine_gradient(weights, x_s, x_t, name, 1.0)
        assert not bad_value[1].isfinite(), name
        assert not bad_gradient[1].isfinite().any(), name
        assert torch.equal(bad_value[[0, 2]], value[[0, 2]]), name
        assert torch.equal(bad_gradient[[0, 2]], gradient[[0, 2]]), name
