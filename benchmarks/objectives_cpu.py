"""TSD-KD and GKD, forward and backward, against the bare GEMMs and eager PyTorch on this CPU, printed as Markdown.

    python benchmarks/objectives_cpu.py [--tokens 512] [--dtype bfloat16] [--repeats 7] [--eager-repeats 3]

The bare GEMMs are the four no implementation can do without (student logits, teacher logits, dX, dW), on the same
operands, in chunks of 512 to 4096 rows, the fastest taken. All are interleaved in one process; medians are reported.
Nothing is timed before the objective's gradients have been checked against the fp64 reference on a few tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import memory, reference

VOCABULARY, STUDENT, TEACHER, RESPONSE = 151936, 896, 1536, 256  # Qwen2.5 0.5B and 1.5B; tokens a response


def resident(field: str) -> float:
    """VmRSS or VmHWM (the peak) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def inputs(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden and weight of student and teacher; logits of standard deviation about 1."""
    torch.manual_seed(0)
    shape = (max(1, tokens // RESPONSE), min(tokens, RESPONSE))
    pairs = []
    for width, trained in ((STUDENT, True), (TEACHER, False)):
        hidden = torch.randn(*shape, width).to(dtype)
        weight = torch.empty(VOCABULARY, width, dtype=dtype).normal_(std=width**-0.5)
        pairs += [hidden.requires_grad_(trained), weight.requires_grad_(trained)]
    return tuple(pairs)


def eager(formula, h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor) -> Tensor:
    """The loss as plain PyTorch writes it: full logits of both models, widened to fp32, one response at a time."""
    z_s, z_t = h_s @ w_s.t(), h_t @ w_t.t()
    wide = torch.promote_types(z_s.dtype, torch.float32)
    return formula(list(z_s.to(wide)), list(z_t.to(wide)))


def gradient_error(objective, formula, dtype: torch.dtype) -> tuple[float, float]:
    """Norm-relative error of d loss / d hidden for 8 tokens: ours, and that of eager PyTorch in the same dtype."""
    tensors = inputs(8, dtype)
    h_s, w_s, h_t, w_t = tensors

    def gradient(to: torch.dtype) -> Tensor:
        wide = [t.detach().to(to) for t in tensors]
        return torch.autograd.grad(eager(formula, wide[0].requires_grad_(), *wide[1:]), wide[0])[0].double()

    mask = torch.ones(h_s.shape[:2], dtype=torch.bool)
    ours = torch.autograd.grad(objective(kd.Head(h_s, w_s), kd.Head(h_t, w_t), mask).loss, h_s)[0].double()
    truth = gradient(torch.float64)
    return tuple(((g - truth).norm() / truth.norm()).item() for g in (ours, gradient(dtype)))


def bare_gemms(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, rows: int):
    x_s, x_t = h_s.detach().flatten(0, 1), h_t.flatten(0, 1)
    w_s = w_s.detach()
    z_s, z_t = x_s.new_empty(rows, VOCABULARY), x_s.new_empty(rows, VOCABULARY)
    d_x, d_w = torch.empty_like(x_s), torch.empty_like(w_s)

    def run() -> None:
        for first in range(0, len(x_s), rows):
            chunk = slice(first, first + rows)
            torch.mm(x_s[chunk], w_s.t(), out=z_s)
            torch.mm(x_t[chunk], w_t.t(), out=z_t)
            torch.mm(z_s, w_s, out=d_x[chunk])
            torch.mm(z_s.t(), x_s[chunk], out=d_w)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--eager-repeats", type=int, default=3)
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)

    reference.candidates = lambda z, k: (
        z.topk(k).indices
    )  # the specification sorts, to be exact about ties; nobody would
    objectives = {"GKD": (kd.GKD(), reference.gkd), "TSD-KD": (kd.TSDKD(), reference.tsd_kd)}
    errors = {name: gradient_error(*pair, dtype) for name, pair in objectives.items()}
    for name, (ours, theirs) in errors.items():
        if not ours <= 2 * theirs:
            raise SystemExit(
                f"{name}: gradient error {ours:.1e}, eager PyTorch's is {theirs:.1e}; not timing wrong numbers"
            )

    tensors = h_s, w_s, h_t, w_t = inputs(options.tokens, dtype)
    layout = kd.Layout.from_mask(torch.ones(h_s.shape[:2], dtype=torch.bool))
    steps = {}
    for name, (objective, formula) in objectives.items():
        steps[name] = lambda o=objective: o(kd.Head(h_s, w_s), kd.Head(h_t, w_t), layout).loss.backward()
        steps[f"{name}, eager PyTorch"] = lambda f=formula: eager(f, *tensors).backward()

    def measure(step) -> float:
        h_s.grad = w_s.grad = None
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    extra = {}
    for name, step in steps.items():
        h_s.grad = w_s.grad = None
        memory._kept.clear()  # the logits' block of the last call would hide what this one needs
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
        measure(step)
        extra[name] = resident("VmHWM") - before - (h_s.grad.nbytes + w_s.grad.nbytes) / 2**20

    chunks = [rows for rows in (512, 1024, 2048, 4096) if options.tokens % rows == 0]
    timed = {f"bare GEMMs, {rows} rows": bare_gemms(h_s, w_s, h_t, w_t, rows) for rows in chunks} | steps
    seconds = {name: [] for name in timed}
    for repeat in range(options.repeats):
        for name, step in timed.items():
            if "eager" not in name or repeat < options.eager_repeats:
                seconds[name].append(measure(step))
    median = {name: statistics.median(values) for name, values in seconds.items() if values}
    floor = min(median[name] for name in timed if name.startswith("bare"))

    print(f"V = {VOCABULARY}, N = {options.tokens}, student {STUDENT} / teacher {TEACHER},")
    print(f"{options.dtype} operands and logits, {torch.get_num_threads()} threads, {kd.info()['cpu_isa']},")
    print(f"torch {torch.__version__}; median of {options.repeats} interleaved runs\n")
    print("| forward + backward | ms | x bare GEMMs | MiB beyond inputs and gradients | gradient error |")
    print("|---|---|---|---|---|")
    for name, value in median.items():
        error = errors[name.split(",")[0]]["eager" in name] if name in extra else None
        rest = "|" if error is None else f"{extra[name]:.0f} | {error:.1e}"
        print(f"| {name} | {value * 1e3:.0f} | {value / floor:.2f} | {rest} |")


if __name__ == "__main__":
    main()
