"""A run that goes on with more steps, another rate or another cadence: only where asked by name, and written down."""

import shutil
from pathlib import Path

import pytest
import torch

from kdkernels.training import InputError, load_config, train, trainer
from kdkernels.training.cli import main
from kdkernels.training.recipe.schema import read_toml
from kdkernels.training.run import history
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.history import CHANGEABLE, changes
from kdkernels.training.run.metrics import read_metrics

from .conftest import final_weights

CONSTANT = ("optimizer.schedule=constant", "optimizer.warmup_ratio=0", "checkpoint.every=2", "checkpoint.keep=9")


def rates(run) -> list[float]:
    return [line["lr"] for line in read_metrics(run / "metrics.jsonl")]


def test_a_finished_run_goes_on_to_more_steps_as_if_it_had_had_them(load):
    """At a constant rate, to the bit; the model that it had stays beside the new one."""
    whole = train(load(*CONSTANT, "train.steps=7"))
    expected = final_weights(whole.output)
    shutil.rmtree(whole.output)
    first = train(load(*CONSTANT, "train.steps=4"))
    before = final_weights(first.output)
    result = train(load(*CONSTANT, "train.steps=7"), resume=True, changes=["train.steps"])
    got, kept = final_weights(result.output), first.output / "final-000004"
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    (result.output / "new").mkdir()
    kept.rename(result.output / "new" / "final")
    earlier = final_weights(result.output / "new")
    assert all(torch.equal(earlier[name], weight) for name, weight in before.items())
    assert any(not torch.equal(earlier[name], weight) for name, weight in got.items())
    assert [line["step"] for line in read_metrics(result.output / "metrics.jsonl")] == list(range(1, 8))
    assert "- changed after step 4: train.steps: 4 -> 7\n" in (result.output / "report.md").read_text()
    assert "- 7 steps of 4 responses" in (result.output / "report.md").read_text()
    config = RunDirectory(result.output).config
    assert read_toml(config)["train"]["steps"] == 7
    assert read_toml(config.with_name("config-000004.toml"))["train"]["steps"] == 4
    again = train(load(*CONSTANT, "train.steps=7"), resume=True, changes=["train.steps"])  # a job scheduler's next try
    assert again == result and changes(config) == [(4, "train.steps: 4 -> 7")]


def test_another_rate_and_cadence_from_where_the_run_is(load, monkeypatch):
    base = (*CONSTANT, "train.steps=6")
    once = trainer.train_step

    def interrupted(parts, examples, step, *rest, **options):
        if step == 4:
            raise KeyboardInterrupt
        return once(parts, examples, step, *rest, **options)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(load(*base))
    run = RunDirectory(load(*base).run.output)
    for rate in ("0.5", "0.005"):  # killed again before anything was kept: the second wish takes the first one's place
        new = load(*base, f"optimizer.lr={rate}", "checkpoint.every=1")
        with pytest.raises(
            InputError, match=r"optimizer\.lr: 0\.0?\d* -> .*asked for by name: --resume --set optimizer.lr"
        ):
            train(new, resume=True, changes=["checkpoint.every"])
        with pytest.raises(KeyboardInterrupt):
            train(new, resume=True, changes=["optimizer.lr", "checkpoint.every"])
        shutil.rmtree(run.checkpoints / "step-000003")
    monkeypatch.setattr(trainer, "train_step", once)
    result = train(new, resume=True)
    assert rates(result.output) == [0.01] * 2 + [0.005] * 4
    assert [path.name for path in sorted(run.checkpoints.iterdir())] == [f"step-{i:06d}" for i in range(2, 7)]
    told = "optimizer.lr: 0.01 -> 0.005; checkpoint.every: 2 -> 1"
    assert changes(run.config) == [(2, told)] and f"after step 2: {told}" in (run.report).read_text()


def test_a_change_behind_a_damaged_checkpoint_is_none(load):
    """What was trained by the recipe in between is trained again by the new one, and nothing says otherwise."""
    base = (*CONSTANT, "train.steps=4")
    run = RunDirectory(train(load(*base)).output)
    train(load(*CONSTANT, "train.steps=6"), resume=True, changes=["train.steps"])
    for path in (run.final, run.checkpoints / "step-000004", run.checkpoints / "step-000006"):
        shutil.rmtree(path)
    train(load(*CONSTANT, "train.steps=5"), resume=True, changes=["train.steps"])
    assert changes(run.config) == [(2, "train.steps: 4 -> 5")]
    with pytest.raises(InputError, match=r"\[train\] steps: expected at least 5, which are trained in .*000005, got 3"):
        train(load(*CONSTANT, "train.steps=3"), resume=True, changes=["train.steps"])


def test_what_may_not_change_is_refused_though_asked_for(load, recipe, capsys):
    train(load(*CONSTANT))
    for assignment in ("train.batch_size=8", "data.max_prompt_tokens=7", "run.seed=4", "optimizer.betas=[0.8, 0.9]"):
        key = assignment.partition("=")[0]
        with pytest.raises(
            InputError, match=rf"{key}: .* -> .*\. Give it the recipe that it began with, or start a new"
        ):
            train(load(*CONSTANT, assignment), resume=True, changes=[key])
    command = ["train", str(recipe), "--resume", *(f"--set={text}" for text in CONSTANT)]
    text = recipe.read_text()
    recipe.write_text(text.replace("steps = 3", "steps = 5"))  # not by name
    assert main(command) == 2 and "train.steps: 3 -> 5. What a run may change" in capsys.readouterr().err
    recipe.write_text(text)
    assert main([*command, "--set=train.steps=5", "--dry-run"]) == 0
    assert "# 5 steps of 4 responses" in capsys.readouterr().out
    assert main([*command, "--set=train.steps=5"]) == 0
    assert len(rates(RunDirectory(load().run.output).root)) == 5


def test_all_that_may_change_are_keys(load):
    config = load(f"evaluation.data={load().data.train}", 'evaluation.metrics=["cross_entropy"]')
    for section, name in (key.split(".") for key in CHANGEABLE):
        assert hasattr(getattr(config, section), name)


def test_epochs_are_steps_of_the_usable_examples(load, recipe, capsys):
    """32 examples in batches of 4: an epoch has 8 steps."""
    assert load("train.epochs=0.3").train.steps is None
    run = RunDirectory(train(load("train.epochs=0.3")).output)  # 9.6 examples
    written = read_toml(run.config)
    assert written["train"]["steps"] == 3 and written["train"]["epochs"] == 0.3 and written["checkpoint"]["every"] == 1
    assert len(rates(run.root)) == 3
    assert main(["train", str(run.config), "--resume"]) == 0  # its own recipe
    assert "the run is finished" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"train\.epochs: 0\.3 -> 0\.5\. .*by name: --resume --set train.epochs=0\.5"):
        train(load("train.epochs=0.5"), resume=True)
    train(load("train.epochs=0.5"), resume=True, changes=["train.epochs"])
    assert changes(run.config) == [(3, "train.steps: 3 -> 4; train.epochs: 0.3 -> 0.5")]
    train(load("train.steps=5"), resume=True, changes=["train.steps"])
    assert len(rates(run.root)) == 5
    recipe.write_text(recipe.read_text().replace("steps = 3", "steps = 3\nepochs = 0.5"))
    with pytest.raises(InputError, match=r"0\.5 epochs of 32 usable examples are 4 steps of 4, got 3"):
        train(load("run.output=elsewhere"))
    assert main(["train", str(recipe), "--set=train.epochs=2.5", "--set=run.output=elsewhere", "--dry-run"]) == 0
    assert "\nsteps = 20\nepochs = 2.5\n" in capsys.readouterr().out


def test_a_recipe_of_steps_extends_one_of_epochs(recipe, load, tmp_path):
    recipe.write_text(recipe.read_text().replace("steps = 3", "epochs = 2"))
    (tmp_path / "variant.toml").write_text(f'extends = "{recipe}"\n[train]\nsteps = 5\n')
    train_of = load_config(tmp_path / "variant.toml").train
    assert (train_of.steps, train_of.epochs) == (5, None) and load().train.epochs == 2


@pytest.mark.parametrize("killed_at", range(3))
def test_a_kill_while_the_change_is_written_down_costs_nothing(load, monkeypatch, killed_at):
    """Before it, between the recipe that was and the one that is, and behind both."""
    expected = final_weights(train(load(*CONSTANT, "train.steps=5")).output)
    shutil.rmtree(load().run.output)
    run = RunDirectory(train(load(*CONSTANT, "train.steps=4")).output)
    written, once = [], history.write_text

    def killed(path, text):
        if len(written) == killed_at:
            raise KeyboardInterrupt
        written.append(path.name)
        once(path, text)
        if killed_at == 2 and len(written) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(history, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            train(load(*CONSTANT, "train.steps=5"), resume=True, changes=["train.steps"])
    assert written == ["config-000004.toml", "config.toml"][:killed_at]
    assert changes(run.config) == ([] if killed_at == 0 else [(4, "train.steps: 4 -> 5" if killed_at == 2 else "")])
    assert not run.final.exists() and (run.root / "final-000004").is_dir()
    got = final_weights(train(load(*CONSTANT, "train.steps=5"), resume=True, changes=["train.steps"]).output)
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    assert changes(run.config) == [(4, "train.steps: 4 -> 5")]


def test_epochs_of_data_that_are_not_here(capsys):
    recipe = Path(__file__).parents[2] / "recipes" / "qwen3-8b-to-1.7b-gkd.toml"
    assert main(["train", str(recipe), "--set=train.epochs=2", "--dry-run"]) == 0
    assert "\n# 2 epochs in steps of 128 responses" in capsys.readouterr().out
