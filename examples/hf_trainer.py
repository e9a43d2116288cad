"""The Trainer of transformers:  python examples/hf_trainer.py [student teacher]  (or torchrun, accelerate launch)"""

import sys

import torch
from stand_ins import models, rows
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import kdkernels as kd


class Distilling(Trainer):
    """The token mean of GKD, over all processes and accumulated batches."""

    def __init__(self, *, teacher, entries, **options):
        super().__init__(**options)
        self.teacher, self.entries = teacher.to(self.args.device), entries
        self.objective = kd.GKD(beta=0.5, reduction="tokens")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        with torch.no_grad():
            scored = kd.Head.of(self.teacher, **inputs, vocab_size=self.entries)
        distillation = kd.Distillation(model, self.objective, vocab_size=self.entries)  # model: wrapped by DDP, ...
        out = distillation(**inputs, labels=labels, teacher=scored, denominator=num_items_in_batch)
        shared = num_items_in_batch is not None and self.args.average_tokens_across_devices
        loss = out.loss * self.accelerator.num_processes if shared else out.loss  # DDP divides by as many
        return (loss, out) if return_outputs else loss


if __name__ == "__main__":
    student, teacher, tokenizer = models(*sys.argv[1:])
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    args = TrainingArguments("runs/hf_trainer", use_cpu=not torch.cuda.is_available(), **options)
    data = {"train_dataset": rows(tokenizer), "data_collator": DataCollatorForSeq2Seq(tokenizer)}
    trainer = Distilling(teacher=teacher, entries=len(tokenizer), model=student, args=args, **data)
    print(trainer.train())
