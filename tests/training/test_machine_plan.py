"""The plan's memory against that of runs, each in a process of its own: peak growth of the resident memory.

Steps have two micro-batches of the longest texts that the recipe allows. malloc gives every freed tensor back at once
(MALLOC_MMAP_THRESHOLD_): otherwise what is measured is its fragmentation as well.
"""

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from allocations import Resident
from transformers import AutoConfig, AutoModelForCausalLM

from kdkernels.engine.gpu import CARDS
from kdkernels.training import load_config
from kdkernels.training.cli import main
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.plan.activations import forward_backward

RECIPE = """
[run]
output = "{root}/run"
dtype = "{dtype}"
[student]
{student}
[data]
train = "{root}/train.jsonl"
prompt = "{{question}}"
response = "{{answer}}"
max_prompt_tokens = {prompt}
max_response_tokens = {response}
{more}
[optimizer]
lr = 1e-4
[train]
steps = 2
batch_size = {batch}
micro_batch_size = 4
gradient_checkpointing = {checkpointing}
[checkpoint]
every = 0
[deepspeed]
zero_stage = {stage}
"""
FRESH = """
architecture = {{model_type = "qwen2", hidden_size = {hidden}, num_hidden_layers = {layers}, num_attention_heads = 4, \
num_key_value_heads = 2, intermediate_size = {inner}, tie_word_embeddings = {tied}}}
pad_vocab_to = {vocabulary}
[tokenizer]
kind = "characters"
"""
ADAPTED = """
path = "{root}/base"
[student.adapter]
r = 8
alpha = 16
"""
SFT = """
[objective]
name = "SFT"
"""
DISTILLED = """
[teacher]
path = "{root}/teacher"
placement = "{placement}"
[objective]
name = "GKD"
[rollout]
student_fraction = {fraction}
"""

MEASURE = """
import json, sys
from kdkernels.training import load_config, train
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.training.models.loading import load_student, load_teacher, load_tokenizer
from kdkernels.training.plan.memory import Load, memory
from kdkernels.training.processes import distributed

tests, recipe = sys.argv[1:]
sys.path.insert(0, tests)
from allocations import Resident

config = load_config(recipe)
distributed.start()
tokenizer = load_tokenizer(config)
student = load_student(config, tokenizer, meta=True)
teacher = load_teacher(config, tokenizer, meta=True) if config.teacher else None
load = Load(config, student, teacher, distributed.world_size(), vocabulary_size(tokenizer), None)
planned = memory(load, load.student_pass(), load.teacher_pass())
with Resident() as resident:
    train(config)
if distributed.rank() == 0:
    print(json.dumps([planned.peak, resident.peak, planned.widest, planned.lasting, planned.phases]))
"""
SMALL = {"hidden": 256, "layers": 6, "inner": 768, "vocabulary": 8192, "prompt": 96, "response": 160}
MIDDLE = {"hidden": 512, "layers": 8, "inner": 1408, "vocabulary": 4096, "prompt": 128, "response": 128}
LARGE = {"hidden": 768, "layers": 10, "inner": 2048, "vocabulary": 16384, "prompt": 64, "response": 96}
TINY = {"hidden": 64, "layers": 2, "inner": 256, "vocabulary": 2048, "prompt": 32, "response": 96}
DEFAULT = {"tied": "false", "checkpointing": "false", "stage": 0, "dtype": "float32", "processes": 1}
DEFAULT |= {"adapter": False, "teacher": None, "fraction": 0, "placement": "replicated"}
LETTERS = 2000  # each a token: of so many, a fresh model seldom writes the one that ends a response

CASES = {
    "small": SMALL,
    "middle": MIDDLE | {"stage": 1},
    "large": LARGE,
    "large, tied, checkpointed": LARGE | {"tied": "true", "checkpointing": "true"},
    "bfloat16": MIDDLE | {"dtype": "bfloat16", "stage": 2},
    "adapter": LARGE | {"adapter": True},
    "teacher": SMALL | {"teacher": LARGE, "fraction": 0},
    "rollouts": SMALL | {"teacher": MIDDLE, "fraction": 1},
    "two processes, ZeRO 2": MIDDLE | {"stage": 2, "processes": 2},
    "two processes, ZeRO 3": MIDDLE | {"stage": 3, "processes": 2},
    "two processes, a teacher in parts": SMALL | {"teacher": LARGE, "placement": "zero3", "stage": 2, "processes": 2},
}


def write(root: Path, settings: dict) -> Path:
    """The recipe, with its data and the models that it needs."""
    letters = itertools.cycle(map(chr, range(0x4E00, 0x4E00 + LETTERS)))

    def text(length: int) -> str:
        return "".join(itertools.islice(letters, length))

    lines = [{"question": text(settings["prompt"]), "answer": text(settings["response"] - 1)} for _ in range(16)]
    (root / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = DEFAULT | settings | {"root": root, "batch": 8 * settings.get("processes", 1)}
    if values["teacher"] is not None:
        larger = settings["teacher"] | {name: settings[name] for name in ("vocabulary", "prompt", "response")}
        _save(RECIPE, root / "teacher", values | larger)
    if values["adapter"]:
        _save(RECIPE, root / "base", values)
    student = (ADAPTED if values["adapter"] else FRESH).format(**values)
    more = (SFT if values["teacher"] is None else DISTILLED).format(**values)
    recipe = root / "recipe.toml"
    recipe.write_text(RECIPE.format(student=student, more=more, **values))
    return recipe


def _save(text: str, place: Path, values: dict) -> None:
    """Writes a model of these sizes, and its tokenizer."""
    recipe = place.with_suffix(".toml")
    recipe.write_text(text.format(student=FRESH.format(**values), more=SFT, **values))
    config = load_config(recipe)
    tokenizer = load_tokenizer(config)
    load_student(config, tokenizer).save_pretrained(place)
    tokenizer.save_pretrained(place)


def measure(root: Path, settings: dict) -> list:
    recipe, processes = write(root, settings), settings.get("processes", 1)
    (root / "measure.py").write_text(MEASURE)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, str(root / "measure.py"), str(Path(__file__).parents[1]), str(recipe)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("[")))


@pytest.mark.slow
@pytest.mark.skipif(not Resident.measurable, reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_the_plan_is_what_a_run_takes(tmp_path, settings):
    """Within 15 %."""
    planned, measured, *_ = measure(tmp_path, settings)
    assert planned == pytest.approx(measured, rel=0.15)


SAVES = "train.gradient_checkpointing=true"
HALF, QUARTER = "train.micro_batch_size=2", "train.micro_batch_size=1"
TAUGHT = {"checkpointing": "true", "teacher": SMALL, "fraction": 1}


@pytest.mark.parametrize(
    ("settings", "gpus", "memory", "expected"),
    [
        ({"processes": 2}, 2, 12e6, ["deepspeed.zero_stage=2", SAVES]),
        ({}, 1, 14e6, [SAVES]),
        (TAUGHT, 1, 40e6, [HALF]),
        (TAUGHT, 1, 34.7e6, [HALF, QUARTER, "teacher.placement=cpu"]),
    ],
)
def test_what_is_advised_where_a_plan_does_not_fit(tmp_path, monkeypatch, capsys, settings, gpus, memory, expected):
    """The first knob is that which costs least time; all in their order, set as is said, make it fit as is said."""
    for module in ("plan.memory", "needs"):
        monkeypatch.setattr(f"kdkernels.training.{module}.BUCKET", 10**5)  # DeepSpeed's would be most of so small a GPU
    recipe = str(write(tmp_path, TINY | settings))

    def planned(size: float, *changes: str) -> str:
        monkeypatch.setitem(CARDS, "a100-40g", (*CARDS["a100-40g"][:-1], int(size)))
        assert main(["plan", recipe, "--gpu=a100-40g", f"--gpus={gpus}", *(f"--set={one}" for one in changes)]) == 0
        return capsys.readouterr().out

    printed = planned(memory)
    assert "\n# does not fit: " in printed
    advice = re.findall(r"^#   with --set (\S+): (.*?)(, which fits)?$", printed, re.MULTILINE)
    changes = [change for change, _, _ in advice]
    assert changes == expected and [bool(fits) for *_, fits in advice] == [False] * (len(advice) - 1) + [True]
    followed = planned(memory, *changes)
    assert "\n# fits: " in followed and f"memory of a GPU: {advice[-1][1]} at most" in followed
    assert "\n# does not fit: " in planned(memory, *changes[:-1])
    assert "too much all the same: take more GPUs" in planned(1e6)


def test_activations_are_those_of_a_decoder_layer():
    """Worked out by hand: two norms keep 3 H each, attention queries, keys, values and output, the gated layer 4 F."""
    hidden, inner, rows = 64, 128, 2 * 16
    one, two = (forward_backward(_model(layers), 2, 16) for layers in (1, 2))
    assert two.kept - one.kept == pytest.approx(4 * rows * (6 * hidden + 4 * hidden + 4 * inner), rel=0.02)
    products = 2 * rows * (2 * hidden * hidden + 2 * hidden * 32 + 3 * hidden * inner) + 4 * rows * 16 * hidden
    assert two.flops - one.flops == products
    assert two.backward_flops - one.backward_flops == 2 * products + 2 * rows * 16 * hidden


def _model(layers: int):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("qwen2", num_hidden_layers=layers, vocab_size=50, **shape)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
