"""A run's directory: one run in one place, and what it is made from stays what it was."""

import fcntl
import json
import os
import re
import shutil
import signal
import socket
import warnings
from pathlib import Path

import pytest
import torch

from kdkernels.training import InputError, train, trainer
from kdkernels.training.cli import main
from kdkernels.training.errors import Stopped
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.processes import distributed
from kdkernels.training.run import lock
from kdkernels.training.run.directory import BEGINNING, RunDirectory
from kdkernels.training.run.identity import identify
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD, final_weights


@pytest.fixture(autouse=True)
def started():
    distributed.start()


def create(config) -> RunDirectory:
    """A run that was killed before its first checkpoint."""
    run = RunDirectory(config.run.output)
    start = run.find_start(config, resume=False)
    run.root.mkdir(parents=True)
    run.create(config, load_tokenizer(config), start.inputs)
    return run


def test_a_new_run_needs_an_empty_directory(load, tmp_path):
    config = load()
    run = create(config)
    with pytest.raises(InputError, match=r"\[run\] output: .* is not empty.* did not end: continue it with --resume"):
        run.find_start(config, resume=False)
    with pytest.warns(UserWarning, match=r"no checkpoint yet in .*: the run starts from its beginning"):
        start = run.find_start(config, resume=True)
    assert (start.checkpoint, start.progress, start.tokenizer) == (None, BEGINNING, run.tokenizer)
    for resume in (False, True):
        with pytest.raises(InputError, match="what it holds is no run: give another directory"):
            RunDirectory(tmp_path).find_start(config, resume)


def test_resuming_with_another_recipe_names_the_difference(load, teacher_set):
    run = create(load())
    with pytest.raises(InputError) as refusal:
        run.find_start(load("train.steps=5", "optimizer.lr=0.5"), resume=True)
    told = str(refusal.value)
    assert "optimizer.lr: 0.01 -> 0.5; train.steps: 3 -> 5. What a run may change is to be asked for by name: " in told
    assert told.endswith("--resume --set optimizer.lr=0.5 --set train.steps=5")
    with pytest.raises(InputError, match=r"objective.name: 'SFT' -> 'GKD'.*objective.beta: None -> 0.9"):
        run.find_start(load(*GKD, teacher_set), resume=True)


def test_a_run_of_another_version_is_known_as_such(load, interrupted):
    """Its checkpoints are not called damaged, and its recipe not changed."""
    config = Path(load().run.output, "config.toml")
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if "timeout_seconds" not in line and "max_skipped" not in line))
    with pytest.raises(InputError) as refusal:
        train(load(*interrupted), resume=True)
    assert (
        "begun by another version of kdkernels, which did not know run.timeout_seconds, train.max_skipped_steps: con"
        in (str(refusal.value))
    )


@pytest.mark.parametrize("killed_at", ["config.toml", "tokenizer", "inputs.json"])
def test_a_kill_while_the_run_begins_leaves_a_way_on(load, killed_at):
    """There is no state in which a new run says --resume, and --resume says that there is nothing to resume."""
    expected = final_weights(train(load()).output)
    shutil.rmtree(load().run.output)
    run = create(load())
    (run.root / "run.lock").write_text("pid 1 on nowhere")
    order = [run.config, run.tokenizer, run.inputs]
    for path in order[[path.name for path in order].index(killed_at) :]:
        path.rename(path.with_name(f"unfinished-{path.name}"))
    if killed_at != "config.toml":
        with pytest.raises(InputError, match="continue it with --resume"):
            train(load())
    missing = "run" if killed_at == "config.toml" else "checkpoint"
    with pytest.warns(UserWarning, match=f"--resume: no {missing} yet in .*: the run starts from its beginning"):
        result = train(load(), resume=True)
    assert all(torch.equal(weight, expected[name]) for name, weight in final_weights(result.output).items())
    assert not list(run.root.glob("unfinished*")) and not (run.root / "run.lock").exists()


def test_a_lock_is_removed_where_it_is_nobodys(tmp_path):
    with lock.locked(tmp_path):
        lock.remove_if_nobodys(tmp_path)
        assert (tmp_path / lock.NAME).is_file()
    lock.remove_if_nobodys(tmp_path)
    (tmp_path / lock.NAME).touch()
    lock.remove_if_nobodys(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_is_said_of_a_finished_run_is_true(load):
    train(load("checkpoint.every=0"))
    with pytest.raises(
        InputError, match=r"holds a finished run with its model in .*final: give another directory"
    ) as new:
        train(load("checkpoint.every=0"))
    assert "delete" not in str(new.value)


@pytest.mark.parametrize("every", [0, 1])
def test_one_command_for_a_job_scheduler(recipe, tmp_path, capsys, monkeypatch, every):
    """--resume begins where nothing is there, goes on where something is, and does nothing where all is done."""
    command = ["train", str(recipe), "--resume", f"--set=checkpoint.every={every}"]
    once, steps = trainer.train_step, []

    def interrupted(*arguments, **options):
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return once(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    with pytest.warns(UserWarning, match="--resume: no run yet in .*: the run starts from its beginning"):
        assert main(command) == 130
    warnings.filterwarnings("ignore", "--resume: no checkpoint yet")
    assert main(command) == 0
    assert len(steps) == 3 + (1 if every else 3)
    left = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    capsys.readouterr()
    (tmp_path / "run" / lock.NAME).write_text("pid 1, killed right behind its end")  # it is gone below
    assert main(command) == 0 and len(steps) == 3 + (1 if every else 3)
    said = f"{tmp_path}/run: the run is finished, nothing is left to do\nmodel: {tmp_path}/run/final\n"
    assert said in capsys.readouterr().out
    assert main([*command, "--dry-run"]) == 0
    assert said.splitlines()[0] in capsys.readouterr().out
    assert main([*command, "--set=optimizer.lr=0.5", "--set=checkpoint.keep=9"]) == 0
    late = "; without more steps, this changes nothing: optimizer.lr: 0.01 -> 0.5; checkpoint.keep: 2 -> 9\nmodel: "
    assert f"{said.splitlines()[0]}{late}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == left
    assert main([*command, "--set=run.seed=4"]) == 2
    assert "run.seed: 3 -> 4" in capsys.readouterr().err
    if not every:
        assert main([*command, "--set=train.steps=4"]) == 2
        assert "is finished and kept no checkpoint from which it could go on" in capsys.readouterr().err
    change_one_byte(tmp_path / "train.jsonl")
    assert main(command) == 2
    assert "[data] train" in capsys.readouterr().err


@pytest.fixture
def interrupted(load, teacher_set, tmp_path):
    """The overrides of a run that came to step 2 of 3 and has teacher, held-out data and a student from a directory."""
    shutil.copytree(teacher_set.removeprefix("teacher.path="), tmp_path / "teacher")
    shutil.copytree(teacher_set.removeprefix("teacher.path="), tmp_path / "student")
    overrides = (
        *GKD[:1],
        f"teacher.path={tmp_path / 'teacher'}",
        f"evaluation.data={tmp_path / 'test.jsonl'}",
        'evaluation.metrics=["kl"]',
        "checkpoint.every=1",
        "rollout.student_fraction=0",
    )
    result = train(load(*overrides))
    shutil.rmtree(result.output / "checkpoints" / "step-000003")
    shutil.rmtree(result.final)
    return overrides


def change_one_byte(path: Path) -> None:
    """A change that neither the size nor the date of the file shows."""
    before = path.stat()
    contents = bytearray(path.read_bytes())
    contents[-7] ^= 1
    path.write_bytes(contents)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("train.jsonl", r"\[data\] train \(.*train.jsonl\): its contents changed"),
        ("test.jsonl", r"\[evaluation\] data \(.*test.jsonl\): its contents changed"),
        ("teacher/model.safetensors", r"\[teacher\] path \(.*teacher\): model.safetensors changed"),
        ("run/tokenizer/tokenizer.json", r"\[tokenizer\] \(.*run/tokenizer\): tokenizer.json changed"),
    ],
)
def test_what_changed_since_the_beginning_is_named(load, interrupted, tmp_path, file, told):
    change_one_byte(tmp_path / file)
    with pytest.raises(InputError, match=f"--resume: the run in .* was made from something else: {told}. Put back"):
        train(load(*interrupted), resume=True)


def test_a_student_that_changed_is_named(load, teacher_set, tmp_path):
    shutil.copytree(teacher_set.removeprefix("teacher.path="), tmp_path / "student")
    recipe = (tmp_path / "recipe.toml").read_text()
    head, rest = recipe.split("[student]")[0], recipe.split("[data]")[1]
    (tmp_path / "recipe.toml").write_text(f'{head}[student]\npath = "{tmp_path / "student"}"\n[data]{rest}')
    result = train(load("checkpoint.every=1"))
    assert json.loads((result.output / "inputs.json").read_text()).keys() == {
        "[data] train",
        "[student] path",
        "[tokenizer] path",
    }
    change_one_byte(tmp_path / "student" / "model.safetensors")
    (tmp_path / "student" / "generation_config.json").unlink()
    (tmp_path / "student" / "README.md").write_text("no part of the model")
    with pytest.raises(InputError) as refusal:
        train(load("checkpoint.every=1"), resume=True)
    for text in ("[student] path", "generation_config.json is missing", "model.safetensors changed"):
        assert text in str(refusal.value)
    assert "README" not in str(refusal.value)


def test_the_trained_tokenizer_stays_the_runs_own(load, interrupted, tmp_path, monkeypatch):
    """Trained anew, it could be another one: of another version of tokenizers, or of a file that changed meanwhile."""

    def trained_again(*_):
        raise AssertionError("the tokenizer was trained again")

    monkeypatch.setattr("kdkernels.training.models.loading.train_tokenizer", trained_again)
    result = train(load(*interrupted), resume=True)
    kept = [(result.output / place / "tokenizer.json").read_bytes() for place in ("tokenizer", "final")]
    assert kept[0] == kept[1]


def test_a_trained_tokenizer_that_is_gone_is_missed(load, interrupted, tmp_path):
    shutil.rmtree(tmp_path / "run" / "tokenizer")
    with pytest.raises(InputError, match=r"--resume: .*run/tokenizer is missing, the tokenizer that the run trained"):
        train(load(*interrupted), resume=True)


def test_a_run_that_moved_goes_on(load, interrupted, tmp_path, monkeypatch):
    """The directory under another name, every path written in another way, the data somewhere else."""
    expected = [line["loss"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")[1:]]
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(tmp_path / "moved")
    (tmp_path / "data").mkdir()
    (tmp_path / "train.jsonl").rename(tmp_path / "data" / "train.jsonl")
    monkeypatch.chdir(tmp_path)
    result = train(
        load(
            *interrupted,
            "run.output=./data/../link",
            "data.train=data/train.jsonl",
            "teacher.path=./teacher",
            "evaluation.data=test.jsonl",
        ),
        resume=True,
    )
    assert [line["loss"] for line in read_metrics(tmp_path / "moved" / "metrics.jsonl")[1:]] == expected
    assert (result.final / "model.safetensors").is_file()


def test_a_model_of_the_hub_is_known_by_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    for folder in (snapshot, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert identify({"[teacher] path": "owner/name"}) == {"[teacher] path": f"commit {commit}"}
    with pytest.raises(InputError, match=r"\[teacher\] path: owner/other cannot be read"):
        identify({"[teacher] path": "owner/other"})


@pytest.fixture
def occupied(load):
    """The directory of a run, held by somebody else."""
    root = Path(load().run.output)
    root.mkdir()
    with (root / lock.NAME).open("w") as file:
        file.write("pid 4711 on elsewhere, since 2026-01-01 00:00:00")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)  # of this open file: the run opens the file again
        yield root


@pytest.mark.parametrize("arguments", [[], ["--resume"], ["--dry-run"], ["--dry-run", "--resume"]])
def test_one_run_at_a_time(recipe, occupied, capsys, arguments):
    before = sorted(occupied.rglob("*"))
    assert main(["train", str(recipe), *arguments]) == 2
    _, said = capsys.readouterr().err.splitlines()  # the first line says that libraries are loaded
    assert f"another run is in {occupied} (pid 4711 on elsewhere, since 2026-01-01 00:00:00)" in said
    assert sorted(occupied.rglob("*")) == before


def test_the_owner_of_a_lock_is_named(tmp_path):
    directory = tmp_path / "a" / "b"
    with lock.locked(directory), pytest.raises(InputError) as refusal, lock.locked(directory):
        pass
    told = rf"\(pid {os.getpid()} on {re.escape(socket.gethostname())}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d\)"
    assert re.search(told, str(refusal.value))
    assert not (tmp_path / "a").exists()  # nothing was written
    with lock.locked(directory):
        (directory / "config.toml").touch()
    assert [path.name for path in directory.iterdir()] == ["config.toml"]


def test_a_lock_of_a_killed_run_is_none(tmp_path, load):
    root = Path(load().run.output)
    root.mkdir()
    (root / lock.NAME).write_text("pid 1 on elsewhere, since 2026-01-01 00:00:00")
    train(load())


def test_a_lock_that_is_a_link_is_not_followed(load, tmp_path):
    """A run directory of somebody else's must not make a resumption write into files outside it."""
    (tmp_path / "mine").write_text("precious")
    root = Path(load().run.output)
    root.mkdir()
    (root / lock.NAME).symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match=r"\[run\] output: .*run.lock cannot be locked: Too many levels of symbolic"):
        train(load())
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_directory_that_cannot_be_written(load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"\[run\] output: .*file/run/run.lock cannot be locked: Not a directory"):
        train(load(f"run.output={tmp_path / 'file' / 'run'}"))


def test_a_damaged_log_is_put_back(load, interrupted):
    """From the checkpoint, whether it was cut, changed or deleted; nothing of it is lost, nothing is there twice."""
    run = RunDirectory(load(*interrupted).run.output)
    expected = [(line["step"], line.get("loss")) for line in read_metrics(run.metrics)]
    whole = run.metrics.read_bytes()
    for damage in (whole[:200], whole[:50] + b"\x00" + whole[51:], whole.replace(b'"step": 1', b'"step": 7'), None):
        run.metrics.unlink()
        if damage is not None:
            run.metrics.write_bytes(damage)
        for path in (run.final, run.checkpoints / "step-000003"):
            shutil.rmtree(path, ignore_errors=True)
        with pytest.warns(UserWarning, match=r"metrics.jsonl was damaged: its lines are put back from .*step-000002"):
            train(load(*interrupted), resume=True)
        assert [(line["step"], line.get("loss")) for line in read_metrics(run.metrics)] == expected


def test_a_damaged_log_is_an_input_error(tmp_path):
    for text in ("{}\n", "[1]\n", '{"step": "x"}\n', "{\n", "[" * 100_000 + "\n"):
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + text)
        with pytest.raises(InputError, match=r"metrics.jsonl, line 2: damaged"):
            read_metrics(tmp_path / "metrics.jsonl")


def test_the_identity_of_a_model_is_that_of_its_files(load, tmp_path):
    config = load()
    tokenizer = load_tokenizer(config)
    load_student(config, tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "pictures").mkdir()
    known = identify({"a": str(tmp_path / "model"), "b": str(tmp_path / "model"), "c": str(tmp_path / "train.jsonl")})
    assert known["a"] == known["b"] and known["a"].keys() == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
    }
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in (known["c"], *known["a"].values()))


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("config.toml", "x = 1"),
        ("config.toml", "run = [[" + "[" * 100_000),
        ("config.toml", "\x00"),
        ("inputs.json", "[1]"),
        ("inputs.json", "[" * 100_000),
        ("inputs.json", ""),
    ],
    ids=range(6),
)
def test_a_damaged_file_of_the_run_is_an_input_error(load, name, contents):
    run = create(load())
    (run.root / name).write_text(contents)
    warnings.filterwarnings("ignore", "--resume: no checkpoint yet")
    with pytest.raises(InputError, match=name):
        run.find_start(load(), resume=True)


def test_sigterm_while_the_directory_is_locked_leaves_nothing(load, monkeypatch):
    own, config = lock._own, load()

    def owned(path: Path, key: str) -> int:
        handle = own(path, key)
        os.kill(os.getpid(), signal.SIGTERM)
        return handle

    monkeypatch.setattr(lock, "_own", owned)
    with pytest.raises(Stopped, match="before training began"):
        train(config)
    assert not Path(config.run.output).exists()
