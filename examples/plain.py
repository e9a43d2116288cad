"""A loop of your own:  python examples/plain.py [student teacher]"""

import sys

import torch
from stand_ins import loader, models

import kdkernels as kd


def train(student, teacher, entries, batches, optimizer):
    """The loss of each step. entries: how many the tokenizer has; the models' vocabularies may be padded beyond."""
    objective, losses = kd.GKD(beta=0.5), []
    for batch in batches:
        labels = batch.pop("labels")
        with torch.no_grad():
            from_teacher = kd.Head.of(teacher, **batch, vocab_size=entries)
        from_student = kd.Head.of(student, **batch, vocab_size=entries)
        out = objective(from_student, from_teacher, kd.Layout.from_labels(labels))
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    return losses


if __name__ == "__main__":
    student, teacher, tokenizer = models(*sys.argv[1:])
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    print(train(student, teacher, len(tokenizer), loader(tokenizer), optimizer))
