"""Recipes whose student is a saved model with an adapter, for the tests of adapters."""

import shutil
from pathlib import Path

import torch

from kdkernels.training import Config, load_config
from kdkernels.training.models import adapters
from kdkernels.training.models.loading import load_student, load_tokenizer

from .conftest import RECIPE, write_task

SETTINGS = 'kind = "{kind}"\nr = 3\nalpha = 5\ntarget_modules = ["all-linear", "lm_head"]\n'


def write_base(root: Path) -> Path:
    """A qwen2-like base in `root` whose embedding and head are tied, as those of small models are; a random adapter of
    each kind on it beside it (`lora`, `dora`); the path of a recipe that adapts the base.
    """
    config = load_config(write_task(root), ["student.architecture.tie_word_embeddings=true"])
    tokenizer = load_tokenizer(config)
    torch.manual_seed(11)
    base = load_student(config, tokenizer)
    torch.nn.init.normal_(base.get_input_embeddings().weight, std=0.3)  # the padding's too, which would be zeros
    base.save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for kind in ("lora", "dora"):
        recipe = root / f"{kind}.toml"
        recipe.write_text(adapted(root, SETTINGS.format(kind=kind)))
        config = load_config(recipe)
        student = load_student(config, tokenizer)
        for name, parameter in student.named_parameters():
            if "lora_B" in name:  # which PEFT begins with zeros
                torch.nn.init.normal_(parameter, std=0.3)
        (root / kind).mkdir()
        adapters.save(student, student.state_dict(), config.student.adapter, root / kind)
        tokenizer.save_pretrained(root / kind)
    return root / "lora.toml"


def adapted(root: Path, settings: str) -> str:
    """The text of a recipe with the student `base` in `root` and these lines in [student.adapter]."""
    head, rest = RECIPE.format(root=root).split("[student]")
    rest = rest.split('kind = "characters"\n')[1]
    return f'{head}[student]\npath = "{root}/base"\n[student.adapter]\n{settings}{rest}'


def trained_weights(config: Config) -> dict[str, torch.Tensor]:
    """The adapter's weights in the newest checkpoint of the recipe's run, by the names of PEFT's files."""
    newest = max((Path(config.run.output) / "checkpoints").iterdir())
    module = torch.load(newest / "shared.pt", weights_only=True)["module"]
    names = {name: name.removeprefix("student.").replace(".default", "") for name in module}
    names = {name: text.replace("vector.weight", "vector") for name, text in names.items()}
    return {adapters.PREFIX + names[name]: tensor for name, tensor in module.items()}


def copy_of(root: Path, other: Path) -> Path:
    """A copy of everything that `write_base` wrote, whose recipes speak of the copy."""
    shutil.copytree(root, other)
    for file in [*other.glob("*.toml"), *other.glob("*/adapter_config.json")]:
        file.write_text(file.read_text().replace(str(root), str(other)))
    return other
