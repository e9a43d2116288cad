"""Dry runs of recipes whose models are on another machine, for as many GPUs as that one has."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest

from kdkernels.training import InputError, load_config, needs
from kdkernels.training.cli import main
from kdkernels.training.recipe.elsewhere import described
from kdkernels.training.recipe.extends import read_tables
from kdkernels.training.recipe.read import read_recipe

RECIPE = """
[run]
output = "{root}/run"
[student]
path = "someone/little-one"
[teacher]
path = "someone/big-one"
[data]
train = "{root}/nowhere.jsonl"
prompt = "{{question}}"
max_prompt_tokens = 8
max_response_tokens = 6
[objective]
name = "GKD"
[optimizer]
lr = 1e-2
[train]
steps = 3
batch_size = 16
micro_batch_size = 2
"""
SHAPE = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
    "tie_word_embeddings": False,
}
NAMES = {"little-one": SHAPE, "big-one": SHAPE | {"hidden_size": 32, "vocab_size": 48}}


@pytest.fixture
def away(tmp_path) -> Path:
    """A recipe, of whose models and data nothing is here but descriptions."""
    (tmp_path / "models").mkdir()
    for name, shape in NAMES.items():
        (tmp_path / "models" / f"{name}.json").write_text(json.dumps(shape))
    recipe = tmp_path / "away.toml"
    recipe.write_text(RECIPE.format(root=tmp_path))
    return recipe


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a dry run asked the network"))


def dry(capsys, *arguments) -> str:
    assert main(["train", *map(str, arguments), "--dry-run"]) == 0
    return capsys.readouterr().out


def plan(capsys, *arguments) -> str:
    assert main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_models_are_planned_from_their_descriptions(away, tmp_path, capsys):
    """Of 8 processes, with the numbers of both models worked out by hand."""
    before = sorted(tmp_path.rglob("*"))
    printed = plan(capsys, away, "--gpus", 8)
    assert dry(capsys, away, "--gpu", "a100-80g", "--gpus", 8) == printed
    assert sorted(tmp_path.rglob("*")) == before
    root = tmp_path
    little = 2 * 40 * 16 + 2 * 16 * 16 + 16 + 2 * (16 * 8 + 8) + 3 * 16 * 32 + 3 * 16
    big = 2 * 48 * 32 + 2 * 32 * 32 + 32 + 2 * (32 * 16 + 16) + 3 * 32 * 32 + 3 * 32
    for line in (
        f"[student] path: someone/little-one is not on this machine: planned with {root}/models/little-one.json",
        f"[teacher] path: someone/big-one is not on this machine: planned with {root}/models/big-one.json",
        f"not looked at, whether there or not: tokenizer someone/little-one, data {root}/nowhere.jsonl",
        f"student: Qwen2ForCausalLM, {little:,} parameters, head 40 x 16",
        f"teacher: Qwen2ForCausalLM, {big:,} parameters, head 48 x 32",
        "3 steps of 16 responses (on each of 8 processes 1 micro-batches of 2), at most 288 response tokens",
        "micro-batch: tokens 2 x 14 (prompt 8, response 6), "
        "hidden states of the student 2 x 14 x 16, hidden states of the teacher 2 x 14 x 32 at most",
        "loss: 12 tokens x 40 entries a micro-batch, in chunks of 12 tokens (the teacher's of 12)",
        f"  always: student {needs.text(4 * little)} (",
        f"  always: teacher {needs.text(4 * big)} (",
    ):
        assert f"\n# {line}" in printed
    assert "free" not in printed and "epochs" not in printed


def test_processes_share_what_zero_shards(away, capsys):
    def optimizer(*arguments) -> str:
        printed = plan(capsys, away, "--set=run.dtype=bfloat16", *arguments)
        return printed.split("always: optimizer ")[-1].split(" (")[0]

    with_one, with_eight = optimizer(), optimizer("--gpus=8")
    weights = 2 * 40 * 16 + 2 * 16 * 16 + 16 + 2 * (16 * 8 + 8) + 3 * 16 * 32 + 3 * 16
    assert (with_one, with_eight) == (needs.text(12 * weights), needs.text(12 * weights // 8))


def test_epochs_that_the_data_would_count(away, capsys):
    """How many steps they are is not known, but that they are enough for all checkpoints that are kept."""
    in_steps, in_epochs = dry(capsys, away, "--set=train.steps=100"), dry(capsys, away, "--set=train.epochs=2.5")
    said = "epochs in steps of 16 responses (8 micro-batches of 2)\n"
    assert f"# 2.5 {said}" in in_epochs and "[train]\nepochs = 2.5\nbatch_size" in in_epochs
    disk = in_steps.split("\n# disk: ")[1].split("\n")[0]
    assert disk.startswith("at most ") and "(3 checkpoints of " in disk and f"\n# disk: {disk}\n" in in_epochs


def test_training_needs_everything(away, capsys):
    assert main(["train", str(away)]) == 2
    assert "[data] train: no such file" in capsys.readouterr().err
    with pytest.raises(InputError, match="no such file"):
        load_config(away)


def test_what_is_printed_is_saved_and_is_a_recipe(away, tmp_path, capsys):
    saved = tmp_path / "plan.toml"
    assert dry(capsys, away, "--save", saved) == saved.read_text()
    assert read_recipe(saved, dry_run=True).train == read_recipe(away, dry_run=True).train
    assert main(["train", str(away), "--dry-run", "--save", str(saved)]) == 2
    assert f"--save {saved}: expected a file that is not there yet" in capsys.readouterr().err
    assert main(["train", str(away), "--dry-run", "--save", str(tmp_path / "no" / "plan.toml")]) == 2
    assert "cannot be written: No such file or directory" in capsys.readouterr().err


def test_what_cannot_be_planned_is_told(away, tmp_path, capsys):
    """A batch for other processes, a model that nobody described, options of a plan without one."""
    for arguments, expected in (
        (["--gpus=3"], "expected a multiple of 6 (micro_batch_size 2 x 3 processes), got 16"),
        (["--dry-run", "--set=teacher.path=someone/other-one"], "[data] train: no such file"),
        (["--dry-run", "--set=data.max_prompt_tokens=40000"], "the max_position_embeddings of [student] path"),
        (["--gpu=a100"], "--gpu: expected one of a100-40g (40 GB), a100-80g (80 GB), h100 (80 GB), "),
        ([f"--save={tmp_path}/x"], "--save: of a plan, and this would train: add --dry-run"),
        (["--set=train.steps=3", "--gpu=h100", "--gpus=2"], "--gpu, --gpus: of a plan, and this would train"),
        (["--dry-run", "--gpus=2"], "--gpus: expected with --gpu, the name of their kind"),
    ):
        command = "plan" if arguments[0].startswith("--gpu") else "train"
        assert main([command, str(away), *arguments]) == 2
        assert expected in capsys.readouterr().err
    for number in ("0", "-1", "1.5", "many", "9" * 5000):
        with pytest.raises(SystemExit) as ended:
            main(["plan", str(away), f"--gpus={number}"])
        assert ended.value.code == 2
        assert "expected an integer from 1 to 999999" in capsys.readouterr().err
    (tmp_path / "models" / "big-one.json").write_text("{")
    assert main(["train", str(away), "--dry-run"]) == 2
    assert "[teacher] path: " in capsys.readouterr().err


def test_a_description_may_lie_beside_the_extended_recipe(away, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    mine = tmp_path / "sub" / "mine.toml"
    mine.write_text('extends = "../away.toml"\n[train]\nsteps = 5\n')
    assert f"planned with {tmp_path}/sub/../models/little-one.json" in dry(capsys, mine)


def test_a_student_that_another_recipe_will_train(away, tmp_path, capsys, monkeypatch):
    """It is planned as the model that the other recipe starts from."""
    second = tmp_path / "second.toml"
    second.write_text(
        f'extends = "away.toml"\n[run]\noutput = "{tmp_path}/run-2"\n[student]\npath = "{tmp_path}/run/final"'
    )
    (tmp_path / "broken.toml").write_text("[run")
    printed = dry(capsys, second)
    assert (
        f"[student] path: {tmp_path}/run/final is not on this machine: planned with {tmp_path}/models/little" in printed
    )
    assert main(["train", str(second), "--dry-run", f"--set=student.path={tmp_path}/other/final"]) == 2
    assert "no such file" in capsys.readouterr().err
    second.write_text(second.read_text().replace(f"{tmp_path}/run/final", f"{tmp_path}/run-2/final"))
    read = Mock(wraps=read_tables)
    monkeypatch.setattr("kdkernels.training.recipe.elsewhere.read_tables", read)
    assert main(["train", str(second), "--dry-run"]) == 2  # which would come of itself
    assert "no such file" in capsys.readouterr().err and read.call_count < 10


def test_a_model_in_the_cache_of_the_hub_is_here(away, tmp_path, monkeypatch):
    snapshot = tmp_path / "hub" / "models--someone--little-one" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "hub" / "models--someone--little-one" / "refs").mkdir()
    (tmp_path / "hub" / "models--someone--little-one" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = read_recipe(away, dry_run=True)
    assert described(config, [away]).keys() == {"[student] path", "[teacher] path"}
    (snapshot / "config.json").write_text(json.dumps(SHAPE))
    assert described(config, [away]).keys() == {"[teacher] path"}


def test_of_several_processes_the_first_one_tells(away, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("kdkernels.training.command.first", lambda: False)
    assert dry(capsys, away, "--save", tmp_path / "plan.toml") == "" and not (tmp_path / "plan.toml").exists()


def test_another_machine_may_have_what_this_one_lacks(away, recipe, capsys, monkeypatch):
    """No word about this one's memory and arithmetic in a plan for another."""
    monkeypatch.setattr("kdkernels.training.needs.gemm.torch_crawls", lambda dtype: True)
    for path in (away, recipe):
        printed = plan(capsys, path, "--gpus=2", "--set=run.dtype=bfloat16")
        assert "no units for bfloat16" not in printed and "free" not in printed
    printed = dry(capsys, recipe, "--set=run.dtype=bfloat16")
    assert "no units for bfloat16" in printed and "free" in printed


def test_what_is_here_is_read(recipe, teacher_set, tmp_path):
    """A description beside the recipe changes nothing about models on this machine."""
    path = teacher_set.partition("=")[2]
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / f"{Path(path).name}.json").write_text(json.dumps(SHAPE))
    config = load_config(recipe, [teacher_set])
    assert described(config, [recipe]) == {}
    recipe.write_text(
        recipe.read_text().replace("architecture = ", f'path = "{path}"\n# ').replace("pad_vocab_to", "# ")
    )
    recipe.write_text(recipe.read_text().replace('kind = "characters"', ""))
    assert described(load_config(recipe, [teacher_set]), [recipe]) == {}
