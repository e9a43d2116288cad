"""A loop with accelerate:  accelerate launch examples/accelerate_loop.py [student teacher]"""

import sys

import torch
from accelerate import Accelerator
from stand_ins import loader, models

import kdkernels as kd


def train(accelerator, student, teacher, entries, batches, optimizer):
    """The loss of each batch. All have as many responses: the mean over them is that of all the responses of all
    processes and accumulated batches. Where they have not, give a denominator, as hf_trainer.py does.
    """
    module, losses = kd.Distillation(student, kd.GKD(beta=0.5), vocab_size=entries), []
    module, optimizer, batches = accelerator.prepare(module, optimizer, batches)
    teacher = teacher.to(accelerator.device)
    for batch in batches:
        labels = batch.pop("labels")
        with torch.no_grad():
            scored = kd.Head.of(teacher, **batch, vocab_size=entries)
        with accelerator.accumulate(module):
            out = module(**batch, labels=labels, teacher=scored)
            accelerator.backward(out.loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(out.loss.detach(), "mean").item())
    return losses


if __name__ == "__main__":
    student, teacher, tokenizer = models(*sys.argv[1:])
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=not torch.cuda.is_available())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    print(train(accelerator, student, teacher, len(tokenizer), loader(tokenizer), optimizer))
