"""A tiny task (sums of two digits), a tiny teacher, and recipes that train on them within seconds."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdkernels.training import Config, load_config
from kdkernels.training.models.loading import load_student, load_tokenizer

RECIPE = """
[run]
output = "{root}/run"
seed = 3
[student]
architecture = {{model_type = "qwen2", hidden_size = 16, num_hidden_layers = 1, num_attention_heads = 2, \
num_key_value_heads = 1, intermediate_size = 32, initializer_range = 0.3}}
pad_vocab_to = 20
[tokenizer]
kind = "characters"
[data]
train = "{root}/train.jsonl"
prompt = "{{question}}"
response = "{{answer}}"
max_prompt_tokens = 8
max_response_tokens = 6
by_length = false
[objective]
name = "SFT"
[optimizer]
lr = 1e-2
[train]
steps = 3
batch_size = 4
micro_batch_size = 2
"""

GKD = ("objective.name=GKD", "student.architecture.hidden_size=24", "student.pad_vocab_to=7")


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Models this small lose more to threads waiting for a busy core than they win."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_task(root: Path) -> Path:
    """Writes train.jsonl, test.jsonl and recipe.toml into `root`; the path of the recipe."""
    sums = [{"question": f"{a}+{b}=", "answer": f"{a + b}."} for a in range(8) for b in range(8)]
    for name, part in (("train", sums[::2]), ("test", sums[1::8])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in part))
    recipe = root / "recipe.toml"
    recipe.write_text(RECIPE.format(root=root))
    return recipe


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights of a finished run."""
    return AutoModelForCausalLM.from_pretrained(run / "final", dtype="auto").state_dict()


@pytest.fixture
def in_parts(monkeypatch):
    """With ZeRO-3, weights as small as those of these models are in parts too."""
    from kdkernels.training import deepspeed_strategy

    monkeypatch.setattr(deepspeed_strategy, "STAY_WHOLE", 0)


@pytest.fixture
def recipe(tmp_path) -> Path:
    return write_task(tmp_path)


@pytest.fixture(scope="session")
def teacher_set(tmp_path_factory) -> str:
    """The override that gives a recipe a teacher: fresh weights of another seed."""
    root = tmp_path_factory.mktemp("teacher")
    config = load_config(write_task(root))
    tokenizer = load_tokenizer(config)
    torch.manual_seed(7)
    load_student(config, tokenizer).save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    return f"teacher.path={root / 'model'}"


@pytest.fixture(scope="session")
def written_once(tmp_path_factory) -> Path:
    """What adapted.py writes, for all tests; each works on a copy (`root`)."""
    from .adapted import write_base  # which needs this file

    root = tmp_path_factory.mktemp("adapted") / "task"
    root.mkdir()
    write_base(root)
    return root


@pytest.fixture
def root(written_once, tmp_path) -> Path:
    """The directory of recipes whose student is a saved model with an adapter (adapted.py)."""
    from .adapted import copy_of

    return copy_of(written_once, tmp_path / "task")


@pytest.fixture
def load(recipe):
    """load(*overrides): the recipe's Config."""

    def load(*overrides: str) -> Config:
        return load_config(recipe, overrides)

    return load
