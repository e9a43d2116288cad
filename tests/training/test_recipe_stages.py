"""The stages of one recipe: rationale and label first, the label alone in the end."""

import json

import pytest
import torch
from safetensors.torch import load_file

from kdkernels.cli import main
from kdkernels.training import InputError, load_config, run_stages, trainer
from kdkernels.training.recipe.schema import read_toml
from kdkernels.training.recipe.stages import read_recipes
from kdkernels.training.run.metrics import read_metrics

from .conftest import RECIPE, final_weights

STAGES = """
[evaluation]
data = "{root}/held_out.jsonl"
metrics = ["exact_match"]
answer = '(\\d+)\\.'
response = "{{label}}"
[reasoning]
label = "{{label}}"
[[stages]]
name = "full"
target = "rationale"
[[stages]]
name = "label"
target = "label"
train.steps = 2
"""


def write(root, text=RECIPE + STAGES):
    """The recipe, its rationales the sums spelled another way."""
    sums = [(a, b) for a in range(8) for b in range(8)]
    for name, part in (("train", sums[::2]), ("held_out", sums[1::8])):
        records = [{"question": f"{a}+{b}=", "rationale": f"{b}+{a}=", "label": f"{a + b}."} for a, b in part]
        if name == "held_out":
            records = [{key: one[key] for key in ("question", "label")} for one in records]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    path = root / "recipe.toml"
    text = text.replace("{{answer}}", "{{rationale}}{{label}}").replace(
        "max_response_tokens = 6", "max_response_tokens = 9"
    )
    path.write_text(text.format(root=root))
    return path


@pytest.fixture
def recipe(tmp_path):
    return write(tmp_path)


def test_a_stage_is_the_recipe_with_what_it_says_otherwise(recipe, tmp_path):
    full, label = read_recipes([recipe], ["optimizer.lr=0.02", "train.batch_size=8"])
    assert (full.name, full.target, full.config.train.steps, label.name, label.target) == (
        "full",
        "rationale",
        3,
        "label",
        "label",
    )
    assert full.config.data.response == "{rationale}{label}" and label.config.data.response == "{label}"
    assert label.config.train.steps == 2 and label.config.train.batch_size == full.config.train.batch_size == 8
    assert full.config.run.output == f"{tmp_path}/run/full" and label.config.run.output == f"{tmp_path}/run/label"
    assert full.config.student.path is None and label.config.student.path == f"{tmp_path}/run/full/final"
    assert label.config.tokenizer.kind is None and label.config.optimizer.lr == 0.02
    # what is set by name counts more than what a stage says
    assert [one.config.train.steps for one in read_recipes([recipe], ["train.steps=1"])] == [1, 1]


def test_the_stages_are_those_of_two_recipes(recipe, tmp_path):
    """The same weights as of two files, one after the other, that say all of it themselves."""
    results = run_stages([recipe])
    (tmp_path / "apart").mkdir()
    paths = []
    for stage in read_recipes([recipe]):
        text = (stage_config := tmp_path / "run" / stage.name / "config.toml").read_text()
        assert f'[run]\noutput = "{tmp_path}/run/{stage.name}"' in text and stage_config.is_file()
        paths.append(tmp_path / f"{stage.name}.toml")
        paths[-1].write_text(text.replace(f"{tmp_path}/run/", f"{tmp_path}/apart/"))
    apart = run_stages(paths)
    for one, other in zip(results, apart, strict=True):
        got, expected = final_weights(one.output), final_weights(other.output)
        assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    moved = final_weights(results[1].output), final_weights(results[0].output)
    assert max((moved[0][name] - moved[1][name]).abs().max() for name in moved[0]) > 0.005
    tokens = [read_metrics(one.output / "metrics.jsonl")[1]["tokens"] for one in results]
    assert tokens[0] > tokens[1], "the label alone is shorter"


def test_what_the_stages_measured_is_a_table(recipe, tmp_path, capsys):
    assert main(["train", str(recipe)]) == 0
    report = (tmp_path / "run" / "stages.md").read_text()
    assert capsys.readouterr().out.splitlines()[-1] == f"stages: {tmp_path}/run/stages.md"
    rows = [line.split(" | ") for line in report.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["| before", "| full", "| label"] and [row[-1] for row in rows] == [
        "0 |",
        "3 |",
        "2 |",
    ]
    for row, run, step in ((rows[0], "full", 0), (rows[1], "full", 3), (rows[2], "label", 2)):
        text = (tmp_path / "run" / run / f"evaluation-{step:06d}.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        assert len(records) == 8
        assert row[2] == f"{sum(one['correct'] for one in records) / 8:.2%}"
        assert row[4] == f"{sum(one['response_tokens'] for one in records) / 8:.1f}"


def test_interrupted_stages_go_on_where_they_were(recipe, tmp_path, monkeypatch):
    expected = final_weights(run_stages([recipe], ["checkpoint.every=1"])[1].output)
    again = tmp_path / "again"
    again.mkdir()
    other, steps, once = write(again), [], trainer.train_step

    def interrupted(*arguments, **options):
        if len(steps) == 4:
            steps.append(0)
            raise KeyboardInterrupt
        steps.append(1)
        return once(*arguments, **options)

    monkeypatch.setattr(trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stages([other], ["checkpoint.every=1"])
    results = run_stages([other], ["checkpoint.every=1"])
    assert sum(steps) == 5, "no step was taken twice"
    got = final_weights(results[1].output)
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    assert run_stages([other], ["checkpoint.every=1"]) == results and sum(steps) == 5


@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_trained_further_or_begun_anew(root, merge):
    """`root`: recipes whose student is a saved model with an adapter."""
    base = (root / "adapted.toml") if (root / "adapted.toml").exists() else next(root.glob("*.toml"))
    text = base.read_text().replace('response = "{answer}"', 'response = "{rationale}{label}"')
    text += '[reasoning]\nlabel = "{label}"\n[[stages]]\nname = "a"\ntarget = "rationale"\n[[stages]]\nname = "b"\n'
    text += 'target = "label"\n'
    for file in root.glob("*.jsonl"):
        records = [json.loads(line) for line in file.read_text().splitlines()]
        records = [one | {"rationale": "", "label": one["answer"]} for one in records]
        file.write_text("".join(json.dumps(one) + "\n" for one in records))
    base.write_text(text)
    overrides = ["student.adapter.merge=true"] if merge else []
    first, second = run_stages([base], [*overrides, "train.steps=2", "student.adapter.r=2"])
    files = {path.name for path in second.final.iterdir()}
    assert ("adapter_model.safetensors" in files) == (not merge)
    if not merge:
        weights = [load_file(one.final / "adapter_model.safetensors") for one in (first, second)]
        assert weights[0].keys() == weights[1].keys()
        moved = [(weights[1][name] - weights[0][name]).abs().max() for name in weights[0]]
        assert 0 < max(moved) < 0.5 and all(weights[0][name].any() for name in weights[0])


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ('"label"\ntrain', '"labels"\ntrain', r"\[\[stages\]\] 2: target: expected one of 'rationale', 'compressed'"),
        ('target = "rationale"', "", r"\[\[stages\]\] 1: key 'target' is missing"),
        ('name = "label"', 'name = "full"', r"2 \(full\): name: expected one that no other stage has"),
        ('name = "label"', 'name = "a/b"', r"name: expected a name of letters, digits"),
        ("train.steps = 2", "trian.steps = 2", r"2: unknown key 'trian'; did you mean 'train'"),
        ("train.steps = 2", "train.step = 2", r"stage label: \[train\] unknown key 'step'; did you mean 'steps'"),
        ("train.steps = 2", "train = 2", r"2: train: expected a table, got 2"),
        ("train.steps = 2", 'run.output = "x"', r"2: run.output: expected that of \[run\] alone"),
        ('"{rationale}{label}"', '"{label}"', r"stage full: expected \[data\] response with the field \{rationale\}"),
        ('"{rationale}{label}"', '"{{rationale}}"', r"stage full: expected \[data\] response with the field"),
        ('"{rationale}{label}"', '"{rationale2}"', r"stage full: expected \[data\] response with the field"),
        ('"rationale"\n', '"rationale"\ndata.response = "{label}"\n', r"stage full: expected \[data\] response with"),
        ("train.steps = 2", 'data.response = "{rationale}"', r'stage label: data.response: the target "label" decides'),
        ('label = "{label}"', 'label = "{rationale}"', r"\[reasoning\] label: expected it without"),
        ('label = "{label}"', "", r"\[reasoning\] key 'label' is missing"),
        ('target = "rationale"', 'target = "compressed"', r"1 \(full\): target: .compressed. is for the student of"),
        ('target = "label"', 'target = "compressed"', r"2 \(label\): \[reasoning\] key 'pattern' is missing"),
        (
            'target = "label"\ntrain.steps = 2',
            'target = "label"\n[[stages]]\nname = "late"\ntarget = "compressed"',
            r"3 \(late\): target: .*after the stage label .* put it before that one",
        ),
    ],
)  # fmt: skip
def test_stages_that_do_not_chain_are_refused(recipe, tmp_path, was, becomes, said):
    text = recipe.read_text()
    assert was in text
    head, tail = text.split("[reasoning]") if was == 'label = "{label}"' else ("", text)
    recipe.write_text(head + ("[reasoning]" if head else "") + tail.replace(was, becomes, 1))
    with pytest.raises(InputError, match=said):
        run_stages([recipe])
    assert not (tmp_path / "run").exists()


def test_what_a_stage_learns_is_its_targets_to_say(recipe):
    stages = read_recipes([recipe], ["data.response={rationale} so {label}"])
    assert [stage.config.data.response for stage in stages] == ["{rationale} so {label}", "{label}"]
    text = recipe.read_text().replace("[reasoning]", "[reasoning]\npattern = '(.*=)'")
    recipe.write_text(text.replace('"label"\ntrain.steps = 2', '"compressed"\ndata.train = "other.jsonl"'))
    with pytest.raises(InputError, match=r'stage label: data.train: the target "compressed" decides it'):
        read_recipes([recipe])


def test_compression_has_what_it_needs_or_says_so(recipe, tmp_path):
    text = recipe.read_text().replace('target = "label"', 'target = "compressed"')
    with_teachers = text.replace("[reasoning]", f'[reasoning]\nteachers = "{tmp_path}/none.toml"')
    for more, said in (
        ("", r"key 'pattern' is missing"),
        ("pattern = '(.*=)'\nwords = 3", r'words belongs to the compressor "length"'),
        ('compressor = "length"', r'words belongs to the compressor "length", which needs it'),
        ("pattern = '(.*=)'", r'"compressed" needs a compressor'),
    ):
        recipe.write_text(with_teachers.replace("[reasoning]", f"[reasoning]\n{more}"))
        with pytest.raises(InputError, match=said):
            run_stages([recipe])
    assert not (tmp_path / "run").exists()


def test_a_directory_of_something_else_is_refused(recipe, tmp_path):
    output = tmp_path / "run"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty, and what it holds are no stages"):
        run_stages([recipe])
    (output / "notes.txt").rename(output / "config.toml")
    with pytest.raises(InputError, match="holds the run of a recipe without stages"):
        run_stages([recipe])
    assert sorted(path.name for path in output.iterdir()) == ["config.toml"]


def test_stages_of_another_recipe_are_not_gone_on_with(recipe):
    run_stages([recipe])
    with pytest.raises(InputError, match=r"the recipe differs from .*optimizer\.lr: 0\.01 -> 0\.02"):
        run_stages([recipe], ["optimizer.lr=0.02"])
    recipe.write_text(recipe.read_text().replace("train.steps = 2", "train.steps = 4"))
    with pytest.raises(InputError, match=r"run/label: train\.steps: 2 -> 4"):
        run_stages([recipe])


def test_a_recipe_of_one_training_has_no_stages(recipe, tmp_path):
    with pytest.raises(InputError, match=r"got one with \[\[stages\]\]"):
        load_config(recipe)
    recipe.write_text(recipe.read_text().partition("[[stages]]")[0])
    with pytest.raises(InputError, match=r"\[reasoning\] belongs to \[\[stages\]\]"):
        read_recipes([recipe])


def test_a_dry_run_plans_every_stage(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    parts = printed.split("# stage ")[1:]
    assert [part.splitlines()[0] for part in parts] == ["full: target rationale", "label: target label"]
    (tmp_path / "printed.toml").write_text(parts[1].partition("\n")[2])
    tables = read_toml(tmp_path / "printed.toml")
    assert tables["data"]["response"] == "{label}" and tables["train"]["steps"] == 2
