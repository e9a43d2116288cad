"""A student that collapses: what counts as one, that the run ends loudly, and what the log says of both models."""

import pytest
import torch
from transformers import GenerationConfig

from kdkernels.training import InputError, train
from kdkernels.training.cli import main
from kdkernels.training.collapse import Collapse
from kdkernels.training.models.ends import describe_ends
from kdkernels.training.models.loading import load_student, load_teacher, load_tokenizer
from kdkernels.training.processes.exits import COLLAPSED
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD

FINE = {"student_entropy": 0.5, "student_length": 4.0}
LIMITS = ("collapse.steps=3", "collapse.min_entropy=0.1", "collapse.max_entropy=2", "collapse.max_length=5")


@pytest.fixture
def watch(load, teacher_set):
    return lambda *overrides, **state: Collapse(load(*GKD, teacher_set, *LIMITS, *overrides), **state)


@pytest.mark.parametrize(
    ("beyond", "told"),
    [
        ({"student_entropy": 0.09}, "student_entropy is 0.09 nats a token, below min_entropy = 0.1"),
        ({"student_entropy": 2.1}, "student_entropy is 2.1 nats a token, above max_entropy = 2"),
        ({"student_length": 1.5}, "student_length is 1.5 tokens a response, below min_length = 2"),
        ({"student_length": 5.5}, "student_length is 5.5 tokens a response, above max_length = 5"),
    ],
)
def test_a_limit_that_is_left_for_so_many_steps(watch, beyond, told):
    seen = watch()
    bad, data = FINE | beyond, {"student_entropy": 0.01, "teacher_length": 3.0}
    assert [seen.see(one) for one in (bad, bad, FINE, bad, data, bad, data)] == [None] * 7
    assert seen.see(bad) == f"{told}, the last of 3 steps in a row beyond a limit of [collapse]"
    assert watch(in_a_row=2).see(bad) and not watch(in_a_row=1).see(bad)  # as after a checkpoint
    off = watch("collapse.steps=0")
    assert not any(off.see(bad) for _ in range(99))


def test_on_a_limit_is_not_beyond_it(watch):
    seen = watch()
    for on in ({"student_entropy": 0.1}, {"student_entropy": 2.0}, {"student_length": 5.0}, {"student_length": 2.0}):
        assert not any(seen.see(FINE | on) for _ in range(5)) and seen.in_a_row == 0


def test_without_rollouts_the_entropy_counts_at_every_step(load):
    seen = Collapse(load("collapse.steps=2", "collapse.min_entropy=0.1"))
    data = {"student_entropy": 0.01, "teacher_length": 1.0}
    assert seen.see(data) is None and "student_entropy is 0.01" in seen.see(data)


def test_limits_and_defaults(load, teacher_set):
    fixed = load("rollout.student_fraction=0").collapse
    assert (fixed.steps, fixed.min_entropy, fixed.min_length) == (50, 1e-6, None)
    assert load(*GKD, teacher_set).collapse.min_length == 2
    assert load(*GKD, teacher_set, "rollout.max_new_tokens=1").collapse.min_length == 1
    for override, told in (
        ("collapse.max_entropy=1e-7", r"\[collapse\] max_entropy: expected more than min_entropy = 1e-06, got 1e-07"),
        ("collapse.max_length=2", r"\[collapse\] max_length: expected more than min_length = 2, got 2"),
        ("collapse.min_length=7", r"\[collapse\] min_length: expected at most rollout.max_new_tokens = 6, got 7"),
    ):
        with pytest.raises(InputError, match=told):
            load(*GKD, teacher_set, override)
    with pytest.raises(InputError, match=r"\[collapse\] max_length is of what the student writes"):
        load("collapse.max_length=3")


def test_a_collapsed_run_ends_with_a_line_and_a_status(recipe, teacher_set, tmp_path, capsys):
    settings = [*GKD, teacher_set, "train.steps=6", "collapse.steps=4", "collapse.min_entropy=50", "checkpoint.every=3"]
    arguments = ["train", str(recipe), *(f"--set={one}" for one in settings)]
    assert main(arguments) == COLLAPSED == 5
    told = capsys.readouterr().err
    assert "kdkernels: step 4: student_entropy is " in told and "below min_entropy = 50, the last of 4 steps" in told
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 4  # the step that it ends with is in the log
    assert not (tmp_path / "run" / "final").exists()
    assert main([*arguments, "--resume"]) == COLLAPSED  # from step 3: the count was in the checkpoint
    assert "kdkernels: step 4: student_entropy is " in capsys.readouterr().err


def test_a_healthy_run_is_not_stopped(load, teacher_set):
    limits = ("collapse.steps=1", "collapse.max_entropy=3.5", "collapse.max_length=6")
    train(load(*GKD, teacher_set, "train.steps=4", *limits))


@pytest.mark.parametrize(
    "objective", ["SFT", "GKD", "DistiLLM2", "TSDKD", "VCRD"], ids=lambda name: f"{name} logs both models"
)
def test_entropy_and_length_of_both_models_for_every_objective(load, teacher_set, objective):
    options = {"TSDKD": ("objective.k=4",), "VCRD": ("objective.weighting=likelihood_ratio",)}.get(objective, ())
    overrides = () if objective == "SFT" else (*GKD, teacher_set, f"objective.name={objective}", *options)
    run = train(load(*overrides, "train.steps=2")).output
    lines = read_metrics(run / "metrics.jsonl")
    assert all(0 < line["student_entropy"] < torch.tensor(27.0).log() for line in lines)
    assert all(("teacher_entropy" in line) == (objective != "SFT") for line in lines)
    authors = ["teacher" if "teacher_length" in line else "student" for line in lines]
    assert authors == {"SFT": ["teacher"] * 2, "DistiLLM2": ["teacher", "student"], "VCRD": ["teacher", "student"]}.get(
        objective, ["student"] * 2
    )
    for line, author in zip(lines, authors, strict=True):
        assert line[f"{author}_length"] == line["tokens"] / 4
        assert line[f"{author}_finished"] == 1 if author == "teacher" else 0 <= line["student_finished"] <= 1


def test_end_tokens_that_differ_are_told(load, recipe, teacher_set, tmp_path, capsys):
    config = load(*GKD, teacher_set)
    tokenizer = load_tokenizer(config)
    assert train(config) and "the teacher with" not in capsys.readouterr().out
    load_teacher(config, tokenizer).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    end, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("7")
    GenerationConfig(eos_token_id=[other, end]).save_pretrained(tmp_path / "teacher")
    told = f"ends a response with {tokenizer.eos_token!r} ({end}), the teacher with {tokenizer.eos_token!r} ({end}), "
    told += f"'7' ({other})"
    arguments = [f"--set={one}" for one in (*GKD, f"teacher.path={tmp_path / 'teacher'}", f"run.output={tmp_path}/b")]
    for more in (["--dry-run"], []):
        assert main(["train", str(recipe), *arguments, *more]) == 0
        assert told in capsys.readouterr().out


def test_end_tokens_in_another_order_do_not_differ(load, teacher_set):
    config = load(*GKD, teacher_set)
    tokenizer = load_tokenizer(config)
    student, teacher = load_student(config, tokenizer), load_teacher(config, tokenizer)
    student.generation_config.eos_token_id = [5, 4]
    teacher.generation_config.eos_token_id = [4, 5]
    assert describe_ends(config, tokenizer, student, teacher) == []
    assert describe_ends(config, tokenizer, student, None) == []
    teacher.generation_config.eos_token_id = 4
    assert "(5)" in describe_ends(config, tokenizer, student, teacher)[0]
