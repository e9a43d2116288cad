"""Step 4: each sweep alone over 1024 rows: milliseconds, GB/s of the bytes it must move, picoseconds an entry.

kernels.py once     every sweep once between cudaProfilerStart and Stop, for a profiler of hardware counters
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from findings import DEVICE, DRY, VOCABULARY, attempt, dtype_name, left, milliseconds, record

import kdkernels as kd
from kdkernels.compute import memory
from kdkernels.kernels import Coefficients, backend_for

F32, BF16 = torch.float32, torch.bfloat16
ROWS = 1 if DRY else 1024
ODD = 997 if DRY else 151665  # no multiple of 64 entries, to which rows of a buffer are padded (memory.py)
FILLED = (2,) if DRY else (66, 132, 264, 528, 1056, 2112)  # a program has a row, an H100 132 multiprocessors
JSD = kd.JSD(0.9)
CANDIDATES = (2, 3) if DRY else (10, 128)  # TSD-KD's, VCRD's
MAIN = ("statistics", "divergence", "gradient")


def sweeps(
    dtype: torch.dtype, entries: int = VOCABULARY, rows: int = ROWS, divergence=JSD, out: torch.dtype = BF16
) -> dict[str, tuple[Callable[[], object], int]]:
    """name: (call, bytes an entry that it must move). Gradients overwrite the student's logits, again and again."""
    g = torch.Generator(device=DEVICE).manual_seed(0)
    x_s, x_t = memory.matrices([((rows, entries), dtype)] * 2, torch.device(DEVICE))
    for x in (x_s, x_t):
        x.copy_(3 * torch.randn(rows, entries, device=DEVICE, generator=g))
    backend, size = backend_for(x_s.device, dtype), dtype.itemsize

    def statistics(k: int):
        return backend.statistics(x_s, 1.0, None, 1.0, k, None)

    s, t = statistics(1), backend.statistics(x_t, 1.0, None, 1.0, 1, None)
    sums = backend.divergence(s, t, divergence, 1.0)[1]
    ids = torch.randint(0, entries, (rows, 11), device=DEVICE, generator=g)
    ones = torch.ones(3, rows, device=DEVICE)
    some = Coefficients(ones, ids, torch.ones(ids.shape, device=DEVICE))
    none = Coefficients(ones, ids[:, :0], some.scatter[:, :0])
    place = x_s.view(out)[:, :entries]

    def gradient(c: Coefficients):
        backend.gradient_(s, t, divergence, 1.0, sums, c, place)

    return {
        "statistics": (lambda: statistics(1), size),
        **{f"statistics, k = {k}": (lambda k=k: statistics(k), size) for k in CANDIDATES},
        "divergence": (lambda: backend.divergence(s, t, divergence, 1.0), 2 * size),
        "gradient": (lambda: gradient(none), 2 * size + out.itemsize),
        "gradient, 11 ids": (lambda: gradient(some), 2 * size + out.itemsize),
    }


def measure(shape: str, names=None, entries: int = VOCABULARY, rows: int = ROWS, **options) -> None:
    """One finding for each of the sweeps ``names``, or all."""
    for name, (call, size) in sweeps(entries=entries, rows=rows, **options).items():
        if (names is None or name in names) and left() > 0:
            ms, count = milliseconds(call), rows * entries
            figures = {"ms": ms, "gbs": count * size / ms / 1e6, "ps_an_entry": ms * 1e9 / count}
            record("sweep", name=name, shape=shape, bytes_an_entry=size, **figures)


def tuned() -> None:
    """The fastest blocks and warps on this GPU. Triton times them, which takes a GPU."""
    from kdkernels.kernels.triton import tune as triton_tune

    for dtype in (F32, BF16):
        if left() > 20:
            record("tuned", dtype=dtype_name(dtype), sizes=triton_tune.tune(VOCABULARY, dtype))


def once() -> None:
    for dtype in (F32, BF16):
        named = sweeps(dtype)
        calls = [named[name][0] for name in (f"statistics, k = {CANDIDATES[0]}", *MAIN)]
        for start, stop in ((None, None), ("cudaProfilerStart", "cudaProfilerStop")):  # the first time compiles
            for function in (start, *calls, stop):
                if callable(function):
                    function()
                elif function and DEVICE == "cuda":
                    torch.cuda.synchronize()
                    getattr(torch.cuda.cudart(), function)()


def main() -> None:
    for dtype in (F32, BF16):
        name = dtype_name(dtype)
        with attempt(name):
            measure(name, dtype=dtype)
        for divergence in (kd.ForwardKL(), kd.SkewKL(0.1)):
            with attempt(f"{name}, {divergence.name}"):
                measure(f"{name}, {divergence.name}", ("divergence", "gradient"), dtype=dtype, divergence=divergence)
        with attempt(f"{name}, {ODD} entries"):
            measure(f"{name}, {ODD} entries", MAIN, entries=ODD, dtype=dtype)
    for rows in FILLED:
        with attempt(f"{rows} rows"):
            measure(f"float32, {rows} rows", MAIN, rows=rows, dtype=F32)
    if DEVICE == "cuda":
        with attempt("tuning"):
            tuned()


if __name__ == "__main__":
    once() if sys.argv[1:] == ["once"] else main()
