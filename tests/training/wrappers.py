"""Gradients of student and objective in one module under PyTorch's and DeepSpeed's wrappers, two processes with half
the batch each: run by test_wrappers.py as a program under torch.distributed.run, with a file for the results.
"""

import os
import sys
from contextlib import nullcontext

from kdkernels.training import deepspeed_strategy  # before anything else of DeepSpeed: it says on what
from kdkernels.training.processes import distributed

import deepspeed  # isort: skip
import torch
from deepspeed.utils import safe_get_full_grad
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import kdkernels as kd
from kdkernels.objectives import DivergenceTerm, EntropyTerm, Objective

ROWS, LENGTH, HIDDEN, WORDS = 4, 9, 8, 60
WRAPPERS = ("DDP", "DDP static graph", "DDP no_sync", "FSDP2", "FSDP2 by layers", "ZeRO-3")


class Jeffreys(Objective):
    """Two divergences and an entropy at each token."""

    terms = {
        "forward": DivergenceTerm(kd.ForwardKL()),
        "reverse": DivergenceTerm(kd.ReverseKL()),
        "entropy": EntropyTerm(),
    }

    def coefficients(self, tokens):
        return dict.fromkeys(self.terms, 1 / tokens.length.to(tokens.entropy.dtype))


OBJECTIVES = {"TSD-KD": lambda: kd.TSDKD(k=4, opener=0.5), "Jeffreys": Jeffreys}


class Distillation(nn.Module):
    def __init__(self, objective: str = "TSD-KD"):
        super().__init__()
        torch.manual_seed(3)
        self.trunk, self.lm_head = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, WORDS)
        self.objective = OBJECTIVES[objective]()

    def forward(self, x, teacher, mask):
        student = kd.Head(torch.tanh(self.trunk(x)), self.lm_head.weight, self.lm_head.bias)
        return self.objective(student, teacher, mask)


def batch():
    """x [B, L, H], the teacher's hidden states and weight, mask: the same everywhere; two responses a process."""
    generator = torch.Generator().manual_seed(4)
    x, hidden, weight = (
        torch.randn(shape, generator=generator)
        for shape in ((ROWS, LENGTH, HIDDEN), (ROWS, LENGTH, HIDDEN), (WORDS, HIDDEN))
    )
    mask = torch.arange(LENGTH) < torch.tensor([5, 4, 9, 3])[:, None]
    return x, hidden, weight, mask


def gradients(wrapper: str, objective: str, rank: int) -> dict[str, torch.Tensor]:
    """name -> the whole gradient that this process sees."""
    x, hidden, weight, mask = batch()
    here = slice(2 * rank, 2 * rank + 2)
    x, teacher, mask = x[here], kd.Head(hidden[here], weight), mask[here]
    module = Distillation(objective)
    if wrapper == "ZeRO-3":
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # else small weights stay whole
        }
        engine, *_ = deepspeed.initialize(model=module, optimizer=torch.optim.AdamW(module.parameters()), config=config)
        assert module.lm_head.weight.numel() == 0, "the weights are in pieces"
        engine.backward(engine(x, teacher, mask).loss)
        return {name: safe_get_full_grad(p).clone() for name, p in module.named_parameters()}
    if wrapper.startswith("FSDP2"):
        if "layers" in wrapper:
            fully_shard(module.trunk)
        fully_shard(module)
        wrapped = module
    else:
        wrapped = DistributedDataParallel(module, static_graph="static" in wrapper)
    for last in (False, True):  # a static graph is learnt in the first backward
        accumulated = wrapped.no_sync() if "no_sync" in wrapper and not last else nullcontext()
        with accumulated:
            wrapped(x, teacher, mask).loss.backward()
        if not last and "no_sync" not in wrapper:
            module.zero_grad()
    times = 2 if "no_sync" in wrapper else 1
    found = {name: p.grad.full_tensor() if "FSDP2" in wrapper else p.grad for name, p in module.named_parameters()}
    return {name: g.detach().clone() / times for name, g in found.items()}


def main(results: str) -> None:
    distributed.start()
    deepspeed_strategy.join()
    rank = distributed.rank()
    found = {(w, objective): gradients(w, objective, rank) for objective in OBJECTIVES for w in WRAPPERS}
    torch.save(found, f"{results}.{rank}")
    distributed.barrier()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    main(sys.argv[1])
