"""LoRA on every layer and the lm_head:  python examples/peft_lora.py [student teacher]"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from stand_ins import loader, models

import kdkernels as kd

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj", "lm_head"])


def train(student, teacher, entries, batches, optimizer):
    """The loss of each step. The head is read with its adapter: z = h W' + scale (h A') B', W is left alone."""
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
    student = get_peft_model(student, LORA)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    print(train(student, teacher, len(tokenizer), loader(tokenizer), optimizer))
