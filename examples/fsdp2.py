"""FSDP2:  torchrun --nproc-per-node 2 examples/fsdp2.py [student teacher]"""

import sys

import torch
import torch.distributed as dist
from stand_ins import loader, models
from torch.distributed.fsdp import fully_shard

import kdkernels as kd


def shard(student, entries):
    """Student and objective in one module, sharded layer by layer."""
    module = kd.Distillation(student, kd.GKD(beta=0.5), vocab_size=entries)
    for layer in student.model.layers:
        fully_shard(layer)
    return fully_shard(module)


def train(module, teacher, batches, optimizer):
    """The loss of each step on this process's batches. All have as many responses."""
    losses = []
    for batch in batches:
        labels = batch.pop("labels")
        with torch.no_grad():
            scored = kd.Head.of(teacher, **batch, vocab_size=module.vocab_size)
        out = module(**batch, labels=labels, teacher=scored)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    return losses


if __name__ == "__main__":
    dist.init_process_group()
    student, teacher, tokenizer = models(*sys.argv[1:])
    module, mine = shard(student, len(tokenizer)), slice(dist.get_rank(), None, dist.get_world_size())
    print(train(module, teacher, list(loader(tokenizer))[mine], torch.optim.AdamW(module.parameters(), lr=1e-3)))
