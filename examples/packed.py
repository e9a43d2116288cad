"""Packed rows: texts of all lengths in one row, without padding:  python examples/packed.py [student teacher]"""

import sys

import torch
from stand_ins import models, rows
from torch.utils.data import DataLoader
from transformers import DataCollatorWithFlattening

import kdkernels as kd


def train(student, teacher, entries, batches, optimizer):
    """The loss of each step. The position_ids start again at each text: they keep the texts apart, in the models'
    attention and in the layout, where every text's response counts as if it had a row of its own.
    """
    objective, losses = kd.TSDKD(k=4), []
    for batch in batches:
        layout = kd.Layout.from_labels(batch.pop("labels"), position_ids=batch["position_ids"])
        with torch.no_grad():
            from_teacher = kd.Head.of(teacher, **batch, vocab_size=entries)
        from_student = kd.Head.of(student, **batch, vocab_size=entries)
        out = objective(from_student, from_teacher, layout)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    return losses


if __name__ == "__main__":
    student, teacher, tokenizer = models(*sys.argv[1:])
    batches = DataLoader(rows(tokenizer), 8, collate_fn=DataCollatorWithFlattening())
    print(train(student, teacher, len(tokenizer), batches, torch.optim.AdamW(student.parameters(), lr=1e-3)))
