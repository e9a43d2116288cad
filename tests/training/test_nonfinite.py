"""Numbers that are not finite: a step with one changes nothing on any process, and nothing of them is ever saved."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdkernels.rollouts import LocalSampler
from kdkernels.training import InputError, train, trainer
from kdkernels.training.finite import first_nonfinite
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.run.checkpoint import complete
from kdkernels.training.run.metrics import read_metrics

from .conftest import GKD
from .poison import train_poisoned
from .test_engine import stage_set
from .test_processes import finish, start

ENGINES = [("float32", 0), ("float32", 1), ("float32", 2), ("bfloat16", 0), ("bfloat16", 1), ("bfloat16", 2)]
ENGINES += [("float32", 3), ("bfloat16", 3)]
ENGINES += [("float32", "1 offloaded"), ("bfloat16", "2 offloaded"), ("float32", "3 offloaded")]
SLOWER = [("float32", 3), ("float32", "1 offloaded"), ("float32", "3 offloaded")]
QUICK = {("gradient", *engine) for engine in ENGINES if engine not in SLOWER}
QUICK |= {("loss", "float32", 0), ("loss", "float32", 2)}
CASES = [
    pytest.param(kind, *engine, marks=[] if (kind, *engine) in QUICK else pytest.mark.slow)
    for kind in ("gradient", "loss")
    for engine in ENGINES
]
DIVERGES = ("optimizer.lr=1e30", "optimizer.max_grad_norm=0")


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()


def strictly(path):
    """The lines of a JSON lines file, read as strictly as other programs do."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def engine_set(dtype, stage):
    return f"run.dtype={dtype}", *stage_set(stage)


@pytest.mark.parametrize(("kind", "dtype", "stage"), CASES)
def test_a_step_that_is_not_finite_changes_nothing(load, in_parts, tmp_path, kind, dtype, stage):
    """Weights and optimizer are those of a run that never took the step, to the bit, also afterwards."""
    steps = range(1, 3) if kind == "loss" else range(2, 3)  # with the very first step, AdamW has no moments yet
    common = (*engine_set(dtype, stage), "train.steps=4", "optimizer.weight_decay=0.1", "train.micro_batch_size=1")
    result, digests = train_poisoned(load(*common), kind, steps)
    _, without = train_poisoned(load(*common, f"run.output={tmp_path / 'without'}"), "left out", steps)
    assert digests == without
    for step in range(1, 5):
        assert (digests[step] == digests[step - 1]) == (step in steps), step
    lines = strictly(result.output / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [sum(s <= line["step"] for s in steps) for line in lines]
    for line in lines:
        assert (line["gradient_norm" if kind == "gradient" else "loss"] is None) == (line["step"] in steps)
    assert [line["lr"] for line in lines] == pytest.approx([0.01, 0.01, 0.0075, 0.0025])  # whatever was skipped
    report = result.output.joinpath("report.md").read_text()
    assert f"- {4 - len(steps)} steps of 4 responses" in report
    assert (
        f"- {len(steps)} more steps skipped, their loss or gradient was not finite: {', '.join(map(str, steps))}\n"
        in (report)
    )


def poison_two(recipe, tmp_path, teacher_set, cases):
    """The digests of both processes of each of the `cases`, [dtype, stage, kind, step, rank]."""
    on_policy = [*GKD, teacher_set]
    runs = [
        [
            str(recipe),
            [
                *engine_set(dtype, stage),
                "train.micro_batch_size=1",
                f"run.output={tmp_path}/{dtype}-{stage}-{kind}",
                *(on_policy if kind == "rollout" else ()),
            ],
            [kind, step, rank],
        ]
        for dtype, stage, kind, step, rank in cases
    ]
    (tmp_path / "cases.json").write_text(json.dumps(runs))
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    program = "tests.training.poison"
    printed = finish(start(launcher, program, str(tmp_path / "cases.json"), cwd=tmp_path), tmp_path)
    return json.loads(next(line for line in printed.splitlines() if line.startswith("digests ")).partition(" ")[2])


@pytest.mark.parametrize(
    "cases",
    [
        [
            ("gradient", "float32", 0),
            ("loss", "float32", 0),
            ("gradient", "bfloat16", 1),
            ("loss", "float32", 2),
            ("rollout", "float32", 0),
            ("gradient", "bfloat16", 3),
            ("loss", "float32", 3),
            ("rollout", "float32", 3),
        ],
        pytest.param([(kind, *engine) for kind in ("gradient", "loss") for engine in ENGINES], marks=pytest.mark.slow),
    ],
    ids=["some", "all"],
)
def test_what_one_process_finds_skips_the_step_on_both(recipe, teacher_set, tmp_path, cases):
    cases = [(dtype, stage, kind, 2, 1) for kind, dtype, stage in cases]
    for case, processes in zip(cases, poison_two(recipe, tmp_path, teacher_set, cases), strict=True):
        for digests in processes:
            assert [digests[s] == digests[s - 1] for s in (1, 2, 3)] == [False, True, False], case
        lines = strictly(tmp_path / "{}-{}-{}".format(*case) / "metrics.jsonl")
        assert [line["skipped_steps"] for line in lines] == [0, 1, 1], case


def test_a_run_stops_after_too_many_skipped_steps(load, capsys):
    config = load(*DIVERGES, "train.steps=9", "train.max_skipped_steps=3", "checkpoint.every=1", "checkpoint.keep=9")
    with pytest.raises(FloatingPointError, match=r"^step 5: the loss is nan; 4 steps in a row.*diverged; see .*jsonl$"):
        train(config)
    run = Path(config.run.output)
    assert [line["skipped_steps"] for line in strictly(run / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert [path.name for path in complete(run / "checkpoints")] == ["step-000001"]  # the last one with a finite step
    assert not (run / "final").exists() and not (run / "report.md").exists()
    assert "step 3: the loss is nan: skipped" in capsys.readouterr().out


def test_the_number_of_skipped_steps_in_a_row_starts_anew_after_a_sound_one(load):
    config = load("train.steps=6", "train.max_skipped_steps=1", "checkpoint.every=2", "checkpoint.keep=9")

    result, _ = train_poisoned(config, "gradient", (1, 3, 5))
    lines = read_metrics(result.output / "metrics.jsonl")
    assert [line["skipped_steps"] for line in lines] == [1, 1, 2, 2, 3, 3]
    config = load(f"run.output={result.output}-2", "train.steps=6", "train.max_skipped_steps=1")
    with pytest.raises(FloatingPointError, match=r"step 4: .*2 steps in a row"):
        train_poisoned(config, "gradient", (1, 3, 4))


def test_skipped_steps_survive_a_resumption_and_delay_the_checkpoint(load):
    config = load("train.steps=5", "train.max_skipped_steps=1", "checkpoint.every=2", "checkpoint.keep=9")
    result, _ = train_poisoned(config, "gradient", range(2, 3))
    checkpoints = complete(result.output / "checkpoints")
    # 2 was skipped: one step later; the last step has one in any case
    assert [path.name for path in checkpoints] == ["step-000003", "step-000004", "step-000005"]
    shutil.rmtree(checkpoints[-1])
    expected, lines = weights(result.final), read_metrics(result.output / "metrics.jsonl")
    shutil.rmtree(result.final)
    again = train(config, resume=True)
    resumed = read_metrics(again.output / "metrics.jsonl")
    assert [line["skipped_steps"] for line in resumed] == [line["skipped_steps"] for line in lines] == [0, 1, 1, 1, 1]
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(again.final).items())
    assert (
        "- 1 more steps skipped, their loss or gradient was not finite: 2\n" in (again.output / "report.md").read_text()
    )
    assert "since it was resumed after step 4" in (again.output / "report.md").read_text()


def test_sigterm_in_a_skipped_step_loses_nothing(load, monkeypatch):
    """The checkpoint waits for weights that have a loss, and so does the end of the run."""
    step_once = trainer.train_step

    def with_signal(parts, examples, step, *more, **options):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step_once(parts, examples, step, *more, **options)

    monkeypatch.setattr(trainer, "train_step", with_signal)
    config = load("train.steps=5", "checkpoint.every=0")
    with pytest.raises(SystemExit, match="stopped by SIGTERM after step 3"):
        train_poisoned(config, "gradient", (2,))
    assert [path.name for path in complete(Path(config.run.output, "checkpoints"))] == ["step-000003"]


@pytest.mark.parametrize("broken", [False, True])
def test_a_run_that_ends_with_a_skipped_step_tries_its_weights_once_more(load, broken):
    config = load("train.steps=3")
    if broken:  # the gradient of the trial is not finite either
        with pytest.raises(
            FloatingPointError, match=r"step 3: the gradient norm is (nan|inf), and so it is of one more"
        ):
            train_poisoned(config, "gradient", range(2, 4))
        assert not Path(config.run.output, "final").exists()
        return
    result, digests = train_poisoned(config, "gradient", (3,), times=1)
    assert len(digests) == 5 and digests[2] == digests[3] == digests[4]
    assert first_nonfinite(weights(result.final).items()) is None


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("where", ["weight", "moment"])
def test_what_is_not_finite_is_never_saved(load, in_parts, monkeypatch, where, stage):
    """Weights that an update itself made infinite: the loss of that step was finite, the gradient too."""
    step_once = trainer.train_step

    def overflowing(parts, examples, step, *more):
        result = step_once(parts, examples, step, *more)
        if step == 2:
            optimizer = parts.strategy.engine.basic_optimizer
            moments = next(iter(optimizer.state.values()))
            weight = parts.strategy.module.student.lm_head.weight
            weight = weight.data if stage == 0 else weight.ds_tensor
            (weight if where == "weight" else moments["exp_avg_sq"]).view(-1)[0] = torch.inf
        return result

    monkeypatch.setattr(trainer, "train_step", overflowing)
    for name, every in (("checkpoint", 1), ("final", 0)):
        common = (f"deepspeed.zero_stage={stage}", "train.steps=2", f"checkpoint.every={every}")
        config = load(*common, f"run.output={load().run.output}-{name}")
        with pytest.raises(
            FloatingPointError, match=r"step 2: .*(weight|exp_avg_sq) has values that are not finite: the"
        ):
            train(config)
        run = Path(config.run.output)
        assert [path.name for path in complete(run / "checkpoints")] == ["step-000001"][:every]
        assert not (run / "final").exists()


@pytest.mark.parametrize("section", ["student", "teacher"])
def test_a_model_with_numbers_that_are_not_finite_is_refused(load, teacher_set, tmp_path, section):
    path = teacher_set.partition("=")[2]
    model = AutoModelForCausalLM.from_pretrained(path)
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = torch.nan
    model.save_pretrained(tmp_path / "broken")
    load_tokenizer(load()).save_pretrained(tmp_path / "broken")
    overrides = (*GKD, f"teacher.path={tmp_path / 'broken'}")
    config = load(*overrides) if section == "teacher" else load()
    if section == "student":
        student = {"path": str(tmp_path / "broken")}
        config = load_without_architecture(config, student)
    with pytest.raises(InputError, match=rf"\[{section}\] path: .*up_proj\.weight has values that are not finite"):
        train(config)
    assert not Path(config.run.output).exists()


def load_without_architecture(config, student):
    tokenizer = replace(config.tokenizer, kind=None, path=student["path"])
    return replace(config, student=replace(config.student, architecture=None, **student), tokenizer=tokenizer)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_responses_cannot_be_written_from_numbers_that_are_not_finite(load, greedy, value):
    config = load()
    tokenizer = load_tokenizer(config)
    student = load_student(config, tokenizer)
    student.lm_head.weight.data[4] = value
    with pytest.raises(FloatingPointError, match="logits of the model that writes a response are not finite"):
        LocalSampler(student, tokenizer).generate([[3, 4], [5]], 3, greedy=greedy)


def test_an_on_policy_run_that_diverges_stops_like_any_other(load, teacher_set, tmp_path):
    config = load(*GKD, teacher_set, *DIVERGES, "train.steps=9", "train.max_skipped_steps=2")
    with pytest.raises(FloatingPointError, match=r"^step \d: .*not finite; 3 steps in a row.*the run diverged"):
        train(config)
    lines = strictly(Path(config.run.output) / "metrics.jsonl")
    assert lines[-1]["loss"] is None and lines[-1]["skipped_steps"] == 3
    assert lines[-1]["tokens"] == 0 and lines[-1]["time/rollout"] > 0


def test_evaluations_that_are_not_finite_are_null_and_named(load, monkeypatch, tmp_path, capsys):
    config = load(f"evaluation.data={tmp_path / 'test.jsonl'}", 'evaluation.metrics=["cross_entropy"]')
    once = trainer.evaluate

    def infinite(*arguments):
        return [record | {"cross_entropy": float("inf")} for record in once(*arguments)]

    monkeypatch.setattr(trainer, "evaluate", infinite)
    result = train(config)
    assert result.evaluations == {0: {"cross_entropy": None}, 3: {"cross_entropy": None}}
    assert strictly(result.output / "metrics.jsonl")[0]["evaluation/cross_entropy"] is None
    assert strictly(result.output / "evaluation-000003.jsonl")[0]["cross_entropy"] is None
    assert "| cross_entropy | not finite | not finite |  |" in (result.output / "report.md").read_text()
    assert "step 3/3  evaluation/cross_entropy inf" in capsys.readouterr().out


def test_an_evaluation_whose_model_cannot_write_is_a_stop(load, monkeypatch, tmp_path):
    overrides = ('evaluation.metrics=["exact_match"]', r"evaluation.answer='(\d+)'", "evaluation.every=1")
    config = load(*DIVERGES, f"evaluation.data={tmp_path / 'test.jsonl'}", *overrides)
    with pytest.raises(FloatingPointError, match=r"step 1: evaluation: the logits of .* not finite: the run diverged"):
        train(config)
    assert not (Path(config.run.output) / "final").exists()
