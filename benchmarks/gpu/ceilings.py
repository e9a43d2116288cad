"""Step 1: the machine, how fast it copies and multiplies, and the products of the headline shape by rows of a chunk."""

from __future__ import annotations

import environment
import torch
from findings import DEVICE, DRY, STUDENT, TEACHER, VOCABULARY, attempt, left, milliseconds, record

import kdkernels as kd
from kdkernels.kernels import backend_for

BF16, F32 = torch.bfloat16, torch.float32
ROWS = (16,) if DRY else (1024, 512, 2048, 4096, 256)
ODD = 997 if DRY else 151665  # rows of so many entries do not begin at multiples of 16 bytes


def bandwidth() -> None:
    x = torch.randn(2**12 if DRY else 2**29, device=DEVICE)
    y = torch.empty_like(x)
    copy, read = milliseconds(lambda: y.copy_(x)), milliseconds(lambda: torch.amax(x))
    record("bandwidth", copy_gbs=2 * x.nbytes / copy / 1e6, read_gbs=x.nbytes / read / 1e6)


def rate() -> None:
    n = 64 if DRY else 8192
    a, b = (torch.randn(n, n, device=DEVICE).to(BF16) for _ in "ab")
    out = torch.empty_like(a)
    alone = milliseconds(lambda: torch.mm(a, b, out=out))
    many = 2 if DRY else 100  # warm: the clocks fall
    sustained = milliseconds(lambda: [torch.mm(a, b, out=out) for _ in range(many)], rounds=1) / many
    flops = 2 * n**3 / 1e9
    clocks = environment.clocks(DEVICE)
    record("rate", size=n, tflops=flops / alone, sustained_tflops=flops / sustained, clocks=clocks)


def products() -> None:
    """torch's products with bf16 outputs, and those that kdkernels uses: fp32 logits, fp32 sums of dW."""
    ours = backend_for(torch.device(DEVICE), BF16).products(torch.device(DEVICE), BF16)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, device=DEVICE).to(BF16)

    w_s, w_t = random(VOCABULARY, STUDENT), random(VOCABULARY, TEACHER)
    d_w, sums = torch.empty_like(w_s), torch.zeros(w_s.shape, device=DEVICE)
    for rows in ROWS:
        if left() < 3:
            return
        x_s, x_t = random(rows, STUDENT), random(rows, TEACHER)
        wide = torch.randn(rows, VOCABULARY, device=DEVICE)
        narrow = wide.to(BF16)
        over = wide.view(BF16)[:, :VOCABULARY]  # as gradients lie over fp32 logits: every other half of a row
        over.copy_(narrow)
        calls = {
            "student logits, bf16": (STUDENT, lambda: torch.mm(x_s, w_s.t(), out=narrow)),  # noqa: B023
            "teacher logits, bf16": (TEACHER, lambda: torch.mm(x_t, w_t.t(), out=narrow)),  # noqa: B023
            "dX, bf16": (STUDENT, lambda: torch.mm(narrow, w_s)),  # noqa: B023
            "dX from a gradient over fp32 logits": (STUDENT, lambda: ours.multiply(over, w_s)),  # noqa: B023
            "dW, bf16": (STUDENT, lambda: torch.mm(narrow.t(), x_s, out=d_w)),  # noqa: B023
            "dW, added to fp32 sums": (
                STUDENT,
                lambda: ours.accumulate(over.t(), x_s, sums, d_w, False, False),  # noqa: B023
            ),
            "student logits, fp32": (STUDENT, lambda: ours.project(x_s, w_s, None, wide)),  # noqa: B023
            "teacher logits, fp32": (TEACHER, lambda: ours.project(x_t, w_t, None, wide)),  # noqa: B023
        }
        for name, (width, call) in calls.items():
            with attempt(f"{name}, {rows} rows"):
                ms = milliseconds(call, rounds=5)
                record("product", name=name, rows=rows, ms=ms, tflops=2 * rows * VOCABULARY * width / ms / 1e9)


def alignment() -> None:
    rows = 16 if DRY else 1024
    x, w = torch.randn(rows, STUDENT, device=DEVICE).to(BF16), torch.randn(ODD, STUDENT, device=DEVICE).to(BF16)
    for name, stride in (("packed", ODD), ("padded to 64 entries", -(-ODD // 64) * 64)):
        z = torch.randn(rows, stride, device=DEVICE).to(BF16)[:, :ODD]
        times = {
            "logits": milliseconds(lambda: torch.mm(x, w.t(), out=z), 5),  # noqa: B023
            "dX": milliseconds(lambda: torch.mm(z, w), 5),  # noqa: B023
            "dW": milliseconds(lambda: torch.mm(z.t(), x), 5),  # noqa: B023
        }
        record("alignment", rows=f"{rows} x {ODD}, {name}", **{f"{key}_ms": ms for key, ms in times.items()})


def accuracy() -> None:
    """dX sums 151936 products: whether cuBLAS, which may split that sum, adds its parts in bf16."""
    z, w = (torch.randn(*size, device=DEVICE).to(BF16) for size in ((64, VOCABULARY), (VOCABULARY, STUDENT)))
    exact = z.double() @ w.double()
    errors = {"bf16": torch.mm(z, w), "rounded fp32": torch.mm(z.float(), w.float()).to(BF16)}
    record("dX error", **{name: float((x.double() - exact).norm() / exact.norm()) for name, x in errors.items()})


if __name__ == "__main__":
    record("environment", **environment.describe(DEVICE), info=kd.info())
    for step in (bandwidth, rate, products, alignment, accuracy):
        with attempt(step.__name__):
            step()
