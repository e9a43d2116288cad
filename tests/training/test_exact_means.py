"""The loss is an exact mean over all processes and micro-batches: the same rollouts, cut in any way, train the same."""

import itertools
import json
import sys

import pytest
import torch

from kdkernels.training import load_config

from .adapted import write_base
from .conftest import GKD
from .engine_steps import EXAMPLES
from .exact_means import STEPS, engine_steps, exact_steps, models
from .test_processes import finish, start

CUTS = {"1 x 8": (1, 8), "2 x 4": (2, 4), "4 steps x 2": (1, 2), "2 x 2 steps x 2": (2, 2)}  # processes, micro-batch
OBJECTIVES = {  # a mean over tokens, and one over responses
    "GKD": ("objective.name=GKD", "objective.reduction=tokens", "optimizer.lr=1.0"),
    "TSDKD": ("objective.name=TSDKD", "objective.k=4", "optimizer.lr=0.1"),
}


def settings(objective: str, stage: int, cut: str, teacher_set: str) -> list[str]:
    return [
        *OBJECTIVES[objective], teacher_set, "rollout.student_fraction=1", f"train.batch_size={EXAMPLES}",
        f"train.micro_batch_size={CUTS[cut][1]}", f"train.steps={STEPS}", f"deepspeed.zero_stage={stage}",
        "optimizer.max_grad_norm=0", "optimizer.warmup_ratio=0",
        "optimizer.schedule=constant",
    ]  # fmt: skip


@pytest.fixture
def full(recipe, teacher_set):
    """(recipe, overrides) of a student whose weights are all trained."""
    return lambda *case: (str(recipe), [*GKD[1:], *settings(*case, teacher_set)])


@pytest.fixture
def lora(tmp_path):
    """The same of one whose adapter is trained, on the output layer too, which is tied to the embedding."""
    root = tmp_path / "adapted"
    root.mkdir()
    write_base(root)
    teacher = f"teacher.path={root / 'base'}"
    return lambda *case: (str(root / "lora.toml"), [f"student.path={root / 'lora'}", *settings(*case, teacher)])


def check(found, config, case) -> None:
    """Within 1e-5 of all weights together, which have moved by far more."""
    before = {n: p.detach().double() for n, p in models(config)[1].named_parameters() if p.requires_grad}
    gradients, weights = exact_steps(config)
    assert found[0].keys() == found[1].keys() == gradients.keys() and len(gradients) > 10
    flat = [torch.cat([each[n].flatten() for n in gradients]) for each in (*found, gradients, weights, before)]
    got_gradient, got_weight, gradient, weight, start = flat
    assert (got_gradient - gradient).norm() < 1e-5 * gradient.norm(), case
    assert (got_weight - weight).norm() < 1e-5 * weight.norm(), case
    assert (weight - start).norm() > 0.01 * weight.norm(), case


def on_two(tmp_path, cases) -> None:
    """Runs the cases, (recipe, overrides) by name, in one launch of two processes and checks them."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    command, results = (*launcher, "tests.training.exact_means"), tmp_path / "found.pt"
    finish(start(command, json.dumps(list(cases.values())), str(results), cwd=tmp_path), tmp_path)
    for (name, case), found in zip(cases.items(), torch.load(results), strict=True):
        check(found, load_config(*case), name)


@pytest.mark.parametrize(
    ("kind", "objective", "stage", "cut"),
    [
        ("full", "GKD", 3, "4 steps x 2"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in itertools.product(["full", "lora"], OBJECTIVES, (0, 2, 3), ["1 x 8", "4 steps x 2"])
        ),
    ],
)
def test_one_process(request, monkeypatch, kind, objective, stage, cut):
    monkeypatch.setattr("kdkernels.training.deepspeed_strategy.STAY_WHOLE", 0)
    monkeypatch.setattr("kdkernels.training.deepspeed_strategy._optimizer", None)  # put back afterwards
    case = request.getfixturevalue(kind)(objective, stage, cut)
    check(engine_steps(load_config(*case)), load_config(*case), case)


def test_two_processes(tmp_path, full, lora):
    on_two(tmp_path, {"full": full("GKD", 3, "2 x 2 steps x 2"), "lora": lora("TSDKD", 3, "2 x 4")})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_two_processes_throughout(request, tmp_path, kind):
    case = request.getfixturevalue(kind)
    every = itertools.product(OBJECTIVES, (0, 1, 2, 3), ["2 x 4", "2 x 2 steps x 2"])
    on_two(tmp_path, {" ".join(map(str, one)): case(*one) for one in every})
