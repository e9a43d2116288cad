"""TRL's GKDTrainer:  python examples/trl_gkd.py [student teacher]  (or accelerate launch)"""

import sys

import torch
from datasets import Dataset
from stand_ins import TEXTS, models
from trl.experimental.gkd import GKDConfig, GKDTrainer

import kdkernels as kd


class Distilling(GKDTrainer):
    """GKD as in its paper, a mean over responses, also where vocabularies are padded differently, which TRL refuses."""

    def __init__(self, model, teacher_model, args, processing_class, **options):
        teacher_model.config.vocab_size = model.config.vocab_size  # all that TRL compares
        super().__init__(model, teacher_model, args, processing_class=processing_class, **options)
        self.model_accepts_loss_kwargs = False  # TRL's count is of the data's tokens, even where the student writes
        self.entries, self.objective = len(processing_class), kd.GKD(self.beta)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        batch, teacher = {name: inputs[name] for name in ("input_ids", "attention_mask")}, self.teacher_model.eval()
        with torch.no_grad():
            scored = kd.Head.of(teacher, **batch, vocab_size=self.entries)
        distillation = kd.Distillation(model, self.objective, vocab_size=self.entries)
        out = distillation(**batch, labels=inputs["labels"], teacher=scored)
        return (out.loss, out) if return_outputs else out.loss


if __name__ == "__main__":
    student, teacher, tokenizer = models(*sys.argv[1:])
    roles = ("user", "assistant")
    talks = [{"messages": [{"role": r, "content": c} for r, c in zip(roles, text, strict=True)]} for text in TEXTS]
    options = {"beta": 0.5, "lmbda": 0.5, "max_new_tokens": 8, "use_cpu": not torch.cuda.is_available()}
    args = GKDConfig("runs/trl_gkd", **options)
    print(Distilling(student, teacher, args, tokenizer, train_dataset=Dataset.from_list(talks)).train())
