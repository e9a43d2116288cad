"""Training with a number that is not finite put into one step of one process, and what that step did to the engine.

As a program, under a launcher: the cases of a JSON file one after the other, `[recipe, overrides, [kind, step, rank]]`
each, and the digests of every run on standard output (rank 0).
"""

import hashlib
import json
import sys
from collections.abc import Collection
from pathlib import Path

import pytest
import torch

from kdkernels.distillation import Distillation
from kdkernels.rollouts import LocalSampler
from kdkernels.training import deepspeed_strategy, load_config, train, trainer
from kdkernels.training.processes import distributed


def digest(strategy) -> str:
    """A hash of the bits of all weights and of the optimizer's weights and moments on this process."""
    tensors = [tensor for _, tensor in strategy.tensors()]
    assert sum(tensor.numel() for tensor in tensors) > 3000  # of some 3000 weights, a half and its two moments
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def train_poisoned(config, kind: str, steps: Collection[int], rank: int = 0, times: int = 9):
    """(Result, digests before the first step and after each one).

    kind "gradient": one weight's gradient is NaN in the first micro-batch of the `steps`, on the process `rank`;
    "loss": the loss is infinite in their last micro-batch, while every gradient stays finite; "rollout": the logits
    that a response is drawn from are not finite; "left out": those steps are not taken at all, only their examples.
    A step that is computed more often is poisoned `times` times.
    """
    digests, now = [], {"step": 0, "micro_batch": 0, "calls": 0}
    forward, step_once, load = Distillation.forward, trainer.train_step, trainer.load_student
    generate = LocalSampler.generate

    def poisoned() -> bool:
        return now["step"] in steps and now["calls"] <= times and distributed.rank() == rank

    def load_hooked(*arguments, **options):
        student = load(*arguments, **options)
        weight = next(student.parameters())
        weight.register_hook(
            lambda grad: grad * torch.nan if kind == "gradient" and poisoned() and now["micro_batch"] == 1 else grad
        )
        return student

    def forward_poisoned(module, **inputs):
        out = forward(module, **inputs)
        now["micro_batch"] += 1
        return out._replace(loss=out.loss + torch.inf) if kind == "loss" and poisoned() else out

    def generate_poisoned(*arguments, **options):
        if kind == "rollout" and poisoned():
            raise FloatingPointError("the logits of the model that writes a response are not finite")
        return generate(*arguments, **options)

    def step_seen(parts, examples, step, *more, **options):
        now.update(step=step, micro_batch=0, calls=now["calls"] + 1 if step == now["step"] else 1)
        if not digests:
            digests.append(digest(parts.strategy))
        if kind == "left out" and step in steps:
            result = {"loss": 0.0, "tokens": 0}, None
        else:
            result = step_once(parts, examples, step, *more, **options)
        digests.append(digest(parts.strategy))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "load_student", load_hooked)
        patch.setattr(Distillation, "forward", forward_poisoned)
        patch.setattr(trainer, "train_step", step_seen)
        patch.setattr(LocalSampler, "generate", generate_poisoned)
        return train(config), digests


if __name__ == "__main__":
    deepspeed_strategy.STAY_WHOLE = 0  # weights as small as these are in parts too
    found = []
    for recipe, overrides, (kind, step, rank) in json.loads(Path(sys.argv[1]).read_text()):
        _, digests = train_poisoned(load_config(recipe, overrides), kind, range(step, step + 1), rank)
        found.append(distributed.gathered(digests))
    if distributed.rank() == 0:
        print("digests " + json.dumps(found))
