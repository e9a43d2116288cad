"""Recipes: what is accepted, what is filled in, and what every refusal says."""

import pytest

from kdkernels.training import InputError, load_config
from kdkernels.training.recipe.schema import override, read_toml, to_toml

from .conftest import GKD

EVALUATION = ("evaluation.data={root}/test.jsonl", 'evaluation.metrics=["exact_match"]', r"evaluation.answer='(\d+)'")


def test_the_resolved_recipe_reads_back_as_itself(load, teacher_set, tmp_path):
    overrides = [text.format(root=tmp_path) for text in EVALUATION]
    config = load(*GKD, teacher_set, *overrides, "objective.beta=0.25", 'data.prompt="\\"{question}\\"\\n\\u007f"')
    written = tmp_path / "resolved.toml"
    written.write_text(to_toml(config), encoding="utf-8")
    assert load_config(written) == config
    assert config.data.prompt == '"{question}"\n\x7f'
    assert config.student.architecture["hidden_size"] == 24


def test_defaults_that_follow_from_other_keys(load, teacher_set):
    sft, gkd = load(), load(*GKD, teacher_set)
    assert sft.rollout.student_fraction == 0.0 and gkd.rollout.student_fraction == 1.0
    assert gkd.rollout.max_new_tokens == gkd.data.max_response_tokens == 6
    assert gkd.objective.options == {"beta": 0.9, "temperature": 1.0, "reduction": "responses"}
    assert sft.objective.options == {"reduction": "tokens"}
    assert sft.teacher is None and sft.evaluation is None
    assert sft.checkpoint.every == 1 and load("train.steps=95").checkpoint.every == 9
    assert load("checkpoint.every=0").checkpoint.every == 0


def test_an_integer_is_a_number(load):
    config = load("optimizer.lr=1", "optimizer.betas=[0, 0.5]")
    assert config.optimizer.lr == 1.0 and type(config.optimizer.lr) is float
    assert config.optimizer.betas == (0.0, 0.5)


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("a.b=3", 3),
        ("a.b = [1, 2]", [1, 2]),
        ("a.b=runs/x", "runs/x"),
        ('a.b="3"', "3"),
        ("a.b=x=y", "x=y"),
        ("a.b=1\nc = 2", "1\nc = 2"),
        ("a.b=", ""),
    ],
)
def test_overrides_are_toml_values_or_else_strings(assignment, value):
    tables = {}
    override(tables, assignment)
    assert tables == {"a": {"b": value}}


@pytest.mark.parametrize("assignment", ["steps=3", "train.steps", ".=1", "train.=1", "run.seed.x=1"])
def test_malformed_overrides_are_refused(assignment):
    with pytest.raises(InputError, match="--set"):
        override({"run": {"seed": 1}}, assignment)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["trian.steps=3"], ["unknown section 'trian'", "did you mean 'train'?"]),
        (["train.stepz=3"], ["[train] unknown key 'stepz'", "did you mean 'steps'?"]),
        (["train.steps=abc"], ["[train] steps: expected an integer >= 1, got 'abc'"]),
        (["train.steps=0"], ["[train] steps: expected an integer >= 1, got 0"]),
        (["train.steps=true"], ["expected an integer >= 1, got True"]),
        (["train.steps=1.0"], ["expected an integer >= 1, got 1.0"]),
        (["optimizer.lr=nan"], ["[optimizer] lr: expected a number > 0 and at most 1e30, got nan"]),
        (["optimizer.lr=inf"], ["[optimizer] lr: expected a number > 0 and at most 1e30, got inf"]),
        (["optimizer.lr=1e31"], ["[optimizer] lr: expected a number > 0 and at most 1e30, got 1e+31"]),
        ([f"optimizer.lr={10**400}"], ["[optimizer] lr: expected an integer of 64 bits, as TOML has them, got 1000"]),
        (["optimizer.weight_decay=101"], ["[optimizer] weight_decay: expected at most 1 / lr = 100, got 101"]),
        (["optimizer.weight_decay=1e300"], ["[optimizer] weight_decay: expected at most 1 / lr = 100, got 1e+300"]),
        (["run.seed=-1"], ["[run] seed: expected an integer from 0 to 2^63 - 1, got -1"]),
        ([f"run.seed={2**64}"], [f"[run] seed: expected an integer of 64 bits, as TOML has them, got {2**64}"]),
        (["run.seed=1979-05-27"], ["[run] seed: expected an integer from 0 to 2^63 - 1, got datetime.date(1979"]),
        (["run.seed=0x" + "f" * 4000], ["[run] seed: expected an integer of 64 bits", "too many digits to show"]),
        (["run.seed=" + "9" * 5000], ["--set run.seed: Exceeds the limit"]),
        (["run.seed=" + "[" * 5000 + "]" * 5000], ["--set run.seed: arrays or tables nested too deeply"]),
        (["run.output="], ["[run] output: expected a path, which is not empty, got ''"]),
        (["data.train= "], ["[data] train: expected a path, which is not empty, got ' '"]),
        (['data.train="a\\u0000b"'], ["[data] train: expected a path"]),
        (["run.output=" + 300 * "a"], ["[run] output: cannot be read: File name too long: aaa"]),
        (["data.train=" + 5000 * "a"], ["[data] train: cannot be read: File name too long: aaa"]),
        (
            ["run.output=~nobody-of-that-name/x"],
            ["[run] output: no home directory is known for ~nobody-of-that-name/x"],
        ),
        (["run.output=\udcff"], ["--set run.output: expected UTF-8"]),
        (["train.max_skipped_steps=-1"], ["[train] max_skipped_steps: expected an integer >= 0, got -1"]),
        (["run.timeout_seconds=0"], ["[run] timeout_seconds: expected a number from 1 to 1e9, got 0"]),
        (["student.architecture.hidden_size=1979-05-27"], ["[student] architecture.hidden_size: expected text, true"]),
        (
            ["student.architecture.rope=[{{a=[nan]}}]"],
            ["[student] architecture.rope[0].a[0]: expected text", "got nan"],
        ),
        ([f"student.architecture.hidden_size={2**63}"], ["[student] architecture.hidden_size: expected text"]),
        (["optimizer.betas=[0.9]"], ["betas: expected an array of 2 values, each a number >= 0 and < 1, got [0.9]"]),
        (["optimizer.betas=[0.9, 1.0]"], ["betas[1]: expected a number >= 0 and < 1, got 1.0"]),
        (["run.dtype=float16"], ["[run] dtype: expected one of 'float32', 'bfloat16', got 'float16'"]),
        (["run=3"], ["expected section.key=value"]),
        (["objective.name=TSDK"], ["[objective] name: expected one of", "'TSDKD'", "got 'TSDK'"]),
        (["objective.name=GKD", "objective.bata=0.5"], ["[objective] unknown key 'bata'", "did you mean 'beta'?"]),
        (["objective.name=GKD", "objective.beta=high"], ["[objective] beta: expected a number, got 'high'"]),
        (["objective.name=GKD", "objective.beta=2"], ["[objective]", "beta", "2"]),
        (["objective.beta=2"], ["[objective] unknown key 'beta'", "expected one of name"]),
        (["objective.name=TSDKD", "objective.opener=long"], ["[objective] opener: expected a number, got 'long'"]),
        (["objective.name=VCRD", "objective.weighting=log"], ["[objective] weighting", "likelihood_ratio", "'log'"]),
        (["objective.name=GKD"], ["section [teacher] is missing"]),
        (["rollout.student_fraction=0.5"], ["[rollout] student_fraction: expected 0", "got 0.5"]),
        (
            ["deepspeed.zero_stage=0", "deepspeed.offload_optimizer=true"],
            ["[deepspeed] offload_optimizer: expected zero_stage 1, 2 or 3 with it, got 0"],
        ),
        (["deepspeed.zero_stage=4"], ["[deepspeed] zero_stage", "0, 1, 2 or 3", "got 4"]),
        (["train.micro_batch_size=3"], ["[train] batch_size: expected a multiple of micro_batch_size 3, got 4"]),
        (["teacher.path=runs/nowhere/final"], ["[teacher] path: no such directory: runs/nowhere/final"]),
        (["teacher.path=./nowhere"], ["[teacher] path: no such directory: ./nowhere"]),
        (["teacher.path={root}"], ["[teacher] path: no model in directory", "config.json is missing"]),
        (["data.train=nowhere.jsonl"], ["[data] train: no such file: nowhere.jsonl"]),
        (["student.path=gpt2"], ["[student] expected exactly one of path and architecture"]),
        (["student.architecture.model_type=3"], ["[student] architecture: expected a model_type"]),
        (["student.path=gpt2"], ["got both"]),
        (["tokenizer.path=gpt2"], ["[tokenizer] expected at most one of path and kind"]),
        (["tokenizer.kind=bpe"], ["[tokenizer] key 'vocab_size' is missing; kind \"bpe\" needs it"]),
        (["tokenizer.vocab_size=9"], ['[tokenizer] vocab_size belongs to kind "bpe": leave it out', "got 9"]),
        (
            ["tokenizer.kind=bpe", "tokenizer.vocab_size=10000000000000"],
            ["[tokenizer] vocab_size: expected an integer from 1 to 10^7, got 10000000000000"],
        ),
        (["evaluation.data={root}/test.jsonl"], ["[evaluation] key 'metrics' is missing"]),
        ([*EVALUATION, 'evaluation.metrics=["bleu"]'], ["metrics[0]: expected one of 'exact_match'", "got 'bleu'"]),
        ([*EVALUATION, 'evaluation.metrics=["kl"]'], ['"kl" needs a [teacher]']),
        ([*EVALUATION, 'evaluation.metrics=["agreement"]'], ['"agreement" needs a [teacher]']),
        (EVALUATION[:2], ["[evaluation] key 'answer' is missing; the metric \"exact_match\" needs it"]),
        (
            [EVALUATION[0], 'evaluation.metrics=["cross_entropy"]', "evaluation.answer='(a)'"],
            ['[evaluation] answer belongs to the metric "exact_match": leave it out', "got '(a)'"],
        ),
        ([*EVALUATION, "evaluation.answer='('"], ["[evaluation] answer: not a regular expression"]),
        ([*EVALUATION, "evaluation.answer='a'"], ["answer: expected a regular expression with one group, got 0"]),
        ([*EVALUATION, "evaluation.data=nowhere.jsonl"], ["[evaluation] data: no such file: nowhere.jsonl"]),
    ],
)
def test_a_refusal_names_file_key_expectation_and_value(load, recipe, tmp_path, overrides, expected):
    with pytest.raises(InputError) as refusal:
        load(*(text.format(root=tmp_path) for text in overrides))
    message = str(refusal.value)
    assert "a" * 4000 in message or len(message) < 1000
    for part in expected if expected[0].startswith(("--set", "expected section")) else [str(recipe), *expected]:
        assert part in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[run", "not a TOML file"),
        ("\xff", "not a TOML file"),
        ("run = 3", "[run] expected a table, got 3"),
        ("run = 0x" + "f" * 4000, "[run] expected a table, got a value of type int with too many digits"),
        ("run = " + "9" * 5000, "not a TOML file: Exceeds the limit"),
        ("run = " + "[" * 5000 + "]" * 5000, "arrays or tables nested too deeply"),
        ("run = " + "{a = " * 5000 + "1" + "}" * 5000, "arrays or tables nested too deeply"),
        ("[run]\noutput = 1979-13-27", "not a TOML file"),
    ],
)
def test_files_that_are_no_recipes(tmp_path, text, expected):
    path = tmp_path / "broken.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=r"broken\.toml") as refusal:
        load_config(path)
    assert expected in str(refusal.value)


def test_a_tilde_in_front_of_any_path_is_the_home_directory(load, recipe, tmp_path, monkeypatch, teacher_set):
    monkeypatch.setenv("HOME", str(tmp_path))
    model = teacher_set.partition("=")[2]
    (tmp_path / "model").symlink_to(model)
    paths = ["run.output=~/runs", "data.train=~/train.jsonl", "evaluation.data=~/test.jsonl", "teacher.path=~/model"]
    config = load(*GKD, *paths, 'evaluation.metrics=["kl"]')
    assert config.run.output == f"{tmp_path}/runs" and config.teacher.path == f"{tmp_path}/model"
    assert config.data.train == f"{tmp_path}/train.jsonl" and config.evaluation.data == f"{tmp_path}/test.jsonl"
    recipe.write_text(recipe.read_text().replace('kind = "characters"', "").replace("architecture = ", "# "))
    recipe.write_text(recipe.read_text().replace("pad_vocab_to = 20", 'path = "~/model"'))
    assert load().student.path == load("tokenizer.path=~/model").tokenizer.path == f"{tmp_path}/model"


def test_missing_recipe_section_and_key(recipe, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.toml: cannot be read: No such file"):
        load_config(tmp_path / "nowhere.toml")
    text = recipe.read_text()
    recipe.write_text(text.replace('[objective]\nname = "SFT"', ""))
    with pytest.raises(InputError, match=r"section \[objective\] is missing"):
        load_config(recipe)
    recipe.write_text(text.replace("steps = 3", ""))
    with pytest.raises(InputError, match=r"\[train\] key 'steps' or 'epochs' is missing; expected one of them"):
        load_config(recipe)
    recipe.write_text(text.replace('kind = "characters"', ""))
    with pytest.raises(InputError, match=r"\[tokenizer\] key 'path' or 'kind' is missing"):
        load_config(recipe)
    recipe.write_text(text.replace("architecture = ", "# "))
    with pytest.raises(InputError, match=r"\[student\] key 'path' or 'architecture' is missing"):
        load_config(recipe)
    recipe.write_text(text.replace('response = "{answer}"', ""))
    with pytest.raises(InputError, match=r"\[data\] key 'response' is missing"):
        load_config(recipe)


def test_the_toml_of_a_recipe_is_toml(load, tmp_path):
    path = tmp_path / "written.toml"
    path.write_text(to_toml(load()), encoding="utf-8")
    assert read_toml(path)["train"] == {
        "steps": 3,
        "batch_size": 4,
        "micro_batch_size": 2,
        "gradient_checkpointing": False,
        "max_skipped_steps": 10,
    }
