"""LoRA and DoRA on a recipe's student, through PEFT: the base's weights stay as they are, only the adapter is trained.

The student stays a model of transformers, some of whose layers are PEFT's. An adapter on the disk is what PEFT reads
and writes: adapter_config.json, which names the base, and adapter_model.safetensors.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from kdkernels.errors import InputError, MissingPackage
from kdkernels.sources.output_layer import innermost, is_adapter
from kdkernels.training.recipe.config import AdapterConfig

ALL_LINEAR, OUTPUT_LAYER = "all-linear", "lm_head"  # what target_modules may name, whatever a model calls its layers
NAME = "default"  # PEFT's own for a single adapter
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT's files put before the name of each weight
# What adapters may differ in and still compute the same: where they lie, how they were made, what training alone does.
ALIKE = {"base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping", "peft_version"}
ALIKE |= {"init_lora_weights", "lora_dropout", "target_modules"}


def attach(
    model: PreTrainedModel, settings: AdapterConfig, base: str, trained: Path | None = None, key: str = ""
) -> None:
    """Puts the recipe's adapter on `model`, which computes what it did before, and freezes everything else.

    Args:
        model: what was read from `base`; on the meta device too.
        settings: [student.adapter].
        base: where the model's weights are, which goes into adapter_config.json.
        trained: the directory of an adapter, made on the same base with the same settings, that is to be trained
            further instead.
        key: of the recipe, what error messages name `trained` by.

    Raises:
        InputError: the model has no such layers; the adapter in `trained` is another one, or cannot be read.
        MissingPackage: there is no PEFT.
    """
    targets = _targets(model, settings.target_modules)
    _check_rank(model, settings.r, targets)
    config = peft().LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=targets,
        use_dora=settings.kind == "dora",
        task_type="CAUSAL_LM",
    )
    with _quiet():
        model.add_adapter(config)
    _check_magnitudes(model)
    directory = Path(base)
    config.base_model_name_or_path = str(directory.absolute()) if directory.is_dir() else base
    if trained is None:
        return
    saved, state = read(trained, key)
    _check_alike(saved, config, trained)
    fitting = _fitting(state, model, trained, key)
    if model.device.type != "meta":
        names = {name.removeprefix(PREFIX): tensor for name, tensor in fitting.items()}
        peft().set_peft_model_state_dict(model, names, adapter_name=NAME)


def read(directory: Path, key: str) -> tuple[Any, dict[str, Tensor]]:
    """PEFT's configuration and the weights of the adapter in `directory`. Raises InputError, which names `key`."""
    try:
        return peft().PeftConfig.from_pretrained(str(directory)), load_file(directory / WEIGHTS)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"{key}: the adapter in {directory} cannot be read: {error}") from error


def merge(model: PreTrainedModel, config: Any, state: Mapping[str, Tensor], place: Path, key: str) -> PreTrainedModel:
    """The base `model` with an adapter's product added to its weights, and no adapter.

    Where the adapter is on an output layer that shares the embedding's weight, the two are no longer tied.

    Args:
        model: the base, which is used up.
        config, state: PEFT's configuration of the adapter, and its weights by the names of its file.
        place, key: where they come from, and the recipe's key for it, for error messages.

    Raises:
        InputError: adapter and base do not fit.
    """
    with _quiet():
        try:
            wrapped = peft().get_peft_model(model, config, adapter_name=NAME)
        except (ValueError, TypeError, RuntimeError) as error:
            raise InputError(f"{key}: the adapter in {place} does not fit its base: {error}") from error
        fitting = _fitting(state, wrapped.base_model.model, place, key)
        peft().set_peft_model_state_dict(wrapped, fitting, adapter_name=NAME)
        _untie(wrapped.base_model.model)
        return wrapped.merge_and_unload().requires_grad_(True)


def save(student: PreTrainedModel, weights: Mapping[str, Tensor], settings: AdapterConfig, directory: Path) -> None:
    """Writes the student's adapter into `directory`, or with `merge` the whole model without one, whose base is read
    again. `weights`: of the student, those that are trained among them.
    """
    config = student.peft_config[NAME]
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in _state(student, weights).items()}
    if settings.merge:
        base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, dtype=student.dtype)
        merge(base, config, state, directory, "[student.adapter]").save_pretrained(directory)
    else:
        config.save_pretrained(directory)
        save_file(state, directory / WEIGHTS, metadata={"format": "pt"})


def peft() -> ModuleType:
    """PEFT. Raises MissingPackage."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise MissingPackage("[student.adapter] needs peft: pip install kdkernels[adapters]") from error
    return peft


def _targets(model: PreTrainedModel, wanted: tuple[str, ...]) -> list[str]:
    """The full names of the layers that are `wanted`, by the last parts of their names."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    output = {name for name, module in linear.items() if module is model.get_output_embeddings()}
    chosen = set()
    for target in wanted:
        found = {
            ALL_LINEAR: linear.keys() - output,
            OUTPUT_LAYER: output,
        }.get(target) or {name for name in linear if f".{name}".endswith(f".{target}")}
        if not found:
            known = sorted({name.rpartition(".")[2] for name in linear} - {OUTPUT_LAYER})
            raise InputError(
                f"[student.adapter] target_modules: expected names of linear layers of {type(model).__name__} "
                f"({', '.join([*known, OUTPUT_LAYER, ALL_LINEAR])}), got {target!r}"
            )
        chosen |= found
    return sorted(chosen)


def _check_rank(model: PreTrainedModel, rank: int, targets: Sequence[str]) -> None:
    """Raises InputError for a product of a higher rank than any product of its size has."""
    shapes = {name: tuple(model.get_submodule(name).weight.shape) for name in targets}
    name = min(shapes, key=lambda name: min(shapes[name]))
    if rank > min(shapes[name]):
        rows, columns = shapes[name]
        raise InputError(
            f"[student.adapter] r: expected at most {min(shapes[name])}, the smaller side of {name} "
            f"({rows} x {columns}), got {rank}"
        )


def _state(model: PreTrainedModel, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The adapter's weights by the names of PEFT's files, its own or of those given; not the output layer's, which PEFT
    would save too.
    """
    found = peft().get_peft_model_state_dict(model, weights, adapter_name=NAME, save_embedding_layers=False)
    return {PREFIX + name: tensor for name, tensor in found.items()}


def _check_magnitudes(model: PreTrainedModel) -> None:
    """Raises InputError where DoRA, which divides by the norms of a weight's rows, has a row of zeros."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name and parameter.device.type != "meta" and not parameter.all():
            layer = name.partition(".lora_magnitude_vector")[0]
            raise InputError(
                f'[student.adapter] kind: expected "lora" for {layer}, which has a row of zeros, got "dora", which '
                "divides by the rows' norms (the vocabulary's padding may be such rows: leave lm_head out)"
            )


def _check_alike(saved: Any, config: Any, place: Path) -> None:
    """Raises InputError unless the `saved` adapter computes what one of `config` would."""
    theirs, ours = saved.to_dict(), config.to_dict()
    names = sorted(name for name in {*theirs, *ours} - ALIKE if theirs.get(name) != ours.get(name))
    if names:
        said = "; ".join(f"{name}: expected {theirs.get(name)}, got {ours.get(name)}" for name in names)
        raise InputError(
            f"[student.adapter] expected that of the adapter in {place}, which is trained further: {said}. To begin "
            "another adapter, let the recipe that trained that one write a whole model ([student.adapter] merge = true)"
        )


def _fitting(state: Mapping[str, Tensor], model: PreTrainedModel, place: Path, key: str) -> dict[str, Tensor]:
    """The weights of the adapter that `model` has, from a file that may hold weights of its base beside them, as PEFT
    writes where embedding or output layer has an adapter. Raises InputError unless all of them fit.
    """
    expected, own = _state(model), {PREFIX + name: tensor for name, tensor in model.state_dict().items()}
    beside = {name for name in state.keys() & own.keys() - expected.keys() if ".base_layer." in name}
    got, wanted = ({name: list(one.shape) for name, one in each.items()} for each in (state, expected))
    wanted |= {name: list(own[name].shape) for name in beside}
    for name in sorted({*got, *wanted}):
        if got.get(name) != wanted.get(name):
            raise InputError(
                f"{key}: the adapter in {place} is another one than its base and the recipe make: {name}: expected "
                f"shape {wanted.get(name, 'nothing')}, got {got.get(name, 'nothing')}"
            )
    for name in sorted(beside):
        if own[name].device.type != "meta" and not torch.equal(state[name].to(own[name].dtype), own[name]):
            raise InputError(
                f"{key}: the adapter in {place} was trained on another base: {name} is not that of the base"
            )
    return {name: state[name] for name in expected}


def _untie(model: PreTrainedModel) -> None:
    """Where embedding or output layer has an adapter and they share a weight, gives the output layer one of its own:
    the adapter's product is added to one of them.
    """
    layers = model.get_input_embeddings(), model.get_output_embeddings()
    below = [innermost(layer) for layer in layers]
    if below[0].weight is below[1].weight and any(map(is_adapter, layers)):
        below[1].weight = nn.Parameter(below[1].weight.detach().clone())
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of an adapter on a tied output layer, which nothing here loses: `merge` unties it. And it asks
    transformers for something by an old name.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        warnings.filterwarnings("ignore", message="Model (with|has) `tie_word_embeddings=True`")
        yield
