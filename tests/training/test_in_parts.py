"""ZeRO-3: the student's weights in parts, whole only where they are read."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdkernels.training import deepspeed_strategy, train
from kdkernels.training.deepspeed_strategy import DeepSpeedStrategy
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD

IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.fixture
def seen(monkeypatch):
    """What was read of the student before it was saved: its logits of IDS, and how many weights were whole at once."""
    seen, read, gathering = (
        {"whole": []},
        DeepSpeedStrategy.weights,
        deepspeed_strategy.deepspeed.zero.GatheredParameters,
    )

    def gathered(params, **options):
        params = list(params)
        seen["whole"].append(len(params))
        return gathering(params, **options)

    def weights(strategy, frozen):
        student = strategy.module.student
        assert {parameter.numel() for parameter in student.parameters()} == {0}
        with strategy.whole(), torch.no_grad():
            seen["logits"] = student(IDS).logits
        with monkeypatch.context() as patch:
            patch.setattr(deepspeed_strategy.deepspeed.zero, "GatheredParameters", gathered)
            return read(strategy, frozen)

    monkeypatch.setattr(DeepSpeedStrategy, "weights", weights)
    return seen


@pytest.mark.parametrize(
    ("tied", "dtype"),
    [
        (True, "float32"),
        (False, "bfloat16"),
        pytest.param(False, "float32", marks=pytest.mark.slow),
        pytest.param(True, "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_what_is_saved_has_the_logits_of_the_run(load, teacher_set, in_parts, seen, tied, dtype):
    word = str(tied).lower()
    settings = (*GKD, teacher_set, f"student.architecture.tie_word_embeddings={word}", f"run.dtype={dtype}")
    result = train(load(*settings, "deepspeed.zero_stage=3"))
    plain = AutoModelForCausalLM.from_pretrained(result.final, dtype="auto")
    assert plain.dtype == getattr(torch, dtype)
    assert (plain.lm_head.weight is plain.model.embed_tokens.weight) == tied
    with torch.no_grad():
        assert torch.equal(plain(IDS).logits, seen["logits"])
    assert set(seen["whole"]) == {1} and len(seen["whole"]) == sum(1 for _ in plain.parameters())
    assert all(line["student_length"] > 0 for line in read_metrics(result.output / "metrics.jsonl"))
