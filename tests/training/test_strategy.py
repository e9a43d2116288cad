"""The trainer asks nothing of DeepSpeed but through a `Strategy`: plain PyTorch in its place trains the same."""

import math
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import kdkernels.training
from kdkernels.training import train, trainer
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD, final_weights


class Plain:
    """One process, float32, AdamW."""

    made = 0

    def __init__(self, config, module):
        Plain.made += 1
        self.module, self.device, self.limit = module, torch.device("cpu"), config.optimizer.max_grad_norm
        self.optimizer = torch.optim.AdamW(module.parameters(), weight_decay=config.optimizer.weight_decay)

    def forward(self, batch, teacher, weights):
        return self.module(teacher=teacher, weights=weights, **batch.fields(self.module.objective.by_author))

    def backward(self, loss):
        loss.backward()

    def step(self, loss, lr, apply=True):
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.limit).item()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if apply and math.isfinite(loss) and math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm, None if math.isfinite(norm) else f"the gradient norm is {norm}"

    def whole(self):
        return nullcontext()

    def weights(self, frozen=True):
        return self.module.student.state_dict()

    def tensors(self):
        return self.module.student.state_dict().items()

    def state(self):
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}, {}

    def load_state(self, shared, own):
        self.module.load_state_dict(shared["module"])
        self.optimizer.load_state_dict(shared["optimizer"])


@pytest.fixture
def plain(monkeypatch):
    monkeypatch.setattr(trainer, "DeepSpeedStrategy", Plain)
    monkeypatch.setattr(Plain, "made", 0)


def test_another_strategy_trains_the_same(load, teacher_set, tmp_path, request):
    overrides = (*GKD, teacher_set, "rollout.student_fraction=0", "checkpoint.every=1", "optimizer.max_grad_norm=0.05")
    expected = train(load(*overrides, f"run.output={tmp_path / 'deepspeed'}"))
    request.getfixturevalue("plain")
    result = train(load(*overrides))
    assert Plain.made == 1
    losses, right = (
        [line["loss"] for line in read_metrics(one.output / "metrics.jsonl")] for one in (result, expected)
    )
    assert losses == pytest.approx(right, rel=1e-5) and len(losses) == 3
    weights = final_weights(result.output)
    for name, weight in final_weights(expected.output).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5)

    for path in (result.output / "checkpoints" / "step-000003", result.final):
        shutil.rmtree(path)
    again = final_weights(train(load(*overrides), resume=True).output)
    assert Plain.made == 2 and all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_only_its_strategy_knows_deepspeed():
    files = list(Path(kdkernels.training.__file__).parent.rglob("*.py"))
    assert len(files) > 20
    imported = [path.name for path in files if "import deepspeed\n" in path.read_text()]
    assert imported == ["deepspeed_strategy.py"]
    known = [path.name for path in files if re.search(r"from deepspeed|(?<!kdkernels\.)\bengine\.", path.read_text())]
    assert known == ["deepspeed_strategy.py"]
    engines = {path.name for path in files if "deepspeed.initialize" in path.read_text()}
    assert engines == {"deepspeed_strategy.py", "deepspeed_teacher.py"}
