"""A vocabulary divided among processes beside one process: errors against fp64, and memory. Two minutes.

    PYTHONPATH=. python benchmarks/divided.py [--vocabulary 151936] [--tokens 64] [--processes 2] [--dtype float32]

Axes: N tokens, V vocabulary, H hidden, P processes.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
from pathlib import Path

import torch
from torch import Tensor, distributed, multiprocessing

import kdkernels as kd

STUDENT, TEACHER = 896, 1536
EVERY = 8  # of the rows of dW are compared


def numbers(name: str, rows: int, width: int, dtype: torch.dtype, part: slice = slice(None)) -> Tensor:
    """Rows of a random matrix that is the same in every process: ``part`` of it alone is kept in memory."""
    low, high, _ = part.indices(rows)
    out = torch.empty(high - low, width, dtype=dtype)
    for start in range(0, rows, 4096):
        generator = torch.Generator().manual_seed(1_000_003 * ord(name) + start)
        block = torch.randn(min(4096, rows - start), width, generator=generator) / width**0.5
        first, last = max(low, start), min(high, start + len(block))
        if first < last:
            out[first - low : last - low] = block[first - start : last - start]
    return out


def work(rank: int, processes: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    group = None
    if processes > 1:
        store = distributed.FileStore(str(Path(folder) / "store"), processes)
        distributed.init_process_group("gloo", store=store, rank=rank, world_size=processes)
        group = distributed.group.WORLD
    v, n, dtype = options.vocabulary, options.tokens, getattr(torch, options.dtype)
    mine = slice(v * rank // processes, v * (rank + 1) // processes)
    hidden = numbers("x", n, STUDENT, dtype)[None].mul_(STUDENT**0.5).requires_grad_()
    hidden_t = numbers("y", n, TEACHER, dtype)[None].mul_(TEACHER**0.5)
    weight, weight_t = numbers("w", v, STUDENT, dtype, mine).requires_grad_(), numbers("u", v, TEACHER, dtype, mine)
    student = kd.Head(hidden, weight, vocab_size=v, group=group)
    teacher = kd.Head(hidden_t, weight_t, vocab_size=v, group=group)
    loss = kd.GKD(0.9)(student, teacher, torch.ones(1, n, dtype=torch.bool)).loss
    loss.backward()
    found = {
        "loss": loss.detach(),
        "dX": hidden.grad,
        "dW": weight.grad[-mine.start % EVERY :: EVERY].clone(),
        "weights MiB": (weight.nbytes + weight_t.nbytes) / 2**20,
        "dW MiB": weight.grad.nbytes / 2**20,
        "peak MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    torch.save(found, Path(folder) / f"{processes}.{rank}")
    if group is not None:
        distributed.destroy_process_group()


def run(processes: int, options: argparse.Namespace, folder: str) -> list[dict]:
    multiprocessing.spawn(work, (processes, options, folder), nprocs=processes)
    return [torch.load(Path(folder) / f"{processes}.{rank}") for rank in range(processes)]


def dense(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Tensor]:
    """By PyTorch over all logits, computed in ``dtype`` from the operands that the others have."""
    v, n, operand = options.vocabulary, options.tokens, getattr(torch, options.dtype)
    x = numbers("x", n, STUDENT, operand).mul_(STUDENT**0.5).to(dtype).requires_grad_()
    y = numbers("y", n, TEACHER, operand).mul_(TEACHER**0.5).to(dtype)
    z = (x @ numbers("w", v, STUDENT, operand).to(dtype).t()).detach().requires_grad_()
    log_p, log_q = (y @ numbers("u", v, TEACHER, operand).to(dtype).t()).log_softmax(-1), z.log_softmax(-1)
    mixture = torch.logaddexp(log_p + torch.log(torch.tensor(0.9)).item(), log_q + torch.log(torch.tensor(0.1)).item())
    loss = 0.9 * (log_p.exp() * (log_p - mixture)).sum(-1) + 0.1 * (log_q.exp() * (log_q - mixture)).sum(-1)
    (loss.sum() / n).backward()
    weight = numbers("w", v, STUDENT, operand).to(dtype)
    return {"loss": loss.detach().mean(), "dX": z.grad @ weight, "dW": (z.grad.t() @ x.detach())[::EVERY]}


def error(found: Tensor, exact: Tensor) -> str:
    exact = exact.double()
    return f"{float((found.double() - exact).norm() / exact.norm()):.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=151936)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        (one,), parts = run(1, options, folder), run(options.processes, options, folder)
    together = {"loss": parts[0]["loss"], "dX": parts[0]["dX"][0], "dW": torch.cat([each["dW"] for each in parts])}
    alone = {"loss": one["loss"], "dX": one["dX"][0], "dW": one["dW"]}
    exact, eager = dense(options, torch.float64), dense(options, getattr(torch, options.dtype))
    print(f"\nV {options.vocabulary}, H {STUDENT} / {TEACHER}, N {options.tokens}, {options.dtype}, GKD(0.9)\n")
    print(f"| error against fp64 | eager PyTorch | one process | {options.processes} processes |\n|---|---|---|---|")
    for name in ("loss", "dX", "dW"):
        print(f"| {name} | {' | '.join(error(each[name], exact[name]) for each in (eager, alone, together))} |")
    print(f"\n| MiB per process | one | each of {options.processes} |\n|---|---|---|")
    for name in ("weights MiB", "dW MiB", "peak MiB"):
        print(f"| {name[:-4]} | {one[name]:.0f} | {max(each[name] for each in parts):.0f} |")


if __name__ == "__main__":
    main()
