"""Tensor parallel, the lm_head too:  torchrun --nproc-per-node 2 examples/tensor_parallel.py [student teacher]"""

import sys

import torch
from stand_ins import loader, models
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import kdkernels as kd


def shard(student, mesh):
    """The student with a part of each product on each rank: of the lm_head, the rows of some entries."""
    columns = ("*.q_proj", "*.k_proj", "*.v_proj", "*.gate_proj", "*.up_proj", "lm_head")
    plan = dict.fromkeys(columns, ColwiseParallel()) | dict.fromkeys(("*.o_proj", "*.down_proj"), RowwiseParallel())
    return parallelize_module(student, mesh, plan)


def train(student, teacher, entries, batches, optimizer):
    """The loss of each step: all ranks have the same batches, the whole teacher and a part of the student."""
    objective, losses = kd.GKD(beta=0.5), []
    for batch in batches:
        layout = kd.Layout.from_labels(batch.pop("labels"))
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
    shard(student, init_device_mesh(student.device.type, (2,)))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, foreach=False)  # some are shards, some are not
    print(train(student, teacher, len(tokenizer), loader(tokenizer), optimizer))
