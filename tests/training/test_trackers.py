"""wandb and trackio through stand-ins for them, which say what they were given: neither package is installed here."""

import sys
import types

import pytest

from kdkernels.training import InputError, train
from kdkernels.training.cli import main
from kdkernels.training.run.metrics import read_metrics
from kdkernels.training.run.trackers import WANDB_ID

from .conftest import GKD


class StandIn(types.ModuleType):
    """The part of wandb 0.31 and trackio 0.43 that is used: init(**options) and, on its run, log, finish and id."""

    def __init__(self, name):
        super().__init__(name)
        self.begun, self.logged, self.finished, self.fails_at = [], [], 0, None

    def init(self, **options):
        unknown = options.keys() - {"project", "name", "config", "resume"}
        assert unknown == ({"dir", "id"} if self.__name__ == "wandb" else set())
        self.begun.append(options)
        return types.SimpleNamespace(id=options.get("id") or f"id-{len(self.begun)}", log=self.log, finish=self.finish)

    def log(self, values, step):
        if step == self.fails_at:
            raise ConnectionError("the server is away")
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def package(request, monkeypatch):
    stand_in = StandIn(request.param)
    monkeypatch.setitem(sys.modules, request.param, stand_in)
    return stand_in


def test_the_same_numbers_as_in_the_log(load, package, tmp_path):
    config = load(f"log.{package.__name__}=true", "log.project=sums", "train.steps=2")
    run = train(config).output
    (begun,) = package.begun
    assert (begun["project"], begun["name"]) == ("sums", "run") and begun["config"]["train"]["steps"] == 2
    assert [{"step": step} | values for step, values in package.logged] == read_metrics(run / "metrics.jsonl")
    assert [step for step, _ in package.logged] == [1, 2] and package.finished == 1


def test_a_resumed_run_goes_on_there(load, package, tmp_path):
    settings = (*GKD, "objective.name=SFT", f"log.{package.__name__}=true", "train.steps=4", "checkpoint.every=2")
    run = train(load(*settings)).output
    for path in (run / "final", run / "checkpoints" / "step-000004"):
        path.rename(tmp_path / path.name)
    train(load(*settings), resume=True)
    first, second = package.begun
    assert [step for step, _ in package.logged] == [1, 2, 3, 4, 3, 4]
    if package.__name__ == "wandb":
        assert (first["id"], second["id"]) == (None, "id-1") == (None, (run / WANDB_ID).read_text())
        assert first["dir"] == str(run)
    else:
        assert (first["resume"], second["resume"]) == ("never", "allow")


def test_a_number_that_is_not_finite_is_left_out(load, package):
    settings = ("optimizer.lr=1e30", "optimizer.max_grad_norm=0", "train.max_skipped_steps=1", "train.steps=6")
    with pytest.raises(FloatingPointError):
        train(load(f"log.{package.__name__}=true", *settings))
    _, last = package.logged[-1]
    assert "loss" not in last and last["skipped_steps"] == 2 and package.finished == 1


def test_a_tracker_that_fails_is_left_out(load, package, capsys):
    package.fails_at = 2
    run = train(load(f"log.{package.__name__}=true", "train.steps=3")).output
    assert [step for step, _ in package.logged] == [1] and package.finished == 0
    assert len(read_metrics(run / "metrics.jsonl")) == 3
    told = f"{package.__name__}: ConnectionError: the server is away: nothing more is logged there"
    assert capsys.readouterr().out.count(told) == 1


def test_one_that_cannot_begin_ends_the_run_before_its_first_step(load, package, monkeypatch):
    def init(**_):
        raise PermissionError("log in first")

    monkeypatch.setattr(package, "init", init)
    name = package.__name__
    with pytest.raises(InputError, match=rf"\[log\] {name}: it could not begin: PermissionError: log in first"):
        train(load(f"log.{name}=true"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]], ids=["train", "dry run"])
def test_one_that_is_not_installed_is_named(recipe, name, more, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    assert main(["train", str(recipe), f"--set=log.{name}=true", *more]) == 2
    assert f"kdkernels: [log] {name} needs {name}: pip install kdkernels[{name}]" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_more_steps_of_a_run_with_rollouts(load, teacher_set):
    """How often rollouts are kept follows from the steps, and a resumed run may have others."""
    train(load(*GKD, teacher_set, "train.steps=20"))
    longer = load(*GKD, teacher_set, "train.steps=40")
    assert longer.rollout.samples_every == 4
    run = train(longer, resume=True, changes=["train.steps"]).output
    assert [path.name for path in sorted(run.glob("rollouts-*"))][-1] == "rollouts-000040.jsonl"
