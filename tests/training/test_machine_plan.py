"""The plan's memory against that of runs, each in a process of its own: peak growth of the resident memory.

Steps have two micro-batches of the longest texts that the recipe allows. malloc gives every freed tensor back at once
(MALLOC_MMAP_THRESHOLD_): otherwise what is measured is its fragmentation as well.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from allocations import Resident
from transformers import AutoConfig, AutoModelForCausalLM

from kdkernels.training.plan.activations import forward_backward

RECIPE = """
[run]
output = "{root}/run"
[student]
architecture = {{model_type = "qwen2", hidden_size = {hidden}, num_hidden_layers = {layers}, num_attention_heads = 4, \
num_key_value_heads = 2, intermediate_size = {inner}, tie_word_embeddings = {tied}}}
pad_vocab_to = {vocabulary}
{teacher}
[tokenizer]
kind = "characters"
[data]
train = "{root}/train.jsonl"
prompt = "{{question}}"
response = "{{answer}}"
max_prompt_tokens = {prompt}
max_response_tokens = {response}
[rollout]
student_fraction = {fraction}
[objective]
name = "{objective}"
[optimizer]
lr = 1e-4
[train]
steps = 2
batch_size = 8
micro_batch_size = 4
gradient_checkpointing = {checkpointing}
[checkpoint]
every = 0
[deepspeed]
zero_stage = {stage}
"""

MEASURE = """
import json, sys
from kdkernels.training import load_config, train
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.training.models.loading import load_student, load_teacher, load_tokenizer
from kdkernels.training.plan.memory import Load, memory

tests, recipe = sys.argv[1:]
sys.path.insert(0, tests)
from allocations import Resident

config = load_config(recipe)
tokenizer = load_tokenizer(config)
student = load_student(config, tokenizer, meta=True)
teacher = load_teacher(config, tokenizer, meta=True) if config.teacher else None
load = Load(config, student, teacher, 1, vocabulary_size(tokenizer), None)
planned = memory(load, load.student_pass(), load.teacher_pass())
with Resident() as resident:
    train(config)
print(json.dumps([planned.peak, resident.peak, planned.widest, planned.lasting, planned.phases]))
"""
SMALL = {"hidden": 256, "layers": 6, "inner": 768, "vocabulary": 8192, "prompt": 96, "response": 160}
MIDDLE = {"hidden": 512, "layers": 8, "inner": 1408, "vocabulary": 4096, "prompt": 128, "response": 128}
LARGE = {"hidden": 768, "layers": 10, "inner": 2048, "vocabulary": 16384, "prompt": 64, "response": 96}
DEFAULT = {"tied": "false", "checkpointing": "false", "stage": 0, "objective": "SFT", "teacher": "", "fraction": 0}

CASES = {
    "small": SMALL,
    "middle": MIDDLE | {"stage": 1},
    "large": LARGE,
    "large, tied, checkpointed": LARGE | {"tied": "true", "checkpointing": "true"},
}


def measure(root: Path, settings: dict) -> list:
    line = {"question": "ab" * (settings["prompt"] // 2), "answer": "c" * (settings["response"] - 1)}
    (root / "train.jsonl").write_text((json.dumps(line) + "\n") * 16)
    (root / "recipe.toml").write_text(RECIPE.format(root=root, **DEFAULT | settings))
    command = [sys.executable, "-c", MEASURE, str(Path(__file__).parents[1]), str(root / "recipe.toml")]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not Resident.measurable, reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("settings", CASES.values(), ids=CASES)
def test_the_plan_is_what_a_run_takes(tmp_path, settings):
    """Within 15 %."""
    planned, measured, *_ = measure(tmp_path, settings)
    assert planned == pytest.approx(measured, rel=0.15)


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
