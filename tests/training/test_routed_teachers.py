"""Several teachers: each scores the responses whose record names it, and a batch may have responses of all."""

import json
from pathlib import Path

import pytest
import torch

import kdkernels as kd
from kdkernels.cli import main
from kdkernels.data import collate
from kdkernels.sources.mixed import Mixed
from kdkernels.teachers import LocalTeacher, RoutedTeacher
from kdkernels.training import InputError, caching, load_config, train
from kdkernels.training.models.loading import load_frozen, load_student, load_tokenizer

from .conftest import GKD
from .test_placement import logits
from .test_served_teachers import check_same, kept

BATCH = collate([[3, 4], [5], [6, 5, 4]], [[6, 1], [7, 8, 1], [3]], 0, teachers=["one", "other", "one"])


@pytest.fixture
def other(load, tmp_path) -> str:
    """A teacher with another hidden size."""
    config = load("student.architecture.hidden_size=24")
    tokenizer = load_tokenizer(config)
    torch.manual_seed(11)
    for part in (load_student(config, tokenizer), tokenizer):
        part.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


@pytest.fixture
def named(load):
    """named(name of a line by its number): writes it into the data, and into those that are held out."""

    def named(choose):
        for file in (Path(load().data.train), Path(load().data.train).parent / "test.jsonl"):
            lines = [json.loads(line) | {"by": choose(number)} for number, line in enumerate(file.open(), 1)]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    return named


def pair(one: str, other: str) -> list[str]:
    return ["data.teacher=by", f"teachers.one.path={one}", f"teachers.other.path={other}"]


def by_turns(number: int) -> str:
    return ("one", "other")[number % 2]


def mixture(dtype, generator):
    """Heads of two sizes and the logits that they are."""

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    first = kd.Head(drawn(3, 5, 8), drawn(40, 8), drawn(40), softcap=5.0, scale=0.5)
    second = kd.Head(drawn(3, 5, 12), drawn(40, 12), vocab_size=40)
    choice = torch.tensor([0, 1, 0])[:, None, None].expand(3, 5, 1).contiguous()
    z = first.scale * (first.hidden.double() @ first.weight.double().T + first.bias.double())
    z = first.softcap * torch.tanh(z / first.softcap)
    whole = torch.where(choice == 0, z, second.hidden.double() @ second.weight.double().T)
    return Mixed(choice, (first, second)), kd.Logits(whole)


@pytest.mark.parametrize("objective", [kd.GKD(), kd.TSDKD(k=4), kd.VCRD()], ids=lambda one: type(one).__name__)
def test_the_teacher_of_each_position_is_its_own(objective):
    mixed, exact = mixture(torch.float32, torch.Generator().manual_seed(0))
    found = []
    for teacher, dtype in ((mixed, torch.float32), (exact, torch.float64)):
        generator = torch.Generator().manual_seed(1)
        hidden, weight = (torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5, 6), (40, 6)))
        student = kd.Head(hidden.requires_grad_(), weight.requires_grad_())
        layout = kd.Layout.from_spans([0, 1, 2], [4, 3, 2], 5)
        options = {"weights": torch.ones(3, 5, dtype=dtype)} if objective.needs_weights else {}
        author = torch.tensor([True, False, True]) if objective.by_author else None
        out = objective(student, teacher, layout, from_teacher=author, **options)
        out.loss.backward()
        found.append((out.loss.double(), hidden.grad.double(), weight.grad.double()))
    for got, wanted in zip(*found, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-4, atol=1e-6)
        assert wanted.abs().max() > 1e-4


def test_per_token_functions_take_several_heads_too():
    mixed, exact = mixture(torch.bfloat16, torch.Generator().manual_seed(0))
    student = kd.Head(torch.randn(3, 5, 6).bfloat16(), torch.randn(40, 6).bfloat16())
    wide = kd.Head(student.hidden.double(), student.weight.double())
    got, wanted = kd.divergence(student, mixed, kd.JSD(0.3)), kd.divergence(wide, exact, kd.JSD(0.3))
    torch.testing.assert_close(got.double(), wanted, rtol=0.05, atol=5e-3)
    assert mixed.dtype == torch.bfloat16 and mixed.vocabulary == 40 and mixed.shape == (3, 5)
    for heads, kind in (((), ValueError), ((mixed.heads[0], exact), TypeError)):
        with pytest.raises(kind, match="heads: expected"):
            Mixed(mixed.choice, heads)
    with pytest.raises(ValueError, match=r"heads: expected shape, device and vocabulary \(\[3, 5\].*, got"):
        Mixed(mixed.choice, (kd.Head(torch.randn(3, 4, 8), torch.randn(40, 8)),))


def test_each_response_is_scored_by_its_teacher(teacher_set, other):
    models = {"one": load_frozen(teacher_set.partition("=")[2], "", "float32", "auto")[0]}
    models["other"] = load_frozen(other, "", "float32", "auto")[0]
    teachers = {name: LocalTeacher(model, 16) for name, model in models.items()}
    scored = RoutedTeacher(teachers).score(BATCH)
    assert [head.width for head in scored.heads] == [16, 24] and scored.choice[:, 0, 0].tolist() == [0, 1, 0]
    index = BATCH.layout.index
    for number, name in enumerate(teachers):
        own = (scored.choice.flatten()[index] == number).nonzero()[:, 0]
        expected = logits(teachers[name].score(BATCH)).flatten(0, 1)[index][own]
        torch.testing.assert_close(logits(scored.heads[number]).flatten(0, 1)[index][own], expected)
        assert len(own) == (3, 3)[number]
    alone = BATCH.part([0, 2])
    assert alone.ids == (BATCH.ids[0], BATCH.ids[2]) and alone.layout.lengths == (2, 1)
    assert alone.layout.index.tolist() == [1, 2, 4 + 2] and torch.equal(alone.input_ids, BATCH.input_ids[[0, 2]])
    assert torch.equal(RoutedTeacher(teachers).score(alone).hidden, teachers["one"].score(alone).hidden)
    with pytest.raises(LookupError, match="expected one, got 'other'"):
        RoutedTeacher({"one": teachers["one"]}).score(BATCH)


def test_a_run_of_several_names_for_one_teacher_is_that_with_it(load, teacher_set, named):
    named(by_turns)
    expected, path = kept(train(load(*GKD, teacher_set, "train.micro_batch_size=1"))), teacher_set.partition("=")[2]
    options = [*GKD, "train.micro_batch_size=1", *pair(path, path), f"run.output={load().run.output}-two"]
    check_same(kept(train(load(*options))), expected)


def test_each_held_out_response_is_compared_with_its_teacher(load, teacher_set, other, named, capsys, recipe):
    """While training; and the other teacher has no part in it."""
    named(by_turns)
    root, path = Path(load().run.output).parent, teacher_set.partition("=")[2]
    options = [*GKD, f"evaluation.data={root}/test.jsonl", 'evaluation.metrics=["kl"]', "rollout.student_fraction=0.5"]
    records = {}
    for name, own in (("one", [teacher_set]), ("other", [f"teacher.path={other}"]), ("both", pair(path, other))):
        result = train(load(*options, *own, f"run.output={root}/{name}-run", "train.steps=4"))
        lines = (result.output / "evaluation-000000.jsonl").read_text().splitlines()
        records[name] = {json.loads(line)["line"]: json.loads(line)["kl"] for line in lines}
    for line, kl in records["both"].items():
        assert kl == pytest.approx(records[by_turns(line)][line], rel=1e-4)
    assert any(abs(records["one"][line] - records["other"][line]) > 0.05 for line in records["one"])
    capsys.readouterr()
    assert main(["train", str(recipe), "--dry-run", *(f"--set={one}" for one in (*options, *pair(path, other)))]) == 0
    said = capsys.readouterr().out
    assert "teachers.one: Qwen2ForCausalLM" in said and "teachers.other: Qwen2ForCausalLM" in said
    assert train(load(*options, *pair(path, other), f"run.output={root}/both-run", "train.steps=4"), resume=True)


def test_one_of_several_may_be_stored(load, teacher_set, other, named):
    named(by_turns)
    root, path = Path(load().run.output).parent, teacher_set.partition("=")[2]
    options = [*GKD, "rollout.student_fraction=0", "train.micro_batch_size=1", "train.steps=8"]
    expected = kept(train(load(*options, *pair(path, other))))
    caching.cache(load(*options, f"teacher.path={other}", f"teacher.cache={root}/cache"))
    mixed = ["data.teacher=by", f"teachers.one.path={path}", f"teachers.other.cache={root}/cache"]
    check_same(kept(train(load(*options, *mixed, f"run.output={root}/mixed"))), expected)
    caching.cache(load(*options, f"teacher.path={other}", f"teacher.cache={root}/words"), 4)
    with pytest.raises(InputError, match=r"\[teachers.other\] cache: a batch of several teachers needs"):
        train(load(*options, *mixed[:2], f"teachers.other.cache={root}/words", f"run.output={root}/words-run"))


def test_a_base_in_parts_is_none_of_several(root):
    """All processes would have to ask it equally often: two that do not would wait for each other."""
    options = ["data.teacher=by", f"teachers.one.path={root}/base", "teachers.own.base=true"]
    options += ["objective.name=GKD", "rollout.student_fraction=0"]
    load_config(root / "lora.toml", [*options, "deepspeed.zero_stage=2"])
    with pytest.raises(InputError, match=r"\[teachers.own\] base: expected \[deepspeed\] zero_stage 0, 1 or 2"):
        load_config(root / "lora.toml", [*options, "deepspeed.zero_stage=3"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["data.teacher=by", "teachers.one.path={one}"],
            r"train.jsonl, line 1: .* expected one of one \(",
        ),
        (["data.teacher=who", "teachers.one.path={one}"], r"line 1: .* a teacher in field 'who', got None"),
        (["data.teacher=by"], r"\[data\] teacher: expected tables \[teachers.NAME\] beside it, got none"),
        (["teachers.one.path={one}"], r"\[data\] key 'teacher' is missing"),
        (["data.teacher=by", "teacher.path={one}", "teachers.one.path={one}"], r"either this section or \[teachers"),
        (["data.teacher=by", "teachers.one.placement=cpu"], r"\[teachers.one\] expected one of path, base and url"),
        (["data.teacher=by", "teachers.one.path=/no/where"], r"\[teachers.one\] path: no such directory"),
        (["data.teacher=by", "teachers.one.path={one}", "teachers.one.placement=zero3"], r"\[teachers.one\] placement"),
        (["data.teacher=by", "teachers.one.paht={one}"], r"\[teachers.one\] unknown key 'paht'; did you mean 'path'"),
        (["data.teacher=by", 'teachers."a b".path={one}'], r"expected a name of letters, digits"),
        (["data.teacher=by", "teachers.one=3"], r"\[teachers.one\] expected a table, got 3"),
    ],
)
def test_teachers_that_are_refused(load, teacher_set, named, overrides, said):
    named(by_turns)
    with pytest.raises(InputError, match=said):
        train(load(*GKD, *(one.format(one=teacher_set.partition("=")[2]) for one in overrides)))
