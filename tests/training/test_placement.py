"""Where a teacher is between its forwards changes nothing of what it says; the student's base is one too."""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import kdkernels as kd
from kdkernels.data import collate
from kdkernels.distillation import Distillation
from kdkernels.training import InputError, load_config, train
from kdkernels.training.cli import main
from kdkernels.training.models.loading import load_student, load_teacher, load_tokenizer
from kdkernels.training.models.placement import place
from kdkernels.training.run.metrics import read_metrics

from .engine_steps import engine_gradients, exact_gradients
from .test_adapters import check_gradients, goes_on, steps
from .test_engine import PROGRAM, check
from .test_processes import finish, start

HERE = Path(__file__).parent
TWO = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
BATCH = collate([[3, 4], [5]], [[6, 1], [7, 8, 1]], 0)


class Plain:
    """What `place` asks of a strategy."""

    whole = nullcontext

    def __init__(self, student):
        self.module = Distillation(student, kd.SFT(), 16)


def logits(source):
    return source.hidden @ source.weight.T


# ---- the student's base ----


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_base_scores_without_the_adapter_which_is_trained_as_before(root, kind):
    config = load_config(root / f"{kind}.toml", ["teacher.base=true", goes_on(root, kind), "student.adapter.dropout=0"])
    student = load_student(config, load_tokenizer(config))
    trained = [name for name, one in student.named_parameters() if one.requires_grad]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(root / "base").eval()(**BATCH.inputs).logits
        own = student(**BATCH.inputs).logits
        scored = place(config, None, Plain(student), None).score(BATCH)
        assert torch.allclose(logits(scored), expected, atol=1e-6) and not torch.allclose(own, expected, atol=0.1)
        assert torch.equal(student(**BATCH.inputs).logits, own) and student.training
    assert not scored.hidden.requires_grad and not scored.weight.requires_grad
    assert [name for name, one in student.named_parameters() if one.requires_grad] == trained and len(trained) > 10


@pytest.mark.parametrize(("stage", "again"), [(0, "true"), (2, "false"), (3, "true")])
def test_gradients_beside_the_base_are_those_beside_a_copy_of_it(root, in_parts, stage, again):
    """Between micro-batches the adapter is out and in again; `again`: the backward pass computes layers again."""
    overrides = steps(root, "lora", "float32", stage, 4)
    exact = exact_gradients(load_config(root / "lora.toml", overrides))
    itself = [text for text in overrides if "teacher" not in text]
    more = ["teacher.base=true", f"train.gradient_checkpointing={again}"]
    got = engine_gradients(load_config(root / "lora.toml", [*itself, *more]))
    check_gradients(got, exact, "float32", ("lora", stage))


def distilled(root, name, *overrides):
    """The log and the final weights of a run with student-written responses, evaluated against its teacher."""
    config = load_config(
        root / "lora.toml",
        [
            goes_on(root),
            f"run.output={root / name}",
            "objective.name=GKD",
            f"evaluation.data={root / 'test.jsonl'}",
            'evaluation.metrics=["kl"]',
            *overrides,
        ],
    )
    result = train(config)
    return (
        [
            {key: value for key, value in line.items() if not key.startswith(("time/", "tokens_per", "peak_memory"))}
            for line in read_metrics(result.output / "metrics.jsonl")
        ],
        torch.load(result.output / "checkpoints" / "step-000003" / "shared.pt")["module"],
    )


def test_a_run_with_its_base_or_with_a_teacher_on_the_cpu_is_that_with_a_copy(root):
    copy, weights = distilled(root, "copy", f"teacher.path={root / 'base'}")
    assert copy[0]["evaluation/kl"] > 0.5 and copy[3]["evaluation/kl"] < 0.9 * copy[0]["evaluation/kl"]
    for name, teacher in (("base", ["base=true"]), ("cpu", [f"path={root / 'base'}", "placement=cpu"])):
        log, found = distilled(root, f"with-{name}", *(f"teacher.{text}" for text in teacher))
        assert log == copy, name
        assert all(torch.equal(found[key], weights[key]) for key in weights), name


def test_a_plan_with_the_base_counts_no_teacher(root, capsys):
    assert main(["train", str(root / "lora.toml"), "--set=teacher.base=true", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "base = true" in printed and "teacher:" not in printed and ", teacher " not in printed


# ---- in CPU memory ----


def test_a_teacher_in_cpu_memory_is_on_the_device_while_it_scores(root, monkeypatch):
    """A copy stands in for what a GPU would have of its own."""
    config = load_config(root / "lora.toml", [f"teacher.path={root / 'base'}", "teacher.placement=cpu"])
    model, to = load_teacher(config, load_tokenizer(config)), torch.Tensor.to

    def copied(tensor, *arguments, **options):
        return to(tensor, *arguments, **options).clone() if "non_blocking" in options else to(tensor, *arguments)

    monkeypatch.setattr(torch.Tensor, "to", copied)
    teacher = place(config, model, Plain(model), None)

    def places():
        return [one.data_ptr() for one in (*model.parameters(), *model.buffers())]

    at_home = places()
    assert not set(teacher.present(places)) & set(at_home) and places() == at_home and len(at_home) > 10
    with pytest.raises(RuntimeError, match="out of memory"):
        teacher.present(lambda: (_ for _ in ()).throw(RuntimeError("out of memory")))
    assert places() == at_home
    scored = teacher.score(BATCH)
    assert scored.weight.data_ptr() not in at_home and places() == at_home
    assert torch.allclose(logits(scored), model(**BATCH.inputs).logits, atol=1e-6)


# ---- in parts, on two processes ----


@pytest.mark.slow
def test_gradients_beside_a_teacher_in_parts_are_those_of_full_logits(root):
    """Whatever stage the student is in; and beside the student's own base where that is in parts."""
    parts = ["teacher.placement=zero3"]
    cases = [("float32", stage, parts) for stage in (0, 2, 3)]
    cases += [("float32", 3, ["teacher.base=true"]), ("bfloat16", 1, parts), ("bfloat16", 3, parts)]
    settings, exact = [], []
    for dtype, stage, teacher in cases:
        overrides = steps(root, "lora", dtype, stage, 2, processes=2)
        exact.append(exact_gradients(load_config(root / "lora.toml", overrides)))
        kept = [text for text in overrides if "base" not in teacher[0] or "teacher" not in text]
        settings.append((str(root / "lora.toml"), [*kept, *teacher]))
    finish(start(TWO, PROGRAM, json.dumps(settings), str(root / "gradients.pt"), cwd=root), root)
    for case, wanted, got in zip(cases, exact, torch.load(root / "gradients.pt"), strict=True):
        if case[0] == "float32":
            check_gradients(got, wanted, *case[:1], case)
        check(got, wanted, case[0], case)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_with_a_teacher_in_parts_is_that_with_whole_ones(root, stage):
    """Evaluations of three examples too, of which one process has two."""
    found, logs = [], []
    for placement in ("replicated", "zero3"):
        output = root / f"{placement}-{stage}"
        overrides = [
            f"run.output={output}",
            "run.timeout_seconds=60",
            f"deepspeed.zero_stage={stage}",
            "train.micro_batch_size=1",
            "objective.name=TSDKD",
            "objective.k=4",
            f"teacher.path={root / 'lora'}",
            f"teacher.placement={placement}",
            f"evaluation.data={root / 'test.jsonl'}",
            "evaluation.limit=3",
            "evaluation.batch_size=1",
            'evaluation.metrics=["exact_match", "kl"]',
            "evaluation.answer='(.*)'",
        ]
        arguments = [str(root / "lora.toml"), *(f"--set={text}" for text in overrides)]
        finish(start(TWO, str(HERE / "in_parts.py"), "train", *arguments, cwd=root), root)
        found.append(load_file(output / "final" / "adapter_model.safetensors"))
        logs.append(read_metrics(output / "metrics.jsonl"))
        records = [json.loads(line) for line in (output / "evaluation-000003.jsonl").read_text().splitlines()]
        assert [record["line"] for record in records] == [1, 2, 3] and all("kl" in record for record in records)
    assert all(torch.allclose(found[1][name], weight, atol=1e-6) for name, weight in found[0].items())
    assert all(torch.count_nonzero(weight) for weight in found[0].values()) and len(found[0]) == 16
    measured = [[line["evaluation/kl"] for line in log if "evaluation/kl" in line] for log in logs]
    assert measured[1] == pytest.approx(measured[0], rel=1e-4) and len(measured[0]) > 1 and measured[0][0] > 0.01
    assert all("evaluation/exact_match" in log[-1] for log in logs)


# ---- dtype ----


@pytest.mark.parametrize(
    ("dtype", "teacher"), [("float32", "bfloat16"), pytest.param("bfloat16", "float32", marks=pytest.mark.slow)]
)
def test_a_teacher_has_a_dtype_of_its_own(root, dtype, teacher):
    overrides = [*steps(root, "lora", dtype, 1, 2), f"teacher.dtype={teacher}"]
    config = load_config(root / "lora.toml", overrides)
    assert load_teacher(config, load_tokenizer(config)).dtype == getattr(torch, teacher)
    check(engine_gradients(config), exact_gradients(config), "bfloat16", (dtype, teacher))


def test_by_default_it_is_the_runs(root):
    config = load_config(root / "lora.toml", [f"teacher.path={root / 'base'}", "run.dtype=bfloat16"])
    assert config.teacher.dtype == "bfloat16"


# ---- refused ----


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher.dtype=float32"], r"\[teacher\] expected one of path, base and url, or a cache, got none of them"),
        (
            ["teacher.path={root}/base", "teacher.base=true"],
            r"\[teacher\] expected one of path, base and url, or a cache, got path and base",
        ),
        (["teacher.base=true", "teacher.placement=cpu"], r"\[teacher\] placement belongs to a model at path"),
        (["teacher.base=true", "teacher.attention=eager"], r"\[teacher\] attention belongs to a model at path"),
        (["teacher.base=true", "teacher.dtype=float32"], r"\[teacher\] dtype belongs to a model at path"),
        (["teacher.base=true", "teacher.placement=gpu"], r"\[teacher\] placement: expected one of .*got 'gpu'"),
    ],
)
def test_teachers_that_are_refused(root, overrides, said):
    with pytest.raises(InputError, match=said):
        load_config(root / "lora.toml", [text.format(root=root) for text in overrides])


def test_a_student_without_an_adapter_has_no_base(root):
    with pytest.raises(InputError, match=r"\[teacher\] base is that of a student with \[student.adapter\]"):
        load_config(root / "recipe.toml", ["teacher.base=true"])
