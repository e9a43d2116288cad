"""What only the Triton kernels have: fp16, blocks of a chosen size, ids that are masked instead of refused.

Not collected by itself: test_triton.py runs it, and a choice of test_rows.py, in a process of its own.
"""

import mmap

import pytest
import torch
import truth
from test_rows import BF16, F32, F64, Weights, check_gradient, dense_gradient, distribution, engine_gradient, z_of

from kdkernels.kernels import Coefficients, backend_for

F16 = torch.float16


@pytest.fixture(autouse=True)
def _backend(backend):
    """All tests here run on it."""


def set_blocks(monkeypatch, entries):
    for kernel in ("_STATISTICS", "_DIVERGENCE", "_GRADIENT"):
        monkeypatch.setattr(f"kdkernels.kernels.triton.backend.{kernel}", (entries, 4))


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks a row, with few entries."""
    set_blocks(monkeypatch, 128)


def rows_of(x):
    return backend_for(x.device, x.dtype)


@pytest.mark.parametrize(("name", "entries"), [("jsd.9", 1), ("jsd.9", 129), ("skl", 127), ("skl", 1021)])
def test_a_narrow_gradient_over_wide_logits(small_blocks, name, entries):
    """In place it is bitwise the wide one, rounded (fp16: the interpreter truncates bf16)."""
    x_s, x_t = distribution("normal", 3, entries)
    weights = Weights.random(3, entries)
    _, wide = engine_gradient(weights, x_s, x_t, name, 0.7)
    _, narrow = engine_gradient(weights, x_s, x_t, name, 0.7, out_dtype=F16)
    assert narrow.dtype == F16 and torch.equal(narrow, wide.to(F16))
    assert entries == 1 or wide.norm() > 0
    _, brain = engine_gradient(weights, x_s, x_t, name, 0.7, out_dtype=BF16)
    torch.testing.assert_close(brain.float(), wide, rtol=2**-7, atol=1e-30)


def test_a_hundred_runs_are_bitwise_equal():
    """A warp that overwrote what another had yet to read would show here, on a GPU."""
    x_s, x_t = distribution("normal", *((64, 20011) if torch.cuda.is_available() else (1, 4099)))
    weights = Weights.random(*x_s.shape)
    _, wide = engine_gradient(weights, x_s, x_t, "jsd.9", 1.0)
    for _ in range(100 if torch.cuda.is_available() else 1):
        _, narrow = engine_gradient(weights, x_s, x_t, "jsd.9", 1.0, out_dtype=F16)
        assert torch.equal(narrow, wide.to(F16))


@pytest.mark.parametrize("name", ["forward", "jsd.1", "srkl"])
def test_several_blocks(small_blocks, name):
    """One entry short of three blocks, with every term, temperature, scale and soft-cap."""
    x_s, x_t = distribution("normal", 4, 3 * 128 - 1)
    check_gradient(x_s, x_t, name, 0.7, 0.5, 30.0)


def test_blocks_of_any_size_give_the_same_numbers(monkeypatch):
    x_s, x_t = distribution("normal", 3, 1021)
    weights, results = Weights.random(3, 1021), []
    for block in (128, 256, 1024):
        set_blocks(monkeypatch, block)
        stats = rows_of(x_s).statistics(x_s, 1.0, None, 0.7, 5, None)
        results.append((stats.stats, stats.top_indices, *engine_gradient(weights, x_s, x_t, "jsd.9", 0.7)))
    for other in results[1:]:
        assert torch.equal(other[1], results[0][1])
        for got, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
def test_16_bit_logits(dtype):
    x_s, x_t = distribution("normal", 4, 1021, dtype)
    weights = Weights.random(4, 1021)
    value, gradient = engine_gradient(weights, x_s, x_t, "jsd.9", 0.7)
    exact = dense_gradient(weights, x_s, x_t, F64, "jsd.9", 0.7)
    assert gradient.dtype == dtype
    assert truth.relative(gradient, exact) < torch.finfo(dtype).eps
    assert truth.relative(value, truth.divergence(x_s.double(), x_t.double(), "jsd.9", 0.7)) < 1e-6
    stats = rows_of(x_s).statistics(x_s, 1.0, None, 1.0, 5, None)
    assert truth.relative(stats.entropy, truth.entropy(x_s.double())) < 1e-6
    assert torch.equal(stats.top_values, x_s.float().sort(dim=-1, descending=True, stable=True).values[:, :5])


@pytest.mark.parametrize(("s_cap", "t_cap"), [(10.0, None), (None, 10.0)])
def test_a_softcap_of_one_model_and_16_bit_logits_beside_fp32(small_blocks, s_cap, t_cap):
    x_s, x_t = distribution("normal", 3, 301)
    x_s, divergence = x_s.to(F16), truth.DIVERGENCES["jsd.9"][0]
    s, t = (rows_of(x).statistics(x.clone(), 0.5, cap, 0.7, 1, None) for x, cap in ((x_s, s_cap), (x_t, t_cap)))
    value, sums = rows_of(x_s).divergence(s, t, divergence, 0.7)
    alone = Coefficients(torch.eye(3)[0][:, None].repeat(1, 3), torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, 0))
    rows_of(x_s).gradient_(s, t, divergence, 0.7, sums, alone, s.logits)
    leaf = x_s.double().requires_grad_()
    exact = truth.divergence(z_of(leaf, 0.5, s_cap), z_of(x_t.double(), 0.5, t_cap), "jsd.9", 0.7)
    assert truth.relative(value, exact.detach()) < 1e-6
    assert truth.relative(s.logits, torch.autograd.grad(exact.sum(), leaf)[0]) < torch.finfo(F16).eps


def test_the_reverse_kl_of_a_student_that_is_sure():
    """Its entry's log-ratio of 60 nats cancels to a gradient a millionth as large; each row counts alone."""
    torch.manual_seed(0)
    x_s, x_t = torch.randn(4, 301), torch.randn(4, 301)
    x_s[:, 7] += torch.arange(16.0, 24.0, 2)
    x_t[:, 250] += 60
    alone = Coefficients(torch.eye(3)[0][:, None].repeat(1, 4), torch.zeros(4, 0, dtype=torch.int64), torch.zeros(4, 0))
    for temperature in (1.0, 0.7):
        divergence, buffer = truth.DIVERGENCES["reverse"][0], x_s.clone()
        s, t = (rows_of(x).statistics(x, 1.0, None, temperature, 1, None) for x in (buffer, x_t))
        _, sums = rows_of(x_s).divergence(s, t, divergence, temperature)
        rows_of(x_s).gradient_(s, t, divergence, temperature, sums, alone, buffer)
        leaf = x_s.double().requires_grad_()
        exact = torch.autograd.grad(truth.divergence(leaf, x_t.double(), "reverse", temperature).sum(), leaf)[0]
        for got, row in zip(buffer, exact, strict=True):
            assert truth.relative(got, row) < 1e-5


def test_many_ids_with_duplicates(small_blocks):
    """129 ids (128 candidates and the target), each entry up to ten times: all are added in fp32."""
    x, _ = distribution("normal", 2, 301)
    ids = torch.randint(0, 301, (2, 129)) // 10 * 10
    scatter = torch.randn(2, 129)
    stats = rows_of(x).statistics(x.clone(), 1.0, None, 1.0, 128, ids)
    expected = x.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(stats.top_indices, expected.indices[:, :128])
    assert torch.equal(stats.gathered, x.gather(-1, ids))
    rows_of(x).gradient_(stats, None, None, 1.0, None, Coefficients(torch.zeros(3, 2), ids, scatter), stats.logits)
    exact = torch.zeros(2, 301, dtype=F64).scatter_add(-1, ids, scatter.double())
    assert truth.relative(stats.logits, exact) < 1e-6


def test_ids_outside_the_vocabulary_are_masked(small_blocks):
    """Nothing beside the row is read or written; what was asked for there is NaN."""
    x, _ = distribution("normal", 3, 200)
    wide = torch.full((3, 400), 7.0)
    wide[:, 100:300] = x
    view = wide[:, 100:300]
    ids = torch.tensor([[-1, 5, 200], [-100, 199, 2**40], [0, -(2**40), 299]])
    stats = rows_of(x).statistics(view, 1.0, None, 1.0, 2, ids)
    seen = torch.tensor([[False, True, False], [False, True, False], [True, False, False]])
    assert torch.equal(stats.gathered.isnan(), ~seen)
    assert torch.equal(stats.gathered[seen], torch.stack([x[0, 5], x[1, 199], x[2, 0]]))
    weights = Coefficients(torch.zeros(3, 3), ids, torch.ones(3, 3))
    rows_of(x).gradient_(stats, None, None, 1.0, None, weights, view)
    expected = torch.zeros(3, 200)
    expected[0, 5] = expected[1, 199] = expected[2, 0] = 1
    assert torch.equal(view, expected)
    assert (wide[:, :100] == 7).all() and (wide[:, 300:] == 7).all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="untouched memory costs nothing on a CPU only")
def test_rows_more_than_2_to_the_31_entries_apart():
    stride = 2**31 + 64
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (stride + 64)), dtype=F16)
    far = memory.as_strided((2, 50), (stride, 1))
    near, teacher = distribution("normal", 2, 50, F16)
    far.copy_(near)
    weights = Weights.random(2, 50)
    results = []
    for x in (near.clone(), far):
        s, t = (rows_of(x).statistics(each, 1.0, None, 1.0, 3, None) for each in (x, teacher))
        value, sums = rows_of(x).divergence(s, t, truth.DIVERGENCES["skl"][0], 1.0)
        coefficients = Coefficients(weights.dense, weights.ids, weights.scatter)
        rows_of(x).gradient_(s, t, truth.DIVERGENCES["skl"][0], 1.0, sums, coefficients, x)
        results.append((s.stats, s.top_indices, value, x))
    for expected, got in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert near.norm() > 0 and not torch.equal(near, far)


def test_no_rows():
    x = torch.empty(0, 9)
    stats = rows_of(x).statistics(x, 1.0, None, 1.0, 2, None)
    value, sums = rows_of(x).divergence(stats, stats, truth.DIVERGENCES["skl"][0], 1.0)
    assert stats.top_indices.shape == (0, 2) and value.shape == (0,) and len(sums) == 0


def test_errors_name_the_argument():
    x = torch.zeros(2, 9)
    with pytest.raises(ValueError, match="topk: expected 1 to 9"):
        rows_of(x).statistics(x, 1.0, None, 1.0, 10, None)
    with pytest.raises(ValueError, match="logits: expected a matrix with contiguous rows"):
        rows_of(x).statistics(x.T.contiguous().T, 1.0, None, 1.0, 2, None)
    stats, none = rows_of(x).statistics(x, 1.0, None, 1.0, 2, None), torch.zeros(2, 0)
    with pytest.raises(ValueError, match=r"dense: expected a contiguous tensor, got strides \(1, 3\)"):
        weights = Coefficients(torch.zeros(2, 3).T, none.long(), none)
        rows_of(x).gradient_(stats, None, None, 1.0, None, weights, x)


def test_more_rows_than_one_launch_takes(monkeypatch):
    """The group maxima are for a bounded number of rows; more rows take turns."""
    x, _ = distribution("normal", 5, 60, F32)
    expected = rows_of(x).statistics(x, 1.0, None, 1.0, 2, x[:, :1].argsort())
    monkeypatch.setattr("kdkernels.kernels.triton.backend._LAUNCH_ROWS", 2)
    got = rows_of(x).statistics(x, 1.0, None, 1.0, 2, x[:, :1].argsort())
    assert torch.equal(got.stats, expected.stats) and torch.equal(got.top_values, expected.top_values)
    assert torch.equal(got.gathered, expected.gathered)


def test_tuning_uses_what_was_fastest(monkeypatch):
    """Every size runs, the fastest stays."""
    from kdkernels.kernels.triton import backend as triton
    from kdkernels.kernels.triton import tune as triton_tune

    names, calls = ("_STATISTICS", "_DIVERGENCE", "_GRADIENT"), []
    for name in names:
        monkeypatch.setattr(triton, name, getattr(triton, name))  # restored afterwards

    def timed(run, return_mode):
        run()
        sizes = getattr(triton, names[len(calls) // len(triton_tune.SIZES)])
        calls.append(sizes)
        return 1.0 if sizes == triton_tune.SIZES[2] else 2.0

    monkeypatch.setattr(triton_tune, "do_bench", timed)
    best = triton_tune.tune(300, rows=1, device=torch.empty(0).device)
    assert calls == list(triton_tune.SIZES) * 3
    assert list(best.values()) == [getattr(triton, name) for name in names] == [triton_tune.SIZES[2]] * 3


@pytest.mark.parametrize("count", [1, 4095, 4097, 30011])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["fp32", "fp16"])
def test_a_gradient_is_scaled_in_fp32(monkeypatch, dtype, count):
    """By fewer programs than blocks; fp16 to half an ulp more, because the interpreter truncates what a GPU rounds."""
    monkeypatch.setattr("kdkernels.kernels.triton.scale._PROGRAMS", 3)
    gradient, factor = torch.randn(count).to(dtype), torch.tensor(0.3)
    exact, around = gradient.double() * factor.double(), torch.full((count + 2,), 7.0, dtype=dtype)
    around[1:-1] = gradient
    rows_of(torch.empty(0)).scale_(around[1:-1], factor)
    assert ((around[1:-1].double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 6e-8).all()
    assert around[0] == around[-1] == 7.0


def test_a_gradient_times_one_is_not_touched():
    """A multiplication would make the signalling NaN a quiet one."""
    signalling = 0x7FA00000
    gradient = torch.full((5,), signalling, dtype=torch.int32)
    for factor, same in ((1.0, True), (2.0, False)):
        rows_of(torch.empty(0)).scale_(gradient.view(F32), torch.tensor(factor))
        assert (gradient == signalling).all() == same
    with pytest.raises(ValueError, match="gradient: expected a contiguous tensor"):
        rows_of(torch.empty(0)).scale_(torch.ones(3, 4).t(), torch.tensor(2.0))
