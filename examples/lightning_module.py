"""Lightning:  python examples/lightning_module.py [student teacher]  (or torchrun)"""

import os
import sys

import lightning
import torch
from stand_ins import loader, models

import kdkernels as kd


class Distilling(lightning.LightningModule):
    """The mean over the responses of equally large batches; elsewhere give a denominator, as hf_trainer.py does."""

    def __init__(self, student, teacher, entries, optimizer):
        super().__init__()
        self.distillation = kd.Distillation(student, kd.GKD(beta=0.5), vocab_size=entries)
        self.entries, self.optimizer = entries, optimizer
        self.frozen = (teacher,)  # a tuple, so that it is no part of the checkpoints

    def training_step(self, batch):
        labels, teacher = batch.pop("labels"), self.frozen[0].to(self.device)
        with torch.no_grad():
            scored = kd.Head.of(teacher, **batch, vocab_size=self.entries)
        out = self.distillation(**batch, labels=labels, teacher=scored)
        self.log_dict(out.metrics, sync_dist=True)
        return out.loss

    def configure_optimizers(self):
        return self.optimizer


if __name__ == "__main__":
    student, teacher, tokenizer = models(*sys.argv[1:])
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    options = {"devices": os.environ.get("LOCAL_WORLD_SIZE", "auto"), "default_root_dir": "runs/lightning"}
    trainer = lightning.Trainer(max_epochs=1, accumulate_grad_batches=2, **options)
    trainer.fit(Distilling(student, teacher, len(tokenizer), optimizer), loader(tokenizer))
    print(trainer.callback_metrics)
