"""TRL's DistillationTrainer:  python examples/trl_distillation.py [student teacher]  (or accelerate launch)"""

import sys

import torch
from datasets import Dataset
from stand_ins import TEXTS, models
from trl import DistillationConfig, DistillationTrainer

import kdkernels as kd


class Distilling(DistillationTrainer):
    """The same loss for pairs whose vocabularies are padded differently: TRL refuses them."""

    def __init__(self, model, teacher_model, args, processing_class, **options):
        teacher_model.config.vocab_size = model.config.vocab_size  # all that TRL compares
        super().__init__(model, teacher_model, args, processing_class=processing_class, **options)
        self.entries, self.objective = len(processing_class), kd.GKD(self.beta, self.temperature, reduction="tokens")
        self._forward_redirection = lambda wrapper, _, function, *args: kd.through(wrapper, function, *args)

    def _compute_loss(self, student, inputs, num_items_in_batch):  # runs in the wrapped student's forward
        ids, attention = (torch.cat([inputs["prompt_" + x], inputs["completion_" + x]], 1) for x in ("ids", "mask"))
        batch, teacher = {"input_ids": ids, "attention_mask": attention}, self.teacher_model.eval()
        own = inputs["completion_mask"].mul(inputs.get("tool_mask", 1)).bool()  # the tokens that the student wrote
        layout = kd.Layout.from_labels(ids.masked_fill(~torch.cat([inputs["prompt_mask"] > 1, own], 1), -100))
        with torch.no_grad():
            from_teacher = kd.Head.of(teacher, **batch, vocab_size=self.entries)
        from_student = kd.Head.of(student, **batch, vocab_size=self.entries)
        out = self.objective(from_student, from_teacher, layout, denominator=num_items_in_batch)
        return out.loss, out.metrics.get("student_entropy", 0.0) * own.sum(), own.sum()


if __name__ == "__main__":
    student, teacher, tokenizer = models(*sys.argv[1:])
    prompts = Dataset.from_list([{"prompt": prompt} for prompt, _ in TEXTS])
    options = {"beta": 0.5, "max_completion_length": 8, "use_cpu": not torch.cuda.is_available()}
    args = DistillationConfig("runs/trl_distillation", **options)
    print(Distilling(student, teacher, args, tokenizer, train_dataset=prompts).train())
