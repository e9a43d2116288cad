"""Weights on disk: what is wrong with them is told before they are read, by the dry run as by training."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kdkernels.training import InputError
from kdkernels.training.cli import main
from kdkernels.training.models.loading import load_teacher, load_tokenizer
from kdkernels.training.models.weights import check_weights

from .conftest import GKD


@pytest.fixture
def sharded(load, teacher_set, tmp_path):
    """A teacher in several shards, and its directory."""
    path = tmp_path / "teacher"
    model = AutoModelForCausalLM.from_pretrained(teacher_set.partition("=")[2])
    model.save_pretrained(path, max_shard_size="3KB")
    load_tokenizer(load()).save_pretrained(path)
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


def change(path, name, function):
    """Rewrites the shard that holds the weight `name`, `function` having changed its tensors."""
    shard = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(path / shard)
    function(tensors)
    save_file(tensors, path / shard, metadata={"format": "pt"})
    return shard


UP = "model.layers.0.mlp.up_proj.weight"


def shrink(path):
    change(path, UP, lambda tensors: tensors.update({UP: tensors[UP][:, :3].contiguous()}))
    return f"{UP} in {path}: expected shape 32 x 16, that of config.json, got 32 x 3"


def lose(path):
    shard = change(path, UP, lambda tensors: tensors.pop(UP))
    return f"{UP} is missing in {path / shard}, where model.safetensors.index.json has it"


def forget(path):
    shard = change(path, UP, lambda tensors: tensors.pop(UP))
    index = json.loads((path / "model.safetensors.index.json").read_text())
    del index["weight_map"][UP]
    if shard not in index["weight_map"].values():
        (path / shard).unlink()
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return f"1 weights are missing in {path}, for instance {UP}"


def remove(path):
    shard = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"][UP]
    (path / shard).unlink()
    return f"{path / shard} is missing; model.safetensors.index.json has "


def cut(path):
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-8])
    return f"{shard} cannot be read: "


def cut_index(path):
    file = path / "model.safetensors.index.json"
    file.write_text(file.read_text()[:60])
    return f"{file} is no index of weights: JSONDecodeError: "


def empty_index(path):
    (path / "model.safetensors.index.json").write_text('{"weight_map": [1]}')
    return "model.safetensors.index.json is no index of weights: AttributeError: "


def no_index(path):
    (path / "model.safetensors.index.json").unlink()
    return f"no weights in directory {path}: expected model.safetensors"


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize("damage", [shrink, lose, forget, remove, cut, cut_index, empty_index, no_index])
def test_damaged_weights_are_named_before_anything_is_read(recipe, sharded, tmp_path, capsys, damage, dry):
    expected = damage(sharded)
    arguments = ["train", str(recipe), *(f"--set={text}" for text in (*GKD, f"teacher.path={sharded}"))]
    assert main([*arguments, *(["--dry-run"] if dry else [])]) == 2
    started, *told = capsys.readouterr().err.splitlines()
    assert started.endswith("loading libraries")
    assert len(told) == 1 and told[0].startswith("kdkernels: [teacher] path: ") and expected in told[0]
    assert not (tmp_path / "run").exists()


def test_sound_weights_pass(load, sharded, tmp_path):
    config = load(*GKD, f"teacher.path={sharded}")
    tokenizer = load_tokenizer(config)
    read = load_teacher(config, tokenizer)
    assert load_teacher(config, tokenizer, meta=True).device.type == "meta"
    # the older format, in one file and without its trunk's prefix; a tied head, which is in no file
    torch.save(read.model.state_dict(), sharded / "pytorch_model.bin")
    for file in sharded.glob("model*"):
        file.unlink()
    with pytest.raises(InputError, match=r"key: 1 weights are missing in .*, for instance lm_head\.weight"):
        check_weights(sharded, read, "key")
    read.lm_head.weight = read.model.embed_tokens.weight
    check_weights(sharded, read, "key")
    read.model.embed_tokens.weight.data = torch.zeros(3, 4)
    with pytest.raises(InputError, match=r"key: model\.embed_tokens\.weight in .*: expected shape 3 x 4, .* got \d+ x"):
        check_weights(sharded, read, "key")
    (sharded / "pytorch_model.bin").write_bytes(b"no pickle")
    with pytest.raises(InputError, match=r"key: .*pytorch_model\.bin cannot be read"):
        check_weights(sharded, read, "key")


def test_names_that_transformers_renames_are_left_to_it(load, sharded):
    config = load(*GKD, f"teacher.path={sharded}")
    read = load_teacher(config, load_tokenizer(config))
    renamed = {"old." + name if "mlp" in name else name: weight for name, weight in read.state_dict().items()}
    torch.save(renamed, sharded / "pytorch_model.bin")
    for file in sharded.glob("model*"):
        file.unlink()
    check_weights(sharded, read, "key")
