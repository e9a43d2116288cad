"""A model's weights on disk, checked against the model without reading them: headers and indexes only."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from kdkernels.errors import InputError

# what transformers looks for, in this order
SINGLE_OR_INDEX = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

Shapes = dict[str, tuple[int, ...]]


def check_weights(path: Path, model: nn.Module, key: str) -> None:
    """Raises InputError, which names the recipe's `key`, unless the files in `path` have the weights of `model`
    (its own may be on the meta device): every shard of the index is there and whole, no weight is missing, and each has
    the model's shape.

    A name of the files that the model does not know may be one that transformers renames or merges when it reads them;
    where there are such names, only the shapes of the others are compared.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found = {_known(name, prefix, expected): shape for name, shape in _shapes(path, key).items()}
    for name, shape in found.items():
        if name in expected and shape != expected[name]:
            raise InputError(
                f"{key}: {name} in {path}: expected shape {_text(expected[name])}, that of config.json, "
                f"got {_text(shape)}"
            )
    missing = _missing(model, found)
    if missing and not found.keys() - expected.keys():
        raise InputError(f"{key}: {len(missing)} weights are missing in {path}, for instance {missing[0]}")


def _known(name: str, prefix: str, names: Collection[str]) -> str:
    """`name` as the model has it: files of a trunk alone lack its prefix, those of a whole model have it too much for
    a trunk.
    """
    return next((one for one in (name, prefix + name, name.removeprefix(prefix)) if one in names), name)


def _missing(model: nn.Module, found: Iterable[str]) -> list[str]:
    """The model's parameters of which no name is `found`: one that is tied has several."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    found = set(found)
    return sorted(tied[0] for tied in names.values() if not found & set(tied))


def _shapes(path: Path, key: str) -> Shapes:
    """The shapes of all tensors in the files that transformers would read."""
    file = next((path / name for name in SINGLE_OR_INDEX if (path / name).is_file()), None)
    if file is None:
        raise InputError(f"{key}: no weights in directory {path}: expected model.safetensors")
    if file.suffix != ".json":
        return _file_shapes(file, key)
    shards = {}
    for name, shard in _index(file, key).items():
        shards.setdefault(shard, []).append(name)
    shapes = {}
    for shard, names in sorted(shards.items()):
        if not (path / shard).is_file():
            raise InputError(f"{key}: {path / shard} is missing; {file.name} has {len(names)} weights in it")
        inside = _file_shapes(path / shard, key)
        absent = sorted(set(names) - inside.keys())
        if absent:
            raise InputError(f"{key}: {absent[0]} is missing in {path / shard}, where {file.name} has it")
        shapes |= inside
    return shapes


def _index(file: Path, key: str) -> Mapping[str, str]:
    """The shard of every weight."""
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        weights = index["weight_map"]
        if not weights or not all(type(shard) is str for shard in weights.values()):
            raise ValueError("its weight_map does not name a file for each weight")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{key}: {file} is no index of weights: {type(error).__name__}: {error}") from error
    return weights


def _file_shapes(file: Path, key: str) -> Shapes:
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as tensors:
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        tensors = torch.load(file, map_location="meta", weights_only=True, mmap=True)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    except (OSError, ValueError, RuntimeError, AttributeError, EOFError, SafetensorError, UnpicklingError) as error:
        raise InputError(f"{key}: {file} cannot be read: {type(error).__name__}: {error}") from error


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "of a single number"
