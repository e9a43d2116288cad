"""Recipes one after another: each from what the one before it trained, however often they are interrupted."""

import json

import pytest
import torch

from kdkernels.training import InputError, trainer
from kdkernels.training.metrics import read_metrics
from kdkernels.training.stages import run_stages

from .conftest import RECIPE, final_weights

STUDENT = RECIPE[RECIPE.index("[student]") : RECIPE.index("[data]")]


@pytest.fixture
def recipes(recipe, teacher_set, tmp_path):
    """Plain training, distillation from there, and plain training from there again; all models are still to come."""
    paths = []
    for number, objective in enumerate(("SFT", "GKD", "SFT")):
        begun = f'[student]\npath = "{tmp_path}/stage-{number - 1}/final"\n' if number else STUDENT
        text = RECIPE.replace(STUDENT, begun).replace("{root}/run", f"{{root}}/stage-{number}")
        if objective == "GKD":
            text = text.replace('"SFT"', '"GKD"') + f'[teacher]\npath = "{teacher_set.partition("=")[2]}"\n'
        paths.append(tmp_path / f"{number}.toml")
        paths[-1].write_text(text.format(root=tmp_path))
    return paths


@pytest.fixture
def steps(monkeypatch):
    """The number of steps that were taken; `steps.stop_before(n)` interrupts before the n-th."""

    class Steps(list):
        last = None

        def stop_before(self, number):
            self.last = number

    steps, once = Steps(), trainer.train_step

    def counted(*arguments, **options):
        if len(steps) + 1 == steps.last:
            raise KeyboardInterrupt
        steps.append(1)
        return once(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", counted)
    return steps


def test_each_stage_begins_where_the_one_before_it_ended(recipes, steps, tmp_path):
    whole = run_stages(recipes, ["checkpoint.every=1"])
    assert [result.output.name for result in whole] == ["stage-0", "stage-1", "stage-2"] and len(steps) == 9
    made_from = json.loads((whole[2].output / "inputs.json").read_text())["[student] path"]
    assert "model.safetensors" in made_from
    ends = [final_weights(result.output) for result in whole]
    moved = [max((b[name] - a[name]).abs().max() for name in a) for a, b in zip(ends, ends[1:], strict=False)]
    assert all(0.005 < one < 0.1 for one in moved), "three steps of a rate of 0.01 each"

    again = run_stages(recipes, ["checkpoint.every=1"])  # nothing is left to do
    assert again == whole and len(steps) == 9


def test_interrupted_stages_end_as_if_they_had_not_been(recipes, steps, tmp_path):
    expected = final_weights(run_stages(recipes, ["checkpoint.every=1"])[2].output)
    (tmp_path / "again").mkdir()
    for path in recipes:
        path.write_text(path.read_text().replace(f"{tmp_path}/stage-", f"{tmp_path}/again/stage-"))
    steps.clear()
    steps.stop_before(6)
    with pytest.raises(KeyboardInterrupt):
        run_stages(recipes, ["checkpoint.every=1"])
    assert (tmp_path / "again" / "stage-0" / "final").is_dir() and not (tmp_path / "again" / "stage-2").exists()
    steps.stop_before(None)
    results = run_stages(recipes, ["checkpoint.every=1"])
    assert len(steps) == 9, "the finished stage was skipped, the interrupted one resumed after its second step"
    assert [len(read_metrics(result.output / "metrics.jsonl")) for result in results] == [3, 3, 3]
    got = final_weights(results[2].output)
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())


def test_a_finished_stage_of_something_else_is_not_skipped(recipes, tmp_path):
    run_stages(recipes[:1])
    with pytest.raises(InputError, match=r"the recipe differs from .*optimizer\.lr: 0\.01 -> 0\.02"):
        run_stages(recipes, ["optimizer.lr=0.02"])
    data = tmp_path / "train.jsonl"
    data.write_text(data.read_text() + data.read_text().splitlines()[0] + "\n")
    with pytest.raises(InputError, match=r"made from something else: \[data\] train .*contents changed"):
        run_stages(recipes)
    assert not (tmp_path / "stage-1").exists()


def test_every_recipe_is_checked_before_anything_is_trained(recipes, tmp_path):
    recipes[2].write_text(recipes[2].read_text().replace("stage-1/final", "stage-9/final"))
    with pytest.raises(InputError, match=r"2\.toml: \[student\] path: no such directory: .*stage-9/final"):
        run_stages(recipes)
    assert not (tmp_path / "stage-0").exists()
