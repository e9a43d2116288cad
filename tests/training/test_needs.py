"""What a run needs: the estimate against what a run really took, and what is refused before anything is made."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from kdkernels.compute import gemm
from kdkernels.training import InputError, needs, train
from kdkernels.training.cli import main
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.run.checkpoint import complete

from .conftest import GKD
from .test_engine import stage_set

LARGER = ("student.architecture.hidden_size=96", "student.architecture.intermediate_size=512", "train.steps=2")
Usage = namedtuple("Usage", "total used free")


def size(directory):
    return sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())


@pytest.mark.parametrize(
    ("dtype", "stage"),
    [
        ("float32", 0),
        pytest.param("bfloat16", "1 offloaded", marks=pytest.mark.slow),
        ("float32", "3 offloaded"),
        ("float32", 1),
        ("bfloat16", 0),
        ("bfloat16", 1),
        ("bfloat16", 2),
        pytest.param("float32", 3, marks=pytest.mark.slow),
        ("bfloat16", 3),
    ],
)
def test_the_estimate_is_what_a_run_takes_on_the_disk(load, dtype, stage):
    config = load(*LARGER, f"run.dtype={dtype}", *stage_set(stage))
    needed = needs.needs(config, load_student(config, load_tokenizer(config), meta=True), None)
    result = train(config)
    for checkpoint in complete(result.output / "checkpoints"):
        assert needed.checkpoint < size(checkpoint) < 1.05 * needed.checkpoint
    assert needed.final < size(result.final) < 1.05 * needed.final
    assert len(complete(result.output / "checkpoints")) == needed.written == 2
    weights = sum(one.numel() for one in load_student(config, load_tokenizer(config), meta=True).parameters())
    assert needed.memory["student"] == weights * (2 if dtype == "bfloat16" else 4)
    optimizer = needed.offloaded if "offloaded" in str(stage) else needed.memory["optimizer"]
    assert optimizer == weights * (16 if needed.offloaded else 8 if dtype == "float32" and stage in (0, 3) else 12)


@pytest.mark.parametrize(
    ("written", "keep", "expected"), [(0, 2, 7), (1, 2, 107), (2, 2, 207), (3, 2, 300), (9, 2, 300), (9, 1, 200)]
)
def test_the_worst_moment(written, keep, expected):
    assert needs.Needs({}, checkpoint=100, final=7, written=written, keep=keep).disk() == expected


@pytest.mark.parametrize("dry", [True, False])
def test_a_disk_that_cannot_hold_the_run_is_refused(recipe, tmp_path, capsys, monkeypatch, dry):
    arguments = ["train", str(recipe), *(f"--set={text}" for text in LARGER), *(["--dry-run"] if dry else [])]
    assert main([*arguments[:5], "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "disk: at most " in printed and "2 checkpoints of " in printed and "memory: " in printed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 10**5))
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert "[run] output: expected " in printed and "got 97.7 KiB: free some, write fewer" in printed
    assert not (tmp_path / "run").exists()


def test_what_is_there_of_a_resumed_run_counts(load, monkeypatch):
    result = train(load(*LARGER))
    taken = size(result.output / "checkpoints")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 0, 0))
    needed = needs.Needs({}, checkpoint=taken // 2, final=0, written=2, keep=1)
    needs.check_disk(needs.RunDirectory(result.output), needed)
    with pytest.raises(InputError, match=r"\[run\] output: expected .* on the disk of"):
        needs.check_disk(needs.RunDirectory(result.output), needs.Needs({}, taken, 0, 2, 1))


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("output", ["train.jsonl", "train.jsonl/run"])
def test_an_output_that_cannot_be_a_directory_is_refused(recipe, tmp_path, capsys, output, dry):
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", str(recipe), f"--set=run.output={tmp_path / output}", *(["--dry-run"] if dry else [])]
    assert main(arguments) == 2
    assert f"kdkernels: [run] output: {tmp_path / output}" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_that_must_not_be_written_is_refused(recipe, tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(needs.os, "access", lambda path, mode: asked.append(path))
    assert main(["train", str(recipe), "--dry-run", f"--set=run.output={tmp_path}/a/b"]) == 2
    assert asked == [tmp_path]
    assert (
        f"nothing can be written into {tmp_path}/a/b: no permission to write into {tmp_path}" in capsys.readouterr().err
    )


def test_memory_beyond_what_there_is_is_told(recipe, teacher_set, capsys, monkeypatch):
    arguments = ["train", str(recipe), "--dry-run", *(f"--set={text}" for text in (*GKD, teacher_set))]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert ", teacher 1" in printed and "more than there is" not in printed
    monkeypatch.setattr(Path, "read_text", lambda path, **_: "MemTotal: 9 kB\nMemAvailable: 8 kB")
    assert needs.free_memory() == 8192
    monkeypatch.undo()
    monkeypatch.setattr(needs, "free_memory", lambda: 8192)
    assert main(arguments) == 0
    assert "free for each: 8.0 KiB; more than there is" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("units", [False, True])
def test_what_bfloat16_costs_without_units_for_it_is_told_once(recipe, tmp_path, capsys, monkeypatch, dtype, units):
    monkeypatch.setattr(gemm, "_has_units", lambda operand: units)
    expected = int(dtype == "bfloat16" and not units)
    arguments = ["train", str(recipe), f"--set=run.dtype={dtype}", "--set=train.steps=2"]
    for way in (["--dry-run"], [], ["--resume"]):
        shutil.rmtree(tmp_path / "run" / "final", ignore_errors=True)
        assert main([*arguments, *way]) == 0
        printed = capsys.readouterr().out
        assert printed.count('set dtype = "float32"') == printed.count("has no units for bfloat16") == expected
