"""What kdkernels costs beside the products: sweep 1's extras, a call on tiny inputs, the import, memory."""

import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from cases import QWEN_SMALL, TINY
from gemms import yardstick
from measure import timed

import kdkernels as kd
from kdkernels.compute import gemm, memory
from kdkernels.kernels import backend_for

HERE = Path(__file__).parent


@pytest.fixture
def shape(request):
    return TINY if request.config.getoption("--shapes") == "tiny" else QWEN_SMALL


def environment() -> dict:
    """Sources are compiled once, as for everybody: PYTHONDONTWRITEBYTECODE would have each process do it again."""
    mine = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return mine | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}


def test_sweep_1_with_and_without_top_k(benchmark, device, shape):
    """Statistics with the 10 largest logits minus those with the largest, in shares of a whole JSD of the same rows.

    The entropy is always part of sweep 1: it shares the exponential with the log-sum.
    """
    rows, on_gpu = (256, device == "cuda")
    dtype = torch.float32 if on_gpu else torch.bfloat16
    logits = torch.randn(rows, shape.vocabulary, device=device).to(dtype)
    backend = backend_for(logits.device, dtype)

    def head(width: int, trained: bool) -> kd.Head:
        weight = torch.randn(shape.vocabulary, width, device=device).mul_(width**-0.5).to(torch.bfloat16)
        hidden = torch.randn(1, rows, width, device=device).to(torch.bfloat16)
        return kd.Head(hidden.requires_grad_(trained), weight.requires_grad_(trained))

    student, teacher = head(shape.student, True), head(shape.teacher, False)
    layout = kd.Layout.from_mask(torch.ones(1, rows, dtype=torch.bool))
    steps = {
        "with": lambda: backend.statistics(logits, 1.0, None, 1.0, 10, None),
        "without": lambda: backend.statistics(logits, 1.0, None, 1.0, 1, None),
        "jsd": lambda: kd.GKD()(student, teacher, layout).loss.backward(),
    }
    found = steps["with"]().top_indices[:4]
    assert torch.equal(found, logits[:4].float().sort(descending=True, stable=True).indices[:, :10])
    seconds = {name: [] for name in steps}
    for _ in range(9):
        for name, step in steps.items():
            seconds[name] += timed(device, step)
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    position = rows * shape.vocabulary
    benchmark.extra_info.update(
        {
            "top_k_share_of_jsd": (median["with"] - median["without"]) / median["jsd"],
            "with_ns": median["with"] / position * 1e9,
            "without_ns": median["without"] / position * 1e9,
            "gbs": logits.nbytes / median["with"] / 1e9,
        }
    )
    benchmark.pedantic(steps["with"], rounds=1)


def peak_gflops(dtype: torch.dtype) -> float:
    start = time.perf_counter()
    operations = torch.ops.kdkernels.registers_only(dtype, 2_000_000)
    return operations / (time.perf_counter() - start) / 1e9


@pytest.mark.parametrize("operand", ["bfloat16", "float32"])
@pytest.mark.parametrize("rows", [160, 512])
def test_products(benchmark, device, shape, rows, operand, request):
    """GFLOP/s of each product of a chunk, torch's and those that kdkernels uses; medians of 3 in turns.

    The peak is what multiply-adds on registers alone reach; torch is left out where it crawls.
    """
    if shape is not TINY and time.monotonic() > request.config.deadline:
        pytest.skip("no time left")
    dtype, rows = getattr(torch, operand), 16 if shape is TINY else rows
    where = torch.device(device)
    products = backend_for(where, dtype).products(where, dtype)
    x, w, z, d_w = (
        torch.randn(size, device=device, dtype=dtype)
        for size in (
            (rows, shape.student),
            (shape.vocabulary, shape.student),
            (rows, shape.vocabulary),
            (shape.vocabulary, shape.student),
        )
    )
    logits = torch.empty_like(z)
    pairs = {
        "logits": (lambda: torch.mm(x, w.t(), out=logits), lambda: products.project(x, w, None, logits)),
        "d_hidden": (lambda: torch.mm(z, w), lambda: products.multiply(z, w)),
        "d_weight": (lambda: torch.mm(z.t(), x, out=d_w), lambda: products.add(z.t(), x, d_w, True)),
    }
    work, found, peaks = 2 * rows * shape.vocabulary * shape.student, benchmark.extra_info, []
    crawls, ours = yardstick(dtype, device) != dtype, isinstance(products, gemm.Native)
    for name, both in pairs.items():
        steps = dict(zip(("torch", "kdkernels"), both, strict=True))
        if crawls:
            del steps["torch"]
        seconds = {who: [] for who in steps}
        for _ in range(4):
            for who, step in steps.items():
                seconds[who] += timed(device, step)
            peaks += [peak_gflops(dtype)] if ours else []
        for who, each in seconds.items():
            found[f"{name}_{who}_gflops"] = work / statistics.median(each[1:]) / 1e9
    if ours:
        found["peak_gflops"] = max(peaks)
        found.update({f"{name}_share_of_peak": found[f"{name}_kdkernels_gflops"] / max(peaks) for name in pairs})
    benchmark.pedantic(lambda: None, rounds=1)


def test_call_on_tiny_inputs(benchmark, device):
    """Median microseconds of a call whose arithmetic is nothing; of an objective, forward and backward."""

    def head(width: int, *leading: int, trained: bool = False) -> kd.Head:
        hidden, weight = torch.randn(*leading, width, device=device), torch.randn(16, width, device=device)
        return kd.Head(hidden.requires_grad_(trained), weight.requires_grad_(trained))

    student, teacher = head(8, 4), head(12, 4)
    batch = head(8, 2, 6, trained=True), head(12, 2, 6), kd.Layout.from_mask(torch.ones(2, 6, dtype=torch.bool))
    objectives = {"GKD": kd.GKD(), "TSDKD": kd.TSDKD(k=5)}
    target = torch.zeros(4, dtype=torch.int64, device=device)
    calls = {
        "entropy": lambda: kd.entropy(student),
        "cross_entropy": lambda: kd.cross_entropy(student, target),
        "divergence": lambda: kd.divergence(student, teacher, kd.JSD(0.9)),
        "statistics": lambda: kd.statistics(student),
        **{name: partial(lambda loss: loss(*batch).loss.backward(), loss) for name, loss in objectives.items()},
    }
    for name, call in calls.items():
        seconds = []
        for _ in range(300):
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
        benchmark.extra_info[f"{name}_us"] = statistics.median(seconds) * 1e6
    benchmark.pedantic(calls["divergence"], rounds=100)


def test_host_time_of_a_launch(benchmark, shape):
    """Least microseconds of Python for each launch of the Triton sweeps, on a GPU that launches nothing (ahead.py).

    A real one adds 3 to 5. ``gradient_at_ids`` and ``statistics`` are two launches each.
    """
    knobs = pytest.importorskip("triton", reason="Triton is for Linux").knobs
    if knobs.runtime.interpret:
        pytest.skip("interpreted kernels are not launched")
    from kdkernels.kernels.triton import ahead, backend

    rows, entries, jsd = 4, 5003, kd.JSD(0.9)
    student, teacher = memory.matrices([((rows, entries), torch.float32)] * 2, torch.device("cpu"))
    stats, sums, dense = torch.zeros(rows, 7), torch.zeros(rows, 5, dtype=torch.float64), torch.zeros(3, rows)
    top = torch.zeros(rows, 1), torch.zeros(rows, 1, dtype=torch.int64)
    models = student, 1.0, 0.0, stats, teacher, 1.0, 0.0, stats, jsd.a, jsd.b, jsd.mix, jsd.skew, 1.0, sums

    def gradient(count: int):
        at_ids = torch.zeros(rows, count, dtype=torch.int64), torch.zeros(rows, count)
        return lambda: backend.row_gradient_(*models, dense, *at_ids, torch.bfloat16)

    sweeps = {
        "statistics": (2, lambda: backend.row_statistics(student, 1.0, 0.0, 1.0, stats, *top, None, None)),
        "divergence": (1, lambda: backend.row_divergence(*models)),
        "gradient": (1, gradient(0)),
        "gradient_at_ids": (2, gradient(10)),
    }
    with ahead.stand_in(90):
        for name, (launches, sweep) in sweeps.items():
            least = min(seconds for _ in range(9 if shape is TINY else 2000) for seconds in timed("cpu", sweep))
            benchmark.extra_info[f"{name}_us_per_launch"] = least * 1e6 / launches
    benchmark.pedantic(lambda: None, rounds=1)


def test_import(benchmark, shape):
    """Milliseconds of all public names after torch, and what takes most of them (``-X importtime``); median of 5."""
    code = "import torch, sys; print('torch is there', file=sys.stderr); import kdkernels.machine, kdkernels.objectives"

    def trace() -> list[tuple[int, str]]:
        command = [sys.executable, "-X", "importtime", "-c", code]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=True)
        lines = done.stderr.split("torch is there")[1].splitlines()
        rows = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
        return [(int(own), name.strip()) for own, _, name in rows]

    def total(rows) -> int:
        return sum(own for own, _ in rows)

    traces = sorted((trace() for _ in range(1 if shape is TINY else 5)), key=total)
    median = traces[len(traces) // 2]
    assert {"kdkernels", "kdkernels.objectives"} <= {name for _, name in median}
    slowest = sorted(median, reverse=True)[:5]
    benchmark.extra_info["import_ms"] = total(median) / 1e3
    benchmark.extra_info["slowest"] = ", ".join(f"{name} {own / 1e3:.1f} ms" for own, name in slowest)
    benchmark.pedantic(lambda: None, rounds=1)


@pytest.mark.parametrize("budget", [None, 64])
def test_memory_is_flat(benchmark, device, shape, budget):
    """Peak beyond inputs, gradients and the dW accumulator for growing N, each in a fresh process."""
    if budget is not None and kd.info()["devices"][device] == "eager":
        pytest.skip("the eager backend's own workspace is larger")
    slow = yardstick(torch.bfloat16, device) != torch.bfloat16  # products take longer
    counts = [128] if shape is TINY else [512] if budget else [512, 2048] if slow else [2048, 8192]
    sizes = [shape.vocabulary, shape.student, shape.teacher]
    for tokens in counts:
        command = [sys.executable, str(HERE / "memory_peak.py"), json.dumps([tokens, *sizes, budget, device])]
        done = subprocess.run(command, capture_output=True, text=True, env=environment())
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout)
        benchmark.extra_info[f"mib_at_{tokens}_tokens"] = found["beyond_accumulator"]
        benchmark.extra_info["accumulator_mib"] = found["accumulator"]
    benchmark.extra_info["budget_mib"] = budget or 384
    benchmark.pedantic(lambda: None, rounds=1)
