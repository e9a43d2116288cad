"""What TRL's trainers refuse, and what they do to a model."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("trl", reason="the TRL examples need trl: pip install '.[examples]'")

from datasets import Dataset
from stand_ins import TEXTS, models
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.utils import add_fused_lm_head

import kdkernels as kd


@pytest.mark.parametrize(("trainer", "config"), [(GKDTrainer, GKDConfig), (DistillationTrainer, DistillationConfig)])
def test_trl_itself_refuses_the_pair(trainer, config, tmp_path):
    student, teacher, tokenizer = models()
    data = Dataset.from_list([{"prompt": prompt} for prompt, _ in TEXTS])
    args = config(str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="student model has vocab_size 20 but the teacher model has vocab_size 24"):
        trainer(student, teacher, args, processing_class=tokenizer, train_dataset=data)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_head_behind_trls_fused_cross_entropy(autocast):
    """SFTTrainer and its subclasses give a model another forward, which accelerate's autocast may be around."""
    from accelerate import Accelerator

    student, *_ = models()
    student.config.logit_scale = 0.5  # read by Cohere's forward and by TRL's, not by Llama's
    plain, hidden = copy.deepcopy(student), torch.randn(2, 3, 16)
    add_fused_lm_head(student)
    if autocast:
        student = Accelerator(cpu=True, mixed_precision="bf16").prepare(student)
    expected, head = (kd.Head.from_model(model, hidden) for model in (plain, student))
    assert (head.scale, head.softcap, head.vocabulary) == (expected.scale, expected.softcap, 20) == (1.0, None, 20)
    assert head.weight is student.lm_head.weight


def test_another_forward_around_it_is_not_passed_over():
    student, *_ = models()
    add_fused_lm_head(student)
    fused = student.forward
    student.forward = lambda **inputs: fused(**inputs)
    with pytest.raises(TypeError, match="forward was replaced"):
        kd.Head.from_model(student, torch.randn(2, 3, 16))
