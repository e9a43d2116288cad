"""The models of a recipe: tokenizer, student and teacher, read and checked."""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from kdkernels.data.batch import collate
from kdkernels.data.chat import turn_end
from kdkernels.data.texts import render
from kdkernels.data.tokenizers import train_tokenizer, vocabulary_size
from kdkernels.errors import InputError
from kdkernels.rollouts.local import end_ids
from kdkernels.sources import Head
from kdkernels.sources.from_model import tail, trunk
from kdkernels.training.models.adapters import attach, merge, read
from kdkernels.training.models.attention import FLASH, attend
from kdkernels.training.models.weights import check_weights
from kdkernels.training.recipe.config import AdapterConfig, Config
from kdkernels.training.recipe.resolve import adapter_base
from kdkernels.training.recipe.schema import refuse_unknown


def load_tokenizer(config: Config, trained: Path | None = None) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer. If it asks for one trained on the rendered training examples: from the directory
    `trained` where the run did that earlier, or else trained now. Raises InputError.
    """
    if trained is not None:
        return read_tokenizer(str(trained), "[tokenizer] of the run")
    if config.tokenizer.kind is not None:
        data = config.data
        texts = [prompt + response for _, prompt, response in render(data.train, data.prompt, data.response)]
        try:
            return train_tokenizer(texts, config.tokenizer.kind, config.tokenizer.vocab_size)
        except ValueError as error:
            raise InputError(f"[tokenizer] trained on {config.data.train}: {error}") from error
    tokenizer = read_tokenizer(config.tokenizer.path, "[tokenizer] path")
    if tokenizer.eos_token_id is None:
        raise InputError(f"[tokenizer] path: the tokenizer {config.tokenizer.path} has no end-of-sequence token")
    return tokenizer


def load_student(config: Config, tokenizer: PreTrainedTokenizerBase | None, *, meta: bool = False) -> PreTrainedModel:
    """The student, read from its path or with fresh weights, in training mode. Raises InputError.

    Fresh weights are float32 until the strategy gives them the run's dtype: a seed draws the same weights for all.
    meta: without weights, on the meta device, to check as much as can be without them. tokenizer: None where it is not
    known and the student has a path, which may then be that of a configuration alone.

    What it writes in a conversation ends with the turn: the chat template's token for that is one of its end tokens.
    """
    model = _student(config, tokenizer, meta).train()
    turn = turn_end(tokenizer) if config.data.messages is not None and tokenizer is not None else None
    if turn is not None and turn not in end_ids(model, tokenizer):
        model.generation_config.eos_token_id = [*end_ids(model, tokenizer), turn]
    if not meta or config.student.attention != FLASH:
        attend(model, config.student.attention, config.run.dtype, "[student]")
    if config.train.gradient_checkpointing:
        with _named("[train] gradient_checkpointing"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of the name, which older transformers know alone
            model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _student(config: Config, tokenizer: PreTrainedTokenizerBase | None, meta: bool) -> PreTrainedModel:
    path, key = config.student.path, "[student] path"
    if path is None:
        return _fresh_model(config, tokenizer, meta)
    if tokenizer is not None and path != config.tokenizer.path:
        with _named(key):
            has_tokenizer = bool(get_tokenizer_config(path))
        if has_tokenizer:
            _check_tokenizer(path, key, config, tokenizer)
    return _read_model(path, key, config, tokenizer, meta, config.run.dtype, config.student.adapter)


def load_teacher(config: Config, tokenizer: PreTrainedTokenizerBase | None, *, meta: bool = False) -> PreTrainedModel:
    """The frozen model at [teacher] path in evaluation mode; its tokenizer must give every token the id that
    `tokenizer` gives it. Raises InputError. meta, and no tokenizer: as in `load_student`.
    """
    path, key = config.teacher.path, "[teacher] path"
    if tokenizer is not None:
        _check_tokenizer(path, key, config, tokenizer)
    model = _read_model(path, key, config, tokenizer, meta, config.teacher.dtype).eval().requires_grad_(False)
    if not meta or config.teacher.attention != FLASH:
        attend(model, config.teacher.attention, config.teacher.dtype, "[teacher]")
    return model


def load_frozen(path: str, key: str, dtype: str, attention: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The frozen model at `path` in evaluation mode, without a recipe, and its tokenizer. Raises InputError."""
    tokenizer = read_tokenizer(path, key)
    model = _read_model(path, key, None, tokenizer, False, dtype).eval().requires_grad_(False)
    attend(model, attention, dtype, key)
    return model, tokenizer


def _fresh_model(config: Config, tokenizer: PreTrainedTokenizerBase, meta: bool) -> PreTrainedModel:
    key = "[student] architecture"
    configuration = _architecture(config, tokenizer, key)
    _check_positions(configuration, key, config)
    with _named(key):
        with torch.device("meta" if meta else "cpu"):
            model = AutoModelForCausalLM.from_config(configuration, dtype=torch.float32)
        _try_out(model, vocabulary_size(tokenizer))
    return model


def _read_model(
    path: str,
    key: str,
    config: Config | None,
    tokenizer: PreTrainedTokenizerBase | None,
    meta: bool,
    dtype: str,
    adapter: AdapterConfig | None = None,
) -> PreTrainedModel:
    """The model at `path`, with the recipe's `adapter` where it has one. Where `path` holds an adapter itself, that one
    is trained further, or else merged into its base.
    """
    base = adapter_base(path)
    model = _read_whole(base or path, key, config, tokenizer, meta, dtype)
    if adapter is not None:
        attach(model, adapter, base or path, trained=Path(path) if base else None, key=key)
    elif base and not meta:
        model = merge(model, *read(Path(path), key), Path(path), key)
    return model


def _read_whole(
    path: str, key: str, config: Config | None, tokenizer: PreTrainedTokenizerBase | None, meta: bool, dtype: str
) -> PreTrainedModel:
    with _named(key):
        configuration = AutoConfig.from_pretrained(path)
    if config is not None:
        _check_positions(configuration, key, config)
    with _named(key), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration)
    if Path(path).is_dir():
        check_weights(Path(path), model, key)
    if not meta:
        with _named(key):
            model, report = AutoModelForCausalLM.from_pretrained(
                path, config=configuration, dtype=getattr(torch, dtype), output_loading_info=True
            )
        if report["missing_keys"]:
            missing = sorted(report["missing_keys"])
            raise InputError(f"{key}: {len(missing)} weights are missing in {path}, for instance {missing[0]}")
    elif model.can_generate():
        with suppress(OSError):  # without a file of its own, it follows from the configuration
            model.generation_config = GenerationConfig.from_pretrained(path)
    with _named(key):  # without weights, this is all that can be known of its head
        entries = tail(model).entries
        trunk(model)
    needed = 0 if tokenizer is None else vocabulary_size(tokenizer)
    if entries < needed:
        raise InputError(
            f"{key}: expected a vocabulary of at least {needed}, that of the tokenizer, got {entries} in {path}"
        )
    return model


def _architecture(config: Config, tokenizer: PreTrainedTokenizerBase, key: str) -> PreTrainedConfig:
    """The transformers configuration of a fresh student, its vocabulary that of the tokenizer, padded."""
    options = dict(config.student.architecture)
    model_type = options.pop("model_type")
    refuse_unknown([model_type], CONFIG_MAPPING.keys(), f"{key}:", "model_type")
    with _named(key):
        default = AutoConfig.for_model(model_type)
    owned = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    known = {*default.to_dict(), *default.attribute_map} - {*owned, "model_type"}
    refuse_unknown(options, known, f"{key}:", "key")
    multiple = config.student.pad_vocab_to
    options["vocab_size"] = -(-vocabulary_size(tokenizer) // multiple) * multiple
    options |= {name: getattr(tokenizer, name) for name in owned[1:]}
    with _named(key):
        return AutoConfig.for_model(model_type, **options)


def _try_out(model: PreTrainedModel, vocab_size: int) -> None:
    """Runs `model` on two tokens: some of an architecture's numbers contradict each other only then."""
    if model.device.type == "meta":  # not all models run there. Memory that nobody has written to costs none
        model = copy.deepcopy(model).to_empty(device="cpu")
        for buffer in model.buffers():
            buffer.zero_()
    with torch.no_grad():
        Head.of(model.eval(), vocab_size=vocab_size, **collate([[0]], [[0]], pad_id=0).inputs)


def _check_positions(configuration: PreTrainedConfig, key: str, config: Config) -> None:
    check_positions(getattr(configuration.get_text_config(), "max_position_embeddings", None), key, config)


def check_positions(positions: int | None, key: str, config: Config) -> None:
    """Refuses token limits beyond the positions of a model; some models have no bound (None)."""
    fraction, evaluation, limits = config.rollout.student_fraction, config.evaluation, {}
    if fraction < 1 or (evaluation is not None and evaluation.by_token):
        limits["[data] max_response_tokens"] = config.data.max_response_tokens
    if fraction > 0:
        limits["[rollout] max_new_tokens"] = config.rollout.max_new_tokens
    if evaluation is not None and "exact_match" in evaluation.metrics and not key.startswith("[teacher]"):
        limits["[evaluation] max_new_tokens"] = evaluation.max_new_tokens
    for name, limit in limits.items():
        if positions is not None and config.data.max_prompt_tokens + limit > positions:
            raise InputError(
                f"{name} {limit} and [data] max_prompt_tokens {config.data.max_prompt_tokens}: expected a sum of at "
                f"most {positions}, the max_position_embeddings of {key}"
            )


def _check_tokenizer(path: str, key: str, config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a model whose own tokenizer is another one than the recipe's."""
    own, expected = read_tokenizer(path, key).get_vocab(), tokenizer.get_vocab()
    if own != expected:
        differ = sorted(set(own.items()) ^ set(expected.items()))
        recipes = f"that of {config.tokenizer.path}" if config.tokenizer.path else f"one trained on {config.data.train}"
        raise InputError(
            f"{key}: expected the recipe's tokenizer, {recipes}, but that of {path} differs in {len(differ)} entries, "
            f"for instance {differ[0]}"
        )


def read_tokenizer(path: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, as it was saved.

    AutoTokenizer prefers the class that goes with the model's type (beside a Qwen2 model it puts Qwen2's pre-tokenizer
    in place of the saved one); a tokenizer that declares itself a plain tokenizer.json is read as such.
    """
    with _named(key):
        declared = get_tokenizer_config(path).get("tokenizer_class")
        plain = declared in ("PreTrainedTokenizerFast", "TokenizersBackend")
        return (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(path)


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Names the recipe's key in what transformers says about a model that cannot be read or built.

    Its errors have no type in common (OSError, ValueError, KeyError, RuntimeError, SafetensorError, UnpicklingError,
    ZeroDivisionError and more): nothing but reading, building and trying out its models belongs in here.
    """
    try:
        yield
    except Exception as error:
        said = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        raise InputError(f"{key}: {said}") from error
