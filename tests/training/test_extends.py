"""Recipes that extend another."""

from pathlib import Path

import pytest

from kdkernels.training import InputError, load_config
from kdkernels.training.cli import main
from kdkernels.training.recipe.extends import lineage, read_tables
from kdkernels.training.recipe.read import parse_recipe
from kdkernels.training.recipe.schema import toml_value

from .conftest import GKD


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def to_toml_table(section: str, table: dict) -> str:
    return f"[{section}]\n" + "".join(f"{key} = {toml_value(value)}\n" for key, value in table.items())


def test_tables_are_laid_key_by_key_over_those_of_the_extended_recipe(recipe, tmp_path):
    """Over two recipes, each found from the directory of the one that names it; the last word is an override's."""
    middle = write(
        tmp_path / "sub" / "middle.toml",
        'extends = "../recipe.toml"\n[train]\nsteps = 7\n[student.architecture]\nhidden_size = 24\n[run]\nseed = 5\n',
    )
    last = write(tmp_path / "last.toml", 'extends = "sub/middle.toml"\n[train]\nsteps = 9\n[optimizer]\nlr = 1e-3\n')
    overrides = [
        "train.steps=9",
        "run.seed=5",
        "student.architecture.hidden_size=24",
        "optimizer.lr=1e-3",
    ]
    assert load_config(last) == load_config(recipe, overrides) != load_config(recipe)
    assert load_config(last, ["train.steps=2"]).train.steps == 2
    assert load_config(middle).train.steps == 7 and load_config(middle).optimizer.lr == 1e-2
    assert [path.resolve() for path in lineage(last)] == [last, middle, recipe]
    assert lineage(recipe) == [recipe]


def test_another_objective_leaves_the_options_of_the_extended_one_behind(recipe, tmp_path, teacher_set):
    text = 'extends = "recipe.toml"\n[objective]\n'
    tsd = write(tmp_path / "tsd.toml", text + 'name = "TSDKD"\nk = 5\nopener = 0.3\n')
    same = write(tmp_path / "same.toml", 'extends = "tsd.toml"\n[objective]\nname = "TSDKD"\nopener = 0.2\n')
    less = write(tmp_path / "less.toml", 'extends = "tsd.toml"\n[objective]\nopener = 0.4\n')
    other = write(tmp_path / "other.toml", 'extends = "tsd.toml"\n[objective]\nname = "GKD"\n')
    overrides = [*GKD[1:], teacher_set]
    assert read_tables(same)["objective"] == {"name": "TSDKD", "k": 5, "opener": 0.2}
    assert load_config(less, overrides).objective.options["opener"] == 0.4
    assert load_config(less, overrides).objective.options["k"] == 5
    assert load_config(tsd, overrides).objective.options["k"] == 5
    assert load_config(other, overrides).objective == load_config(recipe, [*GKD, teacher_set]).objective


@pytest.mark.parametrize(
    ("section", "before", "after"),
    [
        ("student", {"architecture": {"model_type": "qwen2"}, "pad_vocab_to": 8}, {"path": "a"}),
        ("student", {"path": "a"}, {"architecture": {"model_type": "qwen2"}}),
        ("teacher", {"path": "a"}, {"base": True}),
        ("teacher", {"base": True}, {"path": "a"}),
        ("tokenizer", {"kind": "bpe", "vocab_size": 300}, {"path": "a"}),
        ("tokenizer", {"path": "a"}, {"kind": "characters"}),
        ("data", {"prompt": "{q}", "response": "{a}"}, {"messages": "talk"}),
        ("data", {"messages": "talk", "answers": "last"}, {"prompt": "{q}"}),
        ("train", {"steps": 4}, {"epochs": 2}),
    ],
)
def test_keys_of_which_a_recipe_has_one_replace_each_other(tmp_path, section, before, after):
    write(tmp_path / "first.toml", to_toml_table(section, before))
    both = write(tmp_path / "both.toml", to_toml_table(section, before | after))
    last = write(tmp_path / "last.toml", 'extends = "first.toml"\n' + to_toml_table(section, after))
    assert read_tables(last) == {section: after} and read_tables(both) == {section: before | after}


def test_the_base_as_the_teacher_of_a_recipe_that_has_another(recipe, tmp_path):
    text = '[student]\npath = "a"\n[student.adapter]\nr = 4\n[teacher]\npath = "b"\n'
    start, end = recipe.read_text().index("[student]"), recipe.read_text().index("[data]")
    write(tmp_path / "with.toml", recipe.read_text()[:start] + text + recipe.read_text()[end:])
    config = parse_recipe(write(tmp_path / "last.toml", 'extends = "with.toml"\n[teacher]\nbase = true\n'))
    assert config.teacher.base and config.teacher.path is None


def test_an_absolute_path_and_one_from_the_home_directory(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (recipe, "~/recipe.toml"):
        path = write(tmp_path / "elsewhere" / "last.toml", f'extends = "{name}"\n')
        assert load_config(path) == load_config(recipe)


@pytest.mark.parametrize(
    ("extends", "expected"),
    [
        ('"nowhere.toml"', "extends: no such recipe: {root}/nowhere.toml (a relative path starts where last.toml is)"),
        ('"/nowhere/x.toml"', "extends: no such recipe: /nowhere/x.toml"),
        ('"."', "extends: no such recipe: {root}"),
        ('""', "extends: expected a path, which is not empty, got ''"),
        ('"a\\u0000b"', "extends: expected a path, which is not empty, got 'a\\x00b'"),
        ('["recipe.toml"]', "extends: expected a path, which is not empty, got ['recipe.toml']"),
        ("3", "extends: expected a path, which is not empty, got 3"),
        ('"' + "a" * 5000 + '"', "extends: cannot be read: File name too long"),
        ('"~nobody-of-that-name/x"', "extends: no home directory is known for ~nobody-of-that-name/x"),
        ('"last.toml"', "extends: recipes extend each other in a circle: {root}/last.toml -> {root}/last.toml"),
        ('"train.jsonl"', "{root}/train.jsonl: not a TOML file"),
        ('"flat.toml"', "[run] expected a table, got 3"),
    ],
)
def test_what_cannot_be_extended_is_told(recipe, tmp_path, extends, expected):
    write(tmp_path / "flat.toml", "run = 3\n" + recipe.read_text()[recipe.read_text().index("[student]") :])
    path = write(tmp_path / "last.toml", f"extends = {extends}\n")
    with pytest.raises(InputError) as refusal:
        load_config(path)
    assert expected.replace("{root}", str(tmp_path)) in str(refusal.value) and len(str(refusal.value)) < 1000


def test_a_circle_of_several_recipes_is_told(recipe, tmp_path):
    first = write(tmp_path / "first.toml", 'extends = "second.toml"\n')
    second = write(tmp_path / "second.toml", 'extends = "third.toml"\n')
    third = write(tmp_path / "third.toml", f'extends = "../{tmp_path.name}/second.toml"\n')
    with pytest.raises(InputError, match="in a circle") as refusal:
        load_config(first)
    assert f"{third}: extends" in str(refusal.value) and f"{first} -> {second} -> {third} -> " in str(refusal.value)


def test_the_key_stands_above_all_sections(recipe, tmp_path):
    for text, expected in (('extend = "recipe.toml"', "did you mean 'extends'?"), ("[extends]\nx = 1", "got {'x': 1}")):
        with pytest.raises(InputError, match=r"did you mean|extends: expected a path") as refusal:
            load_config(write(tmp_path / "last.toml", text))
        assert expected in str(refusal.value)


def test_the_dry_run_shows_what_was_extended(recipe, tmp_path, capsys):
    last = write(tmp_path / "last.toml", 'extends = "recipe.toml"\n[train]\nsteps = 9\n')
    assert main(["train", str(last), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"# {last} extends {recipe}\n[run]\n") and "steps = 9\n" in printed
    assert main(["train", str(recipe), "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("[run]\n")
