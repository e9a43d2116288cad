"""Training: the numbers of a step, whatever the micro-batches, precision and ZeRO stage; what a run leaves behind."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

import kdkernels as kd
from kdkernels.data import ExampleStream, collate
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.distillation import Distillation
from kdkernels.rollouts import LocalSampler
from kdkernels.teachers import LocalTeacher
from kdkernels.training import InputError, train
from kdkernels.training.buffer import student_steps
from kdkernels.training.deepspeed_strategy import DeepSpeedStrategy
from kdkernels.training.inputs import read_examples
from kdkernels.training.models.loading import load_student, load_teacher, load_tokenizer
from kdkernels.training.run.metrics import read_metrics
from kdkernels.training.step import rate

from .conftest import GKD
from .test_engine import OFFLOADED, stage_set

FIXED = (
    *GKD,
    "rollout.student_fraction=0",
)  # the data's responses, so that runs that differ in speed only stay comparable
TSDKD = (*FIXED, "objective.name=TSDKD", "objective.k=4")
VCRD = (*FIXED, "objective.name=VCRD", "objective.weighting=likelihood_ratio")
SUM = (*FIXED, "objective.reduction=sum")
TIMES = ("time/", "tokens_per_second", "peak_memory_gib")


def weights(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()


def difference(a, b):
    """The largest difference of two state dicts."""
    assert a.keys() == b.keys()
    return max((a[name].float() - b[name].float()).abs().max().item() for name in a)


def without_times(path):
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in read_metrics(path)]


@pytest.fixture
def run(load, teacher_set, tmp_path):
    """run(name, *overrides, judge=None): the Result of training into a directory of that name."""

    def run(name, *overrides, judge=None):
        overrides = (teacher_set, *overrides) if any("objective" in text for text in overrides) else overrides
        return train(load(f"run.output={tmp_path / name}", *overrides), judge=judge)

    return run


@pytest.mark.parametrize("objective", [(), FIXED, TSDKD, VCRD, SUM], ids=["SFT", "GKD", "TSDKD", "VCRD", "sum"])
def test_micro_batches_do_not_change_a_step(run, load, objective):
    results = {size: run(f"micro-{size}", *objective, f"train.micro_batch_size={size}") for size in (4, 2, 1)}
    config = load(*objective, *([f"teacher.path={results[4].final}"] if objective else []))
    torch.manual_seed(config.run.seed)
    moved = difference(load_student(config, load_tokenizer(config)).state_dict(), weights(results[4].final))
    assert moved > 0.01  # three steps of a rate of 0.01
    whole = without_times(results[4].output / "metrics.jsonl")
    for size in (2, 1):
        # A sum's gradients are ten times a mean's, and Adam's eps damps their rounding as much less; the gradients
        # themselves are compared below.
        allowed = 1e-4 if objective is SUM else 2e-5
        assert difference(weights(results[size].final), weights(results[4].final)) < allowed
        for line, expected in zip(without_times(results[size].output / "metrics.jsonl"), whole, strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("reduction", ["responses", "tokens", "sum"])
def test_gradients_of_micro_batches_add_up(load, teacher_set, reduction):
    """With the size that they have, which Adam does not see."""
    config = load(*FIXED, teacher_set)
    tokenizer = load_tokenizer(config)
    entries, examples = vocabulary_size(tokenizer), read_examples(config.data, config.data.train, tokenizer).usable[:4]
    student, teacher = load_student(config, tokenizer).double(), load_teacher(config, tokenizer).double()
    module, found = Distillation(student, kd.GKD(reduction=reduction), entries), {}
    units = {"responses": 4, "tokens": sum(len(one.response_ids) for one in examples), "sum": None}[reduction]
    for size in (4, 2, 1):
        student.zero_grad()
        for i in range(0, 4, size):
            some = examples[i : i + size]
            batch = collate([one.prompt_ids for one in some], [one.response_ids for one in some], 0)
            with torch.no_grad():
                scored = kd.Head.of(teacher, vocab_size=entries, **batch.inputs)
            module(**batch.fields(by_author=False), teacher=scored, denominator=units).loss.backward()
        found[size] = torch.cat([p.grad.flatten() for p in student.parameters()])
    assert found[4].norm() > 0.01
    for size in (2, 1):
        assert (found[size] - found[4]).norm() < 1e-12 * found[4].norm()


@pytest.mark.parametrize("objective", [(), FIXED], ids=["SFT", "GKD"])
def test_a_run_is_what_plain_pytorch_computes(run, load, teacher_set, objective):
    """In float64. All weights together: where a gradient is next to nothing, AdamW makes much of how it was rounded."""
    overrides = (
        *objective,
        *([teacher_set] if objective else []),
        "optimizer.max_grad_norm=0.05",
        "optimizer.weight_decay=0.1",
        "data.by_length=true",
    )
    result, config = run("engine", *overrides), load(*overrides)
    tokenizer = load_tokenizer(config)
    examples = read_examples(config.data, config.data.train, tokenizer).usable
    torch.manual_seed(config.run.seed)
    student, entries = load_student(config, tokenizer).double(), vocabulary_size(tokenizer)
    teacher = load_teacher(config, tokenizer).double() if objective else None
    module = Distillation(student, config.objective.build(), entries)
    groups = [
        {"params": [p for p in student.parameters() if p.dim() == 2], "weight_decay": 0.1},
        {"params": [p for p in student.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    stream = ExampleStream(len(examples), config.run.seed, 0, [one.tokens for one in examples], 4)
    logged = read_metrics(result.output / "metrics.jsonl")
    for step, lr in enumerate((1e-2, 1e-2, 0.5e-2)):  # one step of warm-up, then half a cosine over the other two
        picked = [examples[i] for i in stream.next(4)]
        batch = collate([one.prompt_ids for one in picked], [one.response_ids for one in picked], 0)
        with torch.no_grad():
            scored = kd.Head.of(teacher, vocab_size=entries, **batch.inputs) if teacher else None
        out = module(teacher=scored, **batch.fields(by_author=False))
        optimizer.zero_grad()
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 0.05)
        assert norm > 0.05
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        assert logged[step]["lr"] == pytest.approx(lr)
        assert logged[step]["loss"] == pytest.approx(out.loss.item(), rel=1e-5)
        assert logged[step]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
    trained, found = student.state_dict(), weights(result.final)
    assert trained.keys() == found.keys()
    exact, got = (torch.cat([one[name].double().flatten() for name in trained]) for one in (trained, found))
    assert (got - exact).norm() < 5e-6 * exact.norm()
    assert (got - exact).abs().max() < 1e-4  # the weights have moved by 2e-2


def test_the_datas_responses_are_the_teachers(run):
    """By default every second step's responses are the student's: SKL and SRKL take turns."""
    result = run("authors", *GKD, "objective.name=DistiLLM2", "train.steps=4")
    lines = read_metrics(result.output / "metrics.jsonl")
    assert [line["skl"] > 0 for line in lines] == [True, False, True, False]
    assert [line["srkl"] > 0 for line in lines] == [False, True, False, True]
    assert all(line["loss"] == pytest.approx(line["skl"] + line["srkl"]) for line in lines)


@pytest.mark.parametrize(
    "stages", [(1, 2, 3), pytest.param(("1 offloaded", "2 offloaded", "3 offloaded"), marks=pytest.mark.slow)]
)
def test_zero_stages_compute_the_same(run, in_parts, stages):
    plain = run("plain", *FIXED)
    for stage in stages:
        sharded = run(f"stage-{stage}", *FIXED, *stage_set(stage))
        assert difference(weights(sharded.final), weights(plain.final)) < 2e-5
        lines = zip(
            read_metrics(sharded.output / "metrics.jsonl"), read_metrics(plain.output / "metrics.jsonl"), strict=True
        )
        assert all(line["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-4) for line, other in lines)


@pytest.mark.parametrize("stage", [0, 1, 2, 3, *(pytest.param(one, marks=pytest.mark.slow) for one in OFFLOADED)])
def test_bfloat16_weights_move_by_less_than_they_can_show(run, load, teacher_set, stage):
    slow = (*FIXED, "optimizer.lr=1e-4", "optimizer.schedule=constant", "optimizer.warmup_ratio=0", "train.steps=30")
    config = load(*FIXED, teacher_set)
    torch.manual_seed(config.run.seed)
    start = load_student(config, load_tokenizer(config)).state_dict()
    exact = weights(run("float32", *slow).final)
    half = weights(run("bfloat16", *slow, "run.dtype=bfloat16", *stage_set(stage)).final)
    assert all(weight.dtype == torch.bfloat16 for weight in half.values())
    # of the weights that bfloat16 resolves no finer than 2e-3, a step of 1e-4 is lost without float32 master weights
    coarse = {name: weight.abs() > 0.3 for name, weight in start.items()}
    moved = torch.cat([(exact[name] - start[name])[coarse[name]] for name in start])
    shown = torch.cat([(half[name].float() - start[name])[coarse[name]] for name in start])
    assert moved.abs().mean() > 1e-3
    assert (shown @ moved) / (moved @ moved) == pytest.approx(1, abs=0.15)


def test_a_student_learns_and_leaves_everything_behind(run, tmp_path):
    result = run(
        "learned",
        "train.steps=60",
        "train.batch_size=16",
        "train.micro_batch_size=16",
        "checkpoint.every=25",
        "checkpoint.keep=1",
        f"evaluation.data={tmp_path / 'test.jsonl'}",
        "evaluation.every=40",
        "evaluation.limit=6",
        'evaluation.metrics=["exact_match", "cross_entropy"]',
        r"evaluation.answer='(\d+)\.'",
    )
    assert list(result.evaluations) == [0, 40, 60]
    assert result.evaluations[60]["cross_entropy"] < 0.7 * result.evaluations[0]["cross_entropy"]
    assert result.evaluations[60]["finished"] == 1.0
    lines = read_metrics(result.output / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(61))
    assert lines[-1]["evaluation/cross_entropy"] == result.evaluations[60]["cross_entropy"]
    assert all(line["time/student"] > 0 and line["tokens_per_second"] > 0 for line in lines[1:])
    assert sorted(path.name for path in (result.output / "checkpoints").iterdir()) == ["step-000060"]
    for step in (0, 40, 60):
        records = [
            json.loads(line) for line in (result.output / f"evaluation-{step:06d}.jsonl").read_text().splitlines()
        ]
        assert len(records) == 6 and {"line", "prompt", "response", "correct"} <= records[0].keys()
    report = (result.output / "report.md").read_text()
    assert "60 steps of 16 responses" in report and "| cross_entropy |" in report


def test_on_policy_training_reaches_the_teacher(run, tmp_path):
    result = run(
        "on-policy",
        *GKD,
        "train.steps=40",
        "train.batch_size=16",
        "train.micro_batch_size=8",
        "objective.beta=0",
        f"evaluation.data={tmp_path / 'test.jsonl'}",
        'evaluation.metrics=["kl"]',
    )
    assert result.evaluations[40]["kl"] < 0.6 * result.evaluations[0]["kl"]
    lines = read_metrics(result.output / "metrics.jsonl")[1:]
    assert all(line["time/rollout"] > 0 and line["time/teacher"] > 0 for line in lines)
    assert all(1 <= line["student_length"] <= 6 for line in lines)
    assert {"student_entropy", "teacher_entropy", "direct"} <= lines[0].keys()


def test_every_phase_has_its_seconds_and_none_counts_twice(run, monkeypatch):
    """By a clock that each model, the objective and the update move on."""
    now, moved = [0.0], {"rollout": 1.0, "teacher": 10.0, "student": 100.0, "loss": 1000.0, "optimizer": 10000.0}

    def moving(kind, name, phase):
        inner = getattr(kind, name)

        def outer(*arguments, **options):
            now[0] += moved[phase]
            return inner(*arguments, **options)

        monkeypatch.setattr(kind, name, outer)

    moving(LocalSampler, "generate", "rollout")
    moving(LocalTeacher, "score", "teacher")
    moving(Distillation, "forward", "student")
    moving(kd.GKD, "forward", "loss")
    moving(DeepSpeedStrategy, "step", "optimizer")
    monkeypatch.setattr("kdkernels.training.step._now", lambda: now[0])
    result = run("phases", *GKD, "train.steps=2")
    for line in read_metrics(result.output / "metrics.jsonl"):  # two micro-batches a step
        assert {name: line[f"time/{name}"] for name in moved} == {
            "rollout": 1.0, "teacher": 20.0, "student": 200.0, "loss": 2000.0, "optimizer": 10000.0
        }  # fmt: skip
        assert line["tokens_per_second"] == line["tokens"] / 12221 and 0.1 < line["peak_memory_gib"] < 100


@pytest.mark.parametrize("objective", ["SFT", "GKD", "VCRD"])
def test_the_banner_names_the_phases_that_a_run_times(run, capsys, objective):
    """None for what its steps do not do; VCRD's take turns, with rollouts and without, and have a judge here."""
    settings = {"SFT": (), "GKD": GKD, "VCRD": (*GKD, "objective.name=VCRD")}[objective]
    judge = {"VCRD": lambda batch: torch.ones(batch.target.shape)}.get(objective)
    lines = read_metrics(run("phases", *settings, "train.steps=2", judge=judge).output / "metrics.jsonl")
    timed = {name.removeprefix("time/") for line in lines for name in line if name.startswith("time/")}
    said = capsys.readouterr().out
    banner = re.search(r"^timed in each step: (.*); shown are their shares of the last steps' seconds$", said, re.M)[1]
    assert set(banner.split(", ")) == timed
    assert timed - {"rollout", "teacher", "judge"} == {"student", "loss", "optimizer"}
    assert ("judge" in timed, "teacher" in timed) == (objective == "VCRD", objective != "SFT")
    progress = re.search(r"^step 2/2 .*tokens_per_second .*peak_memory_gib .*seconds [\d.e-]+ \((.*)\)$", said, re.M)[1]
    assert {share.split()[0] for share in progress.split(", ")} == timed


def test_a_batch_that_the_processes_cannot_share(load, monkeypatch):
    monkeypatch.setattr("kdkernels.training.processes.distributed.world_size", lambda: 3)
    with pytest.raises(InputError, match=r"\[train\] batch_size: expected a multiple of 6 .*2 x 3 processes.*got 4"):
        train(load())


def test_a_loss_that_is_not_finite_ends_the_run(run, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d: the loss is (nan|inf)"):
        run("diverged", "optimizer.lr=1e30", "optimizer.max_grad_norm=0", "checkpoint.every=1")
    bad = read_metrics(tmp_path / "diverged" / "metrics.jsonl")[-1]
    assert bad["loss"] is None and bad["skipped_steps"] > 0
    assert not (tmp_path / "diverged" / "final").exists()


def test_the_share_of_student_written_steps_is_even():
    for fraction in (0.0, 0.25, 0.5, 0.9, 1.0):
        written = [student_steps(step, fraction) - student_steps(step - 1, fraction) for step in range(1, 101)]
        assert sum(written) == round(100 * fraction)
        assert all(abs(sum(written[:n]) - n * fraction) < 1 for n in range(100))


def test_the_learning_rate(load):
    settings = load("optimizer.warmup_ratio=0.2").optimizer
    rates = [rate(settings, step, 10) for step in range(11)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5) and rates[10] == 0.0
    assert rates[2:] == sorted(rates[2:], reverse=True)
    constant = load("optimizer.warmup_ratio=0", "optimizer.schedule=constant").optimizer
    assert {rate(constant, step, 10) for step in range(11)} == {1.0}
