"""Training in processes of its own: killed and resumed, shared by two, started from the command line."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kdkernels.training import load_config, train
from kdkernels.training.cli import main
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD, final_weights

EXACT_MATCH = (
    "evaluation.data={root}/test.jsonl",
    'evaluation.metrics=["exact_match"]',
    "evaluation.answer='#(.*)'",
)
COMMAND = (sys.executable, "-m", "kdkernels", "train")
IN_PARTS = (sys.executable, "-m", "tests.training.in_parts", "train")


def start(command, *arguments, cwd) -> subprocess.Popen:
    # a child must find the package from any directory, installed or not, and say where it was when a signal ended it
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONFAULTHANDLER": "1"}
    with (cwd / "output.txt").open("w") as output:
        return subprocess.Popen([*command, *arguments], cwd=cwd, env=environment, stdout=output, stderr=output)


def finish(process: subprocess.Popen, cwd) -> str:
    """What the process printed; it must succeed."""
    status = process.wait(timeout=240)
    printed = (cwd / "output.txt").read_text()
    assert status == 0, f"exit status {status}; the end of what was printed:\n{printed[-8000:]}"
    return printed


TIMES = ("time/", "tokens_per_second", "peak_memory_gib")


def untimed(run: Path):
    kept = [
        {name: value for name, value in line.items() if not name.startswith(TIMES)}
        for line in read_metrics(run / "metrics.jsonl")
    ]
    assert len(kept[-1]) > 5
    return kept


def kill_at_a_random_moment(process: subprocess.Popen, run: Path, cwd: Path, moment: float) -> None:
    """Kills the process some time after it has written one more checkpoint than there is now."""

    def newest():
        return max((path.name for path in (run / "checkpoints").glob("step-*")), default="")

    before = newest()
    deadline = time.monotonic() + 240
    while newest() <= before:
        assert process.poll() is None and time.monotonic() < deadline, (cwd / "output.txt").read_text()
        time.sleep(0.005)
    time.sleep(moment)
    assert process.poll() is None, "the run ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize(("dtype", "kills"), [("float32", 2), ("bfloat16", 1)])
def test_a_killed_run_resumes_bit_for_bit(recipe, teacher_set, tmp_path, dtype, kills):
    overrides = [
        *GKD,
        teacher_set,
        f"run.dtype={dtype}",
        "rollout.student_fraction=0.5",
        "train.steps=60",
        "data.by_length=true",
        "checkpoint.every=2",
        f"evaluation.data={tmp_path / 'test.jsonl'}",
        "evaluation.every=10",
        'evaluation.metrics=["cross_entropy", "kl"]',
    ]
    arguments = [str(recipe), *(f"--set={override}" for override in overrides)]
    finish(start(COMMAND, *arguments, f"--set=run.output={tmp_path / 'whole'}", cwd=tmp_path), tmp_path)

    run, resume = tmp_path / "run", []
    moments = [random.uniform(0, 0.2) for _ in range(kills)]
    for moment in moments:
        kill_at_a_random_moment(start(COMMAND, *arguments, *resume, cwd=tmp_path), run, tmp_path, moment)
        assert not (run / "final").exists()
        resume = ["--resume"]
    killed_at = len(read_metrics(run / "metrics.jsonl"))
    finish(start(COMMAND, *arguments, *resume, cwd=tmp_path), tmp_path)

    assert killed_at < 61
    lines, expected = untimed(run), untimed(tmp_path / "whole")
    assert [line["step"] for line in lines] == list(range(61))
    assert lines == expected, f"killed {moments} seconds after a checkpoint"
    whole, resumed = final_weights(tmp_path / "whole"), final_weights(run)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole), (
        f"killed {moments} seconds after a checkpoint"
    )


# test_exact_means.py has two processes under stage 3
@pytest.mark.parametrize("stage", [0, *(pytest.param(stage, marks=pytest.mark.slow) for stage in (2, 3))])
def test_two_processes_compute_what_one_does(recipe, teacher_set, tmp_path, stage):
    overrides = [
        *GKD,
        teacher_set,
        "rollout.student_fraction=0",
        "train.micro_batch_size=1",
        "checkpoint.every=2",
        f"deepspeed.zero_stage={stage}",
        f"evaluation.data={tmp_path / 'test.jsonl'}",
        'evaluation.metrics=["kl"]',
    ]
    alone = train(load_config(recipe, [*overrides, f"run.output={tmp_path / 'alone'}"]))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *IN_PARTS[1:])
    arguments = [str(recipe), *(f"--set={override}" for override in overrides)]
    finish(start(launcher, *arguments, cwd=tmp_path), tmp_path)
    run = tmp_path / "run"
    for line, expected in zip(untimed(run), untimed(alone.output), strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-7)
    shared, expected = final_weights(run), final_weights(alone.output)
    assert max((shared[name] - expected[name]).abs().max() for name in expected) < 2e-5
    records = [(path / "evaluation-000003.jsonl").read_text().count("\n") for path in (run, alone.output)]
    assert records == [8, 8]

    # the last step again, from the checkpoint of both processes
    shutil.rmtree(run / "final")
    (run / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").read_text().splitlines(keepends=True)[:-1]))
    finish(start(launcher, *arguments, "--resume", cwd=tmp_path), tmp_path)
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == [0, 1, 2, 3]
    again = final_weights(run)
    assert all(torch.equal(again[name], shared[name]) for name in shared)


def test_the_command_line(recipe, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    printed = finish(start(COMMAND, str(recipe), "--set=train.steps=2", cwd=elsewhere), elsewhere)
    assert "step 2/2" in printed and "32 examples" in printed
    first = "  text    '0+0=' | '0.<eos>'\n  tokens  0 + 0 = | 0 . <eos>\n  4 tokens | 3\n"
    assert (
        first in printed
        and f"```\nfirst example, line 1 of {tmp_path / 'train.jsonl'}:\n{first}```\n"
        in (tmp_path / "run" / "report.md").read_text()
    )
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
    assert [path.name for path in elsewhere.iterdir()] == [
        "output.txt"
    ]  # nothing else falls into the current directory


def test_a_dry_run_tells_everything_and_writes_nothing(recipe, teacher_set, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", str(recipe), "--dry-run", *(f"--set={override}" for override in (*GKD, teacher_set))]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert 'name = "GKD"\nbeta = 0.9' in printed
    config = load_config(recipe, [*GKD, teacher_set])
    student = load_student(config, load_tokenizer(config)).num_parameters()
    assert f"student: Qwen2ForCausalLM, {student:,} parameters, head " in printed and "teacher: " in printed
    assert "32 examples; left out 0" in printed
    assert "#   text    '0+0=' | ''\n#   tokens  0 + 0 = |\n#   4 tokens | none: nobody reads the responses" in printed
    assert "# 0.38 epochs\n" in printed
    assert "3 steps of 4 responses (2 micro-batches of 2), at most 72 response tokens" in printed
    assert "micro-batch: tokens 2 x 14 (prompt 8, response 6), hidden states of the student 2 x 14 x 24" in printed
    assert "loss: 12 tokens x 16 entries at most, 768 bytes as whole float32 logits of one model\n" in printed
    resolved = tmp_path / "resolved.toml"
    resolved.write_text(printed)
    assert load_config(resolved) == config  # what is printed is a recipe
    assert f"run: {tmp_path / 'run'}" in printed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "train.stepz=3"], "did you mean 'steps'?"),
        (["--set", "data.prompt='{nothing}'"], "line 1: field 'nothing' of [data] prompt is missing"),
        (["--set", "student.architecture.hidden_size=15"], "[student] architecture: RuntimeError: "),
        (["--set", "student.architecture.hidden_size=x"], "[student] architecture: StrictDataclassField"),
        (
            [f"--set={text}" for text in EXACT_MATCH],
            "test.jsonl, line 1: [evaluation] answer '#(.*)' not found in '1.'",
        ),
        (["--set", "data.max_prompt_tokens=40000"], "expected a sum of at most 32768, the max_position_embeddings of"),
    ],
)
@pytest.mark.parametrize("dry", [False, True])
def test_unusable_input_is_told_in_one_line(recipe, tmp_path, capsys, arguments, expected, dry):
    arguments = [argument.replace("{root}", str(tmp_path)) for argument in arguments]
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", str(recipe), *arguments, *(["--dry-run"] if dry else [])]) == 2
    printed = [line for line in capsys.readouterr().err.splitlines() if "loading libraries" not in line]
    assert len(printed) == 1 and printed[0].startswith("kdkernels: ") and expected in printed[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_more_candidates_than_words(recipe, teacher_set, capsys):
    settings = (*GKD, teacher_set, "objective.name=TSDKD", "objective.k=17")
    arguments = ["train", str(recipe), "--dry-run", *(f"--set={text}" for text in settings)]
    assert main(arguments) == 2
    assert "[objective] k: expected at most 16, the tokenizer's vocabulary, got 17" in capsys.readouterr().err
    assert main([*arguments, "--set=objective.k=16"]) == 0


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(load):
    whole = train(load())
    weights = final_weights(whole.output)
    shutil.rmtree(whole.final)
    (whole.output / "checkpoints" / "step-000003" / "process-00000.pt").unlink()
    with pytest.warns(UserWarning, match=r"step-000003 is damaged: .*process-00000\.pt"):
        again = train(load(), resume=True)
    assert [line["step"] for line in read_metrics(again.output / "metrics.jsonl")] == [1, 2, 3]
    assert all(torch.equal(weight, weights[name]) for name, weight in final_weights(again.output).items())


def test_a_run_that_diverges_says_so(recipe, capsys):
    arguments = ["train", str(recipe), "--set=optimizer.lr=1e30", "--set=optimizer.max_grad_norm=0"]
    assert main([*arguments, "--set=train.max_skipped_steps=0"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("kdkernels: step 2: the loss is ")


def test_an_error_that_nobody_foresaw_is_not_a_run_that_diverged(recipe, capsys, monkeypatch):
    def failing(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 1 GiB")

    monkeypatch.setattr("kdkernels.training.step.collate", failing)
    assert main(["train", str(recipe)]) == 70
    printed = capsys.readouterr().err
    assert "Traceback" in printed and "in train_step" in printed
    line = "kdkernels: an error that nobody foresaw: OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB"
    assert printed.splitlines()[-1] == line


def test_a_missing_package_is_named_with_the_extra_that_has_it(tmp_path):
    code = "import sys; sys.modules['deepspeed'] = None; import kdkernels.training as t; t.train"
    process = start((sys.executable, "-c"), code, cwd=tmp_path)
    assert process.wait() != 0
    assert (
        "MissingPackage: kdkernels.training needs deepspeed: pip install kdkernels[train]"
        in (tmp_path / "output.txt").read_text()
    )
