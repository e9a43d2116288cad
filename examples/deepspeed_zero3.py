"""DeepSpeed's ZeRO-3:  deepspeed --no_local_rank examples/deepspeed_zero3.py [student teacher]  (or torchrun)"""

import sys

import deepspeed
import torch
from stand_ins import loader, models

import kdkernels as kd

CONFIG = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 3}}


def shard(student, entries, optimizer, config):
    """Student and objective as one module in DeepSpeed's engine."""
    module = kd.Distillation(student, kd.GKD(beta=0.5), vocab_size=entries)
    return deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]


def train(engine, teacher, batches):
    """The loss of each step on this process's batches. All have as many responses."""
    losses = []
    for batch in batches:
        labels = batch.pop("labels")
        with torch.no_grad():
            scored = kd.Head.of(teacher, **batch, vocab_size=engine.module.vocab_size)
        out = engine(**batch, labels=labels, teacher=scored)
        engine.backward(out.loss)
        engine.step()
        losses.append(out.loss.item())
    return losses


if __name__ == "__main__":
    student, teacher, tokenizer = models(*sys.argv[1:])
    engine = shard(student, len(tokenizer), torch.optim.AdamW(student.parameters(), lr=1e-3), CONFIG)
    teacher, here = teacher.to(engine.device), slice(engine.global_rank, None, engine.world_size)
    print(train(engine, teacher, list(loader(tokenizer))[here]))
