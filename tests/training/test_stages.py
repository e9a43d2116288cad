"""Recipes one after another: each from what the one before it trained, however often they are interrupted."""

import gc
import json

import pytest
import torch
from deepspeed import DeepSpeedEngine

from kdkernels.training import InputError, stages, trainer
from kdkernels.training.cli import main
from kdkernels.training.run.metrics import read_metrics
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


def test_a_stage_finds_nothing_of_the_one_before_it_in_memory(recipes, monkeypatch):
    engines, once = [], stages.train

    def alive() -> int:
        return sum(issubclass(type(one), DeepSpeedEngine) for one in gc.get_objects())

    def counted(*arguments, **options):
        engines.append(alive())
        return once(*arguments, **options)

    monkeypatch.setattr(stages, "train", counted)
    gc.collect()
    before = alive()  # of other tests in this process
    gc.disable()
    try:
        run_stages(recipes[:2], ["train.steps=1"])
    finally:
        gc.enable()
    assert engines == [before, before]


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


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("stage-1/final", "stage-9/final", r"2\.toml: \[student\] path: no such directory: .*stage-9/final"),
        ("/stage-2", "/stage-0", r"2\.toml: \[run\] output: .*stage-0 is that of .*0\.toml already"),
        ("/stage-2", "/../{name}/stage-0", r"2\.toml: \[run\] output: .*stage-0 is that of .*0\.toml already"),
        ("/stage-2", "", r"\[run\] output: .* is not empty, and what it holds is no run"),
        ("batch_size = 4", "batch_size = 3", r"2\.toml: \[train\] batch_size: expected a multiple of"),
        ('name = "SFT"', 'name = "VCRD"\nweighting = "given"', "VCRD with these options needs a judge"),
    ],
)
def test_every_recipe_is_checked_before_anything_is_trained(recipes, tmp_path, was, becomes, said):
    text = recipes[2].read_text()
    assert was in text
    text = text.replace(was, becomes.format(name=tmp_path.name))
    if "VCRD" in text:
        text += f'[teacher]\npath = "{tmp_path}/stage-0/final"\n'
    recipes[2].write_text(text)
    with pytest.raises(InputError, match=said):
        run_stages(recipes)
    assert not (tmp_path / "stage-0").exists()


def test_recipes_in_the_wrong_order_are_told(recipes, tmp_path, monkeypatch):
    """A path of two parts may be a name on the hub, but not where a recipe makes it."""
    monkeypatch.chdir(tmp_path)
    recipes[1].write_text(recipes[1].read_text().replace(f"{tmp_path}/stage-0", "stage-0"))
    with pytest.raises(InputError, match=r"1\.toml: \[student\] path: stage-0/final is what .*0\.toml trains"):
        run_stages([recipes[1], recipes[0]])
    recipes[1].write_text(recipes[1].read_text().replace("stage-0/final", "stage-1/final"))
    with pytest.raises(InputError, match=r"1\.toml: \[student\] path: stage-1/final is what .*1\.toml trains"):
        run_stages(recipes[1:2])


def test_a_stage_that_was_killed_at_its_end_has_a_report(recipes, monkeypatch):
    """Whatever is written last, a stage that is skipped for it has written everything else."""
    for name in ("write_report", "write_directory"):
        once = getattr(trainer, name)

        def killed(*arguments, once=once):
            once(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(trainer, name, killed)
        with pytest.raises(KeyboardInterrupt):
            run_stages(recipes[:1], ["checkpoint.every=1"])
        monkeypatch.setattr(trainer, name, once)
    [result] = run_stages(recipes[:1], ["checkpoint.every=1"])
    assert "3 steps of 4 responses" in (result.output / "report.md").read_text() and result.final.is_dir()


def test_a_later_recipe_may_write_the_path_of_a_model_another_way(recipes, steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes[0].write_text(recipes[0].read_text().replace(f"{tmp_path}/stage-0", "stage-0"))
    run_stages(recipes[:2])
    assert len(steps) == 6


def test_stages_on_the_command_line(recipes, steps, tmp_path, capsys):
    command = ["train", *map(str, recipes), "--set=checkpoint.every=1"]
    steps.stop_before(6)
    assert main(command) == 130
    assert f"--resume goes on from {tmp_path}/stage-1/checkpoints/step-000002" in capsys.readouterr().err
    steps.stop_before(None)
    for _ in range(2):  # what is finished is skipped
        assert main([*command, "--resume"]) == 0 and len(steps) == 9
        told = capsys.readouterr().out.splitlines()
        ends = [
            (f"model: {run}/final", f"report: {run}/report.md") for run in (tmp_path / f"stage-{n}" for n in range(3))
        ]
        assert told[-6:] == [line for end in ends for line in end]
    assert main([*command, "--set=train.steps=4"]) == 2
    assert "train.steps: 3 -> 4" in capsys.readouterr().err
