"""Random rows on every backend against reference.py in fp64: what must hold whatever the numbers."""

import pytest
import torch
import truth
from backends import BACKENDS, INTERPRETED
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_rows import BF16, DISTRIBUTIONS, F32, F64, Weights, dense_gradient, distribution, engine_gradient, z_of

import kdkernels as kd
from kdkernels import reference
from kdkernels.kernels import backend_for

F16 = torch.float16
UNIT = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]), st.floats(0.001, 0.999))
KINDS = st.one_of(UNIT.map(kd.JSD), UNIT.map(kd.SkewKL), UNIT.map(kd.SkewReverseKL))
VOCABULARY = st.one_of(st.sampled_from([2, 127, 128, 129, 251, 1021, 2047, 2049, 4099]), st.integers(2, 700))
ROWS = st.integers(1, 2) if INTERPRETED else st.integers(1, 9)
DRAWN = settings(
    max_examples=15 if "triton" in BACKENDS else 160,  # an example there is interpreted, or five kernels to compile
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def pairs(draw, dtypes=(F32, F32, BF16, F16)):
    """Logits [C, V] of student and teacher."""
    name, dtype = draw(st.sampled_from(DISTRIBUTIONS)), draw(st.sampled_from(dtypes))
    x_s, x_t = distribution(name, draw(ROWS), draw(VOCABULARY), F32, draw(st.integers(0, 10**6)))
    return x_s.to(dtype), x_t.to(dtype)


def sides(x_s, x_t, temperature):
    rows = backend_for(x_s.device, x_s.dtype)
    return rows, *(rows.statistics(x, 1.0, None, temperature, 1, None) for x in (x_s, x_t))


def slack(exact: torch.Tensor) -> int:
    return 4 if len(exact) < 4 else 1


def close(got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, what: str):
    """The error rule, with room for chance in the values of fewer than 4 rows; what the truth calls finite is finite.

    Entropies and divergences are sums of terms of about 1: an error of 4 ulp of 1 is rounding, however small the sum.
    """
    assert exact.isfinite().all() and got.isfinite().all(), what
    if (got - exact).abs().max() > 4 * torch.finfo(F32).eps:
        truth.assert_accurate(got, eager, exact, what, F32, slack=slack(exact))


@DRAWN
@given(
    x=pairs(),
    k=st.integers(1, 128),
    temperature=st.sampled_from([1.0, 0.7, 3.0]),
    transform=st.sampled_from([(1.0, None), (0.25, None), (0.5, 30.0)]),
)
def test_statistics(backend, x, k, temperature, transform):
    x, (scale, softcap) = x[0], transform
    k = min(k, x.shape[1], 3 if INTERPRETED else 128)
    ids = torch.randint(0, x.shape[1], (len(x), 2))
    rows = backend_for(x.device, x.dtype).statistics(x, scale, softcap, temperature, k, ids)
    z = z_of(x.double(), scale, softcap)
    if softcap is None:  # with one, entries that only rounding tells apart may change places
        assert torch.equal(rows.top_indices, reference.candidates(x.float(), k))
    torch.testing.assert_close(rows.top_values.double(), z.gather(-1, rows.top_indices), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(rows.gathered.double(), z.gather(-1, ids), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(rows.lse.double(), z.logsumexp(-1), rtol=1e-6, atol=1e-6)
    single = z_of(x.float(), scale, softcap)
    close(rows.entropy, reference.entropy(single), reference.entropy(z), "entropy")


@DRAWN
@given(x=pairs(), kind=KINDS, temperature=st.sampled_from([1.0, 0.7, 3.0]))
def test_divergence_and_gradient(backend, x, kind, temperature):
    x_s, x_t = x
    weights = Weights.random(*x_s.shape)
    truth.DIVERGENCES["drawn"] = (kind, lambda p, q: reference.divergence(q, p, kind))
    value, gradient = engine_gradient(weights, x_s, x_t, "drawn", temperature)
    assert (value >= -4e-6).all()
    eager, exact = (reference.divergence(a.to(d), b.to(d), kind, temperature) for d, a, b in ((F32, *x), (F64, *x)))
    close(value, eager, exact, "value")
    if x_s.dtype == F32:
        options = ("drawn", temperature)
        eager, exact = (dense_gradient(weights, x_s, x_t, d, *options) for d in (F32, F64))
        truth.assert_accurate(gradient, eager, exact, "gradient", slack=slack(exact))


@DRAWN
@given(x=pairs(), kind=KINDS, temperature=st.sampled_from([1.0, 0.7]))
def test_identical_logits(backend, x, kind, temperature):
    rows, s, t = sides(x[0], x[0].clone(), temperature)
    value, _ = rows.divergence(s, t, kind, temperature)
    weights = Weights.random(*x[0].shape)
    weights.dense[1:], weights.scatter[:] = 0, 0
    truth.DIVERGENCES["drawn"] = (kind, None)
    _, gradient = engine_gradient(weights, x[0], x[0].clone(), "drawn", temperature)
    bound = 1e-6 if backend == "eager" else 0.0
    assert value.abs().max() <= bound and gradient.abs().max() <= bound


@DRAWN
@given(x=pairs(), beta=UNIT)
def test_jsd_is_symmetric(backend, x, beta):
    rows, s, t = sides(*x, 1.0)
    there, back = rows.divergence(s, t, kd.JSD(beta), 1.0)[0], rows.divergence(t, s, kd.JSD(1 - beta), 1.0)[0]
    torch.testing.assert_close(there, back, rtol=1e-4, atol=1e-6)


@DRAWN
@given(x=pairs(dtypes=(F32,)), kind=KINDS, data=st.data())
def test_rows_do_not_see_each_other(backend, x, kind, data):
    """Bitwise (eager: to rounding), whichever rows go together; a gradient in place is one in a place of its own."""
    x_s, x_t = x
    cut = data.draw(st.integers(0, len(x_s)))
    weights = Weights.random(*x_s.shape)
    truth.DIVERGENCES["drawn"] = (kind, None)
    whole = engine_gradient(weights, x_s, x_t, "drawn", 0.7, out_dtype=F16)
    wide = engine_gradient(weights, x_s, x_t, "drawn", 0.7)[1]
    assert torch.equal(whole[1], wide.to(F16)) or whole[1].isinf().any()
    for part in (slice(0, cut), slice(cut, None)):
        if len(x_s[part]):
            some = Weights(weights.dense[:, part].contiguous(), weights.ids[part], weights.scatter[part])
            value, gradient = engine_gradient(some, x_s[part], x_t[part], "drawn", 0.7, out_dtype=F16)
            if backend == "eager":  # PyTorch's exp rounds otherwise where its vectors end, which rows together move
                torch.testing.assert_close(value, whole[0][part], rtol=1e-5, atol=1e-7)
                torch.testing.assert_close(gradient, whole[1][part], rtol=2e-3, atol=1e-6)
            else:
                assert torch.equal(value, whole[0][part]) and torch.equal(gradient, whole[1][part])


@pytest.fixture(autouse=True)
def _no_name_left():
    yield
    truth.DIVERGENCES.pop("drawn", None)
