"""Checkpoints: found or refused as a whole, whatever happened to their files, and nothing in them is executed."""

import hashlib
import json
import os
import shutil

import pytest
import torch

from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.distillation import Distillation
from kdkernels.training import InputError, train
from kdkernels.training.deepspeed_strategy import DeepSpeedStrategy
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.processes import distributed
from kdkernels.training.run import checkpoint

from .conftest import final_weights
from .test_engine import stage_set


@pytest.fixture(autouse=True)
def started():
    distributed.start()


class OneWeight:
    """What a checkpoint asks of a strategy."""

    def state(self):
        return {"weight": torch.ones(1)}, {}


INPUTS = {"[data] train": "a hash"}


def save(directory, *steps, keep=9):
    log = directory / "log"
    log.write_text("{}\n")
    for step in steps:
        checkpoint.save(OneWeight(), directory, {"step": step, "position": 4 * step}, INPUTS, log, keep)


def newest(directory):
    path, contents = checkpoint.newest_sound(directory)
    return path.name, contents.progress


def test_resuming_needs_a_checkpoint_of_as_many_processes(tmp_path, monkeypatch):
    assert checkpoint.newest_sound(tmp_path) is None
    save(tmp_path, 2, 4)
    assert newest(tmp_path) == ("step-000004", {"step": 4, "position": 16})
    assert checkpoint.newest_sound(tmp_path)[1].inputs == INPUTS
    progress = tmp_path / "step-000004" / "progress.json"
    rewrite(progress, lambda contents: contents | {"processes": 2})
    with pytest.raises(InputError, match="written by 2 processes; expected as many now, got 1: resume with 2, or"):
        checkpoint.newest_sound(tmp_path)


def rewrite(progress, change):
    """Changes a progress.json as somebody would who knows how it is made."""
    contents = json.dumps(change(json.loads(json.loads(progress.read_text())["contents"])))
    progress.write_text(json.dumps({"contents": contents, "sha256": hashlib.sha256(contents.encode()).hexdigest()}))


@pytest.mark.parametrize("name", ["shared.pt", "process-00000.pt", "metrics.jsonl", "progress.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, name, damage):
    save(tmp_path, 2, 4, 6)
    file = tmp_path / "step-000006" / name
    contents = file.read_bytes()
    file.write_bytes(contents[:-1] if damage == "cut" else bytes([contents[0] ^ 1]) + contents[1:])
    if damage == "missing":
        file.unlink()
    with pytest.warns(UserWarning, match=r"--resume: .*step-000006 is damaged: .*; trying the one before it") as warned:
        assert newest(tmp_path) == ("step-000004", {"step": 4, "position": 16})
    assert len(warned) == 1 and name in str(warned[0].message)
    save(tmp_path, 5, keep=1)  # the damaged one is newer, but of no use
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000005"]
    assert newest(tmp_path)[1]["step"] == 5


@pytest.mark.parametrize(
    "text",
    ["", "[" * 100_000, "[]", "{}", '{"contents": 1, "sha256": 2}', '{"contents": "{}", "sha256": "x"}', "\x00\xff"],
)
def test_whatever_progress_json_holds_is_damage(tmp_path, text):
    save(tmp_path, 2, 4)
    (tmp_path / "step-000004" / "progress.json").write_text(text)
    with pytest.warns(UserWarning, match=r"step-000004 is damaged: the contents of progress.json changed"):
        assert newest(tmp_path)[0] == "step-000002"


@pytest.mark.parametrize(
    "change",
    [{"progress": {"step": 4, "position": -5}}, {"progress": {"step": 4, "position": "16"}}, {"inputs": [1]}],
)
def test_a_progress_json_that_somebody_edited_is_damage(tmp_path, change):
    save(tmp_path, 2, 4)
    rewrite(tmp_path / "step-000004" / "progress.json", lambda contents: contents | change)
    with pytest.warns(UserWarning, match=r"step-000004 is damaged: the contents of progress.json changed: expected"):
        assert newest(tmp_path)[0] == "step-000002"


def test_a_step_is_that_of_its_directory(tmp_path):
    save(tmp_path, 2, 4)
    (tmp_path / "step-000004").rename(tmp_path / "step-000400")
    with pytest.warns(UserWarning, match="step-000400 is damaged: .*of step 4"):
        assert newest(tmp_path)[0] == "step-000002"
    progress = tmp_path / "step-000002" / "progress.json"
    progress.write_text(progress.read_text().replace("step", "stop"))  # a changed letter in the numbers themselves
    with pytest.warns(UserWarning, match="is damaged"), pytest.raises(InputError, match="no checkpoint that can be"):
        checkpoint.newest_sound(tmp_path)


def test_without_a_sound_checkpoint_there_is_no_resuming(tmp_path):
    save(tmp_path, 2, 4)
    for path in checkpoint.complete(tmp_path):
        (path / "progress.json").unlink()
    with (
        pytest.warns(UserWarning, match="is damaged") as warned,
        pytest.raises(InputError, match=r"no checkpoint that can be read.*or move .* away to train from the beginning"),
    ):
        checkpoint.newest_sound(tmp_path)
    assert len(warned) == 2


def test_checkpoints_that_lie_elsewhere(tmp_path):
    """Links to another disk: read like the others, and deleted as links."""
    save(tmp_path, 2, 4)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(tmp_path / "step-000002", elsewhere)
    (tmp_path / "step-000002").symlink_to(elsewhere / "step-000002")
    (tmp_path / "step-000003").symlink_to(elsewhere / "nothing")
    (tmp_path / "step-000001").write_text("no directory")
    assert newest(tmp_path)[0] == "step-000004"
    save(tmp_path, 5, keep=1)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000005"]
    assert (elsewhere / "step-000002" / "shared.pt").is_file()


class Code:
    """Runs a command when it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["shared.pt", "process-00000.pt"])
def test_resuming_executes_nothing(load, tmp_path, name, stage):
    """The state of every ZeRO stage is numbers and text; code hidden in it, with fitting hashes, is not run."""
    dtype = "float32" if stage == 1 else "bfloat16"
    overrides = (f"deepspeed.zero_stage={stage}", f"run.dtype={dtype}", "checkpoint.every=1")
    result = train(load(*overrides))
    shutil.rmtree(result.final)
    newest = result.output / "checkpoints" / "step-000003"
    state = torch.load(newest / name, weights_only=True)
    torch.save(state | {"extra": Code(tmp_path / "executed")}, newest / name)
    with pytest.raises(Exception, match="weights_only"):
        torch.load(newest / name, weights_only=True)
    found = hashlib.sha256((newest / name).read_bytes()).hexdigest()
    rewrite(newest / "progress.json", lambda old: old | {"sha256": old["sha256"] | {name: found}})
    with pytest.raises(InputError, match=rf"--resume: .*{name} holds something else than tensors, numbers and text"):
        train(load(*overrides), resume=True)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_model_is_an_input_error(load):
    result = train(load("checkpoint.every=1"))
    config = load("student.architecture.hidden_size=8")
    tokenizer = load_tokenizer(config)
    module = Distillation(load_student(config, tokenizer), config.objective.build(), vocabulary_size(tokenizer))
    with pytest.raises(InputError, match=r"step-000003 is not of this run: RuntimeError: .*size mismatch"):
        checkpoint.restore(DeepSpeedStrategy(config, module), result.output / "checkpoints" / "step-000003")


@pytest.mark.parametrize(
    ("stage", "dtype"),  # ZeRO 1 in bfloat16, the default there, is what test_processes kills
    [
        (0, "float32"),
        (0, "bfloat16"),
        (1, "float32"),
        (2, "float32"),
        (2, "bfloat16"),
        pytest.param(3, "float32", marks=pytest.mark.slow),
        (3, "bfloat16"),
        pytest.param("1 offloaded", "float32", marks=pytest.mark.slow),
        ("2 offloaded", "bfloat16"),
        pytest.param("3 offloaded", "bfloat16", marks=pytest.mark.slow),
        pytest.param("3 offloaded", "float32", marks=pytest.mark.slow),
    ],
)
def test_every_state_is_restored_to_the_bit(load, in_parts, tmp_path, stage, dtype):
    overrides = (*stage_set(stage), f"run.dtype={dtype}", "checkpoint.every=2", "train.steps=4")
    whole = train(load(*overrides, f"run.output={tmp_path / 'whole'}"))
    for path in (whole.output / "checkpoints" / "step-000004", whole.final):
        shutil.rmtree(path)
    before = (whole.output / "metrics.jsonl").read_text().splitlines()
    expected = final_weights(train(load(*overrides)).output)
    again = train(load(*overrides, f"run.output={tmp_path / 'whole'}"), resume=True)
    after = (whole.output / "metrics.jsonl").read_text().splitlines()
    assert after[:2] == before[:2] and len(after) == 4
    weights = final_weights(again.output)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
