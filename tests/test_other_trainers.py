"""Batches and the distillation module without DeepSpeed and without the trainer: any other trainer can use them."""

import subprocess
import sys

import pytest

pytest.importorskip("transformers")

STEP = """
import sys

sys.modules["deepspeed"] = None  # an import of it is an ImportError

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import kdkernels as kd
import kdkernels.data
from kdkernels.data import Batch, collate
from kdkernels.data import encoding, jsonl, texts, tokenizers
from kdkernels.rollouts import LocalSampler

torch.manual_seed(0)
sizes = dict(n_embd=16, n_layer=1, n_head=2, vocab_size=12, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
student, teacher = (GPT2LMHeadModel(GPT2Config(**sizes)) for _ in range(2))
module = kd.Distillation(student, kd.GKD(beta=0.5), vocab_size=11)
optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
batch = collate([[1, 2], [3]], [[4, 5, 0], [6, 0]], pad_id=0)
losses = []
for _ in range(2):
    with torch.no_grad():
        scored = kd.Head.of(teacher, vocab_size=11, **batch.inputs)
    out = module(teacher=scored, **batch.fields(by_author=False))
    out.loss.backward()
    for weight in (student.lm_head.weight, student.transformer.ln_f.weight):
        assert weight.grad.abs().sum() > 0
    optimizer.step()
    optimizer.zero_grad()
    losses.append(out.loss.item())
assert 0 < losses[1] < losses[0], losses
assert not [name for name in sys.modules if name.startswith("kdkernels.training")]
print("trained")
"""


def test_a_step_of_plain_torch():
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True)
    assert done.stdout == "trained\n", done.stderr
