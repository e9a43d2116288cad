"""A teacher of another kind is one class with `score`."""

import json

import torch

import kdkernels as kd
from kdkernels.data import collate
from kdkernels.teachers import LocalTeacher
from kdkernels.training import train
from kdkernels.training.models import placement
from kdkernels.training.models.loading import load_teacher, load_tokenizer

from .conftest import GKD


def test_a_local_teacher_is_its_model_and_gets_no_gradient(load, teacher_set):
    config = load(*GKD, teacher_set)
    tokenizer = load_tokenizer(config)
    model = load_teacher(config, tokenizer).requires_grad_(True)
    batch = collate([[3, 4], [5]], [[6, 1], [7, 8, 1]], 0)
    scored, expected = LocalTeacher(model, 16).score(batch), kd.Head.of(model, vocab_size=16, **batch.inputs)
    assert torch.equal(scored.hidden, expected.hidden) and scored.vocabulary == 16
    assert expected.hidden.requires_grad and not scored.hidden.requires_grad


def test_a_run_takes_a_teacher_that_is_no_model(load, teacher_set, monkeypatch):
    """Equal logits everywhere: the teacher's entropy is log 16 at every token."""
    seen = []

    class Uniform(LocalTeacher):
        def score(self, batch):
            seen.append(batch)
            return kd.Logits(torch.zeros(*batch.input_ids.shape, self.vocab_size))

    monkeypatch.setattr(placement, "LocalTeacher", Uniform)
    result = train(load(*GKD, teacher_set, "train.steps=2"))
    lines = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    assert seen and len(lines) == 2
    for line in lines:
        torch.testing.assert_close(line["teacher_entropy"], torch.log(torch.tensor(16.0)).item(), rtol=1e-5, atol=0)
        assert line["loss"] > 0 and line["gradient_norm"] > 0
