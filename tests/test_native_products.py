"""The products of csrc/gemm.h: every instruction set of this CPU against fp64, of any sizes, strides and dtypes."""

import os
from unittest.mock import patch

import pytest
import torch
import truth
from hypothesis import given, settings
from hypothesis import strategies as st
from instruction_sets import BF16, F16, F32, SETS, matrix, needs_native, products_of

import kdkernels as kd
from kdkernels.compute import gemm

DTYPES = [F32, BF16, F16]
SIZES = st.one_of(st.sampled_from([1, 2, 5, 6, 7, 63, 64, 65, 95, 96, 97, 255, 256, 257]), st.integers(1, 300))


@pytest.fixture(params=SETS)
def instructions(request, monkeypatch):
    """Products of each instruction set in turn."""
    monkeypatch.setenv("KDKERNELS_CPU_ISA", request.param)
    return request.param


@needs_native
@settings(deadline=None, derandomize=True, max_examples=600)
@given(
    m=SIZES,
    n=SIZES,
    k=SIZES,
    pad=st.integers(0, 3),
    transposed=st.tuples(st.booleans(), st.booleans()),
    instructions=st.sampled_from(SETS or [""]),
    dtype=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from(DTYPES),
    adds=st.sampled_from(["nothing", "itself", "a row", "another"]),
    add_dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
    seed=st.integers(0, 9),
)
def test_native_products(m, n, k, pad, transposed, instructions, dtype, out_dtype, adds, add_dtype, threads, seed):
    """out = add + a @ b, of any shape, layout and dtype, on any number of threads; nothing around it is written."""
    torch.manual_seed(seed)
    a, b = matrix(m, k, dtype, pad, transposed[0]), matrix(k, n, dtype, pad, transposed[1])
    around = torch.full((m, n + 5), 7.0, dtype=out_dtype)
    out = around[:, 2 : n + 2].normal_()
    add = {
        "nothing": None,
        "itself": out,
        "a row": matrix(1, n, add_dtype, pad).expand(m, n),
        "another": matrix(m, n, add_dtype, pad),
    }[adds]
    added = 0 if add is None else add.double()
    exact, absolute = a.double() @ b.double() + added, a.double().abs() @ b.double().abs() + abs(added)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with patch.dict(os.environ, KDKERNELS_CPU_ISA=instructions):
            torch.ops.kdkernels.gemm_(a, b, add, out)
    finally:
        torch.set_num_threads(before)
    # fp32 sums of k terms, then one rounding, of small numbers to a multiple of the smallest
    finfo = torch.finfo(out_dtype)
    limit = (k + 2) * torch.finfo(F32).eps * absolute + finfo.eps / 2 * exact.abs() + finfo.smallest_normal * finfo.eps
    assert ((out.double() - exact).abs() <= limit).all()
    around[:, 2 : n + 2] = 7.0
    assert (around == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_products_of_many_rows_and_columns(instructions, dtype):
    a, b, out = (
        torch.randn(300, 200).to(dtype).t(),
        torch.randn(300, 2100).to(dtype),
        torch.full((200, 2100), torch.nan),
    )
    torch.ops.kdkernels.gemm_(a, b, None, out)
    assert truth.relative(out, a.double() @ b.double()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_products_do_not_depend_on_threads_or_on_other_rows(instructions, dtype):
    a, b = torch.randn(200, 700).to(dtype), torch.randn(700, 300).to(dtype)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        for rows in (slice(0, 200), slice(0, 7), slice(0, 1)):
            out = torch.empty(rows.stop, 300)
            torch.ops.kdkernels.gemm_(a[rows], b, None, out)
            results.append(out[0].clone())
    torch.set_num_threads(before)
    assert all(torch.equal(each, results[0]) for each in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_infinity_stay_where_they_are(instructions, dtype):
    a, b = torch.randn(9, 33).to(dtype), torch.randn(33, 70).to(dtype)
    a[2, 32], b[5, 69] = torch.nan, torch.inf
    out = torch.empty(9, 70, dtype=dtype)
    torch.ops.kdkernels.gemm_(a, b, None, out)
    special = torch.zeros(9, 70, dtype=torch.bool)
    special[2], special[:, 69] = True, True
    assert torch.equal(~out.isfinite(), special)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_each_16_bit_number_is_widened_exactly(instructions, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    if instructions == "avx512" and dtype == BF16:  # the units take subnormal numbers as 0
        every = every[(every == 0) | ~(every.abs() < torch.finfo(dtype).smallest_normal)]
    n, one = len(every), torch.ones(1, 1, dtype=dtype)
    beside, below = every.as_strided((n, 1), (1, 1)), every.as_strided((n, 1), (1, n))  # a's rows, and its columns
    for a, b in ((beside, one), (below, one), (one, beside.t()), (one, below.t())):
        out = torch.empty(len(a), b.shape[1])
        torch.ops.kdkernels.gemm_(a, b, None, out)
        assert torch.equal(out.flatten().nan_to_num(7.0), every.float().nan_to_num(7.0))


@pytest.mark.parametrize("written", [BF16, F16])
def test_sums_are_rounded_as_torch_does(instructions, written):
    """To nearest, to infinity beyond the largest, to subnormal numbers below the smallest normal one."""
    sums = torch.cat([torch.randn(4000) * 2.0**e for e in (-40, -26, -20, -14, 0, 15, 16, 17)])
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(F16).float()
    ties = (halves[1:] + halves[:-1]) / 2
    sums = torch.cat([sums, halves, ties, torch.tensor([65519.996, 65520.0, torch.inf, -torch.inf, torch.nan, -0.0])])
    out = torch.empty(1, len(sums), dtype=written)
    for dtype in DTYPES:
        a, b = torch.zeros(1, 1, dtype=dtype), torch.zeros(1, len(sums), dtype=dtype)
        torch.ops.kdkernels.gemm_(a, b, sums[None], out)
        assert torch.equal(out[0].float().nan_to_num(7.0), sums.to(written).float().nan_to_num(7.0)), dtype


@needs_native
@pytest.mark.parametrize(
    ("a", "b", "out", "message"),
    [
        ((4, 3), (2, 5), (4, 5), r"b: expected a CPU matrix \[3, 5\], got shape \[2, 5\]"),
        ((4, 3), (3, 5), (5, 4), r"out: expected a CPU matrix \[4, 5\], got shape \[5, 4\]"),
        ((4, 0), (0, 5), (4, 5), "k > 0"),
    ],
)
def test_wrong_shapes_of_native_products(a, b, out, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.kdkernels.gemm_(torch.ones(a), torch.ones(b), None, torch.ones(out))


@needs_native
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)])
def test_empty_native_products(shape, transposed):
    a, out = matrix(shape[0], 3, F32, 0, transposed), torch.empty(shape)
    torch.ops.kdkernels.gemm_(a, torch.ones(3, shape[1]), None, out)


def test_the_yardstick_counts_what_ran(instructions):
    operations = torch.ops.kdkernels.registers_only(F32, 1000)
    assert operations >= torch.get_num_threads() * 2 * 4 * 1000
    assert torch.ops.kdkernels.registers_only(F32, 3000) == 3 * operations


@needs_native
def test_strides_that_native_products_cannot_have():
    with pytest.raises(RuntimeError, match="a: expected contiguous rows or columns"):
        torch.ops.kdkernels.gemm_(torch.ones(4, 6)[::2, ::2], torch.ones(3, 5), None, torch.ones(2, 5))
    weight = torch.randn(20, 12)[:, ::2]
    head, copied = (kd.Head(torch.ones(2, 6), w.clone() if copy else w) for copy, w in ((0, weight), (1, weight)))
    assert torch.equal(kd.entropy(head), kd.entropy(copied))


def test_eager_has_torchs_products(monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", "eager")
    assert type(products_of(F32)) is gemm.Torch
