"""A judge's weights in a run: those of the papers' formulas, and what happens where there is no judge."""

import re

import pytest
import torch

from kdkernels.training import InputError, train
from kdkernels.training.cli import main
from kdkernels.training.dry_run import plan
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD
from .engine_steps import engine_gradients, exact_gradients
from .test_engine import check, overrides

VCRD = (*GKD, "objective.name=VCRD")


def judge(batch):
    """Weights that differ from token to token, whoever shares a batch with it; no position but the tokens' has one."""
    weights = 0.1 + (batch.target * 7 % 11) / 5
    outside = torch.full_like(weights, torch.nan).flatten()
    outside[batch.layout.index] = weights.flatten()[batch.layout.index]
    return outside.view_as(weights)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_gradients_are_those_of_the_weights(load, teacher_set, micro_batches):
    config = load(*overrides("VCRD", teacher_set, "float32", 0, micro_batches), "objective.weighting=given")
    weighted = exact_gradients(config, judge)
    check(engine_gradients(config, judge), weighted, "float32", micro_batches)
    other = exact_gradients(config, lambda batch: torch.ones(batch.target.shape))
    assert any((other[name] - weighted[name]).norm() > 0.1 * weighted[name].norm() for name in weighted)


def test_a_run_asks_its_judge_about_every_batch(load, teacher_set):
    """Those of the data and of the student, which take turns; a judge of nothing leaves the weights as they were."""
    batches = []

    def of_nothing(batch):
        batches.append(batch)
        return torch.zeros(batch.target.shape)

    config = load(*VCRD, teacher_set, "train.steps=2")
    lines = read_metrics(train(config, judge=of_nothing).output / "metrics.jsonl")
    assert [batch.from_teacher.tolist() for batch in batches] == [[True] * 2] * 2 + [[False] * 2] * 2
    assert [(line["loss"], line["gradient_norm"], line["weight"]) for line in lines] == [(0, 0, 0)] * 2
    assert all(line["time/judge"] > 0 for line in lines)
    config = load(*VCRD, teacher_set, "train.steps=2", f"run.output={config.run.output}-2")
    lines = read_metrics(train(config, judge=judge).output / "metrics.jsonl")
    assert all(line["loss"] > 0 and line["gradient_norm"] > 0 and 0.1 < line["weight"] < 2.2 for line in lines)


def test_an_objective_that_needs_a_judge_is_refused_without_one(load, recipe, teacher_set, tmp_path, capsys):
    expected = r"^\[objective\] VCRD with these options needs a judge.s weight for each token.*likelihood_ratio.*judge="
    with pytest.raises(InputError, match=expected):
        train(load(*VCRD, teacher_set))
    said = r"# objective: VCRD with these options needs a judge.s weight for each token.*likelihood_ratio.*judge="
    assert re.search(said, plan(load(*VCRD, teacher_set)))  # a plan of what Python can run
    assert "judge" not in plan(load(*VCRD, teacher_set, "objective.weighting=uniform"))
    assert main(["train", str(recipe), *(f"--set={text}" for text in (*VCRD, teacher_set))]) == 2
    assert "with these options needs a judge" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda batch: None, r"judge: expected the weights \[B, L\] .*got None"),
        (lambda batch: torch.ones(len(batch.target)), "weights: expected shape"),
        (lambda batch: torch.ones_like(batch.target), "weights: expected a floating-point tensor, got torch.int64"),
        (lambda batch: torch.ones(batch.target.shape, device="meta"), "weights: expected device cpu, got meta"),
        (lambda batch: torch.nn.Parameter(torch.ones(batch.target.shape)), "weights: .*requires no gradient"),
    ],
    ids=["none", "shape", "dtype", "device", "gradient"],
)
def test_what_is_no_weight_for_each_token_is_refused(load, teacher_set, answer, said):
    with pytest.raises((TypeError, ValueError), match=said):
        train(load(*GKD, teacher_set, "train.steps=1"), judge=answer)


def test_a_step_that_a_judge_spoils_is_skipped(load, teacher_set):
    """A weight that is not finite is as any other number that is not: the next batch trains."""
    batches = []

    def once_nan(batch):
        batches.append(batch)
        return torch.full(batch.target.shape, torch.nan if len(batches) == 1 else 1.0)

    config = load(*GKD, teacher_set, "train.steps=2")
    lines = read_metrics(train(config, judge=once_nan).output / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [1, 1] and lines[0]["loss"] is None and lines[1]["loss"] > 0
