"""A tiny task of VCRD: student, teacher, process reward model and recipe, for tests of what is made before training."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from kdkernels.training import load_config
from kdkernels.training.models.loading import load_student, load_tokenizer

from .conftest import write_task

RECIPE = """
extends = "recipe.toml"
[run]
output = "{root}/vcrd"
[student]
path = "{root}/student"
[teacher]
path = "{root}/teacher"
[tokenizer]
path = "{root}/student"
[data]
by_length = true
[responses]
output = "{root}/responses"
batch_size = 3
shard = 5
[judge]
path = "{root}/judge"
batch_size = 2
[objective]
name = "VCRD"
alpha = 0.1
lambda_teacher = 2.0
lambda_student = 1.5
[train]
batch_size = 8
micro_batch_size = 2
"""


def write_offline(root: Path) -> Path:
    """Writes the models and vcrd.toml into `root`; the path of the recipe."""
    base = load_config(write_task(root))
    tokenizer = load_tokenizer(base)
    for seed, name in enumerate(("student", "teacher", "judge")):
        torch.manual_seed(seed)
        load_student(base, tokenizer).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    head = {"v_head.summary.weight": torch.randn(1, 16), "v_head.summary.bias": torch.randn(1)}
    save_file(head, root / "judge" / "value_head.safetensors")
    recipe = root / "vcrd.toml"
    recipe.write_text(RECIPE.format(root=root))
    return recipe
