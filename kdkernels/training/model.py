"""The models of a run: tokenizer, student and teacher, and the module whose forward is the loss.

Shapes: B responses, L length, H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from kdkernels import Head
from kdkernels.training.config import Config
from kdkernels.training.data import Batch, render
from kdkernels.training.schema import InputError, refuse_unknown
from kdkernels.training.tokenizers import train_tokenizer


class Distillation(nn.Module):
    """Student and objective in one module, so that the engine that wraps it sees every use of every weight, the
    lm_head's included.
    """

    def __init__(self, student: PreTrainedModel, objective: nn.Module, vocab_size: int):
        super().__init__()
        self.student, self.objective, self.vocab_size = student, objective, vocab_size

    def forward(self, batch: Batch, teacher: Head | None):
        """The objective's output (loss, count, metrics) for `batch`."""
        scored = head(self.student, batch, self.vocab_size)
        from_teacher = batch.from_teacher if self.objective.by_author else None
        return self.objective(scored, teacher, batch.layout, target=batch.target, from_teacher=from_teacher)


def head(model: PreTrainedModel, batch: Batch, vocab_size: int) -> Head:
    """The model's last hidden states [B, L, H] for `batch` with its lm_head, which is left to multiply the positions
    that matter.
    """
    trunk = model.base_model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    return Head.from_model(model, trunk.last_hidden_state, vocab_size=vocab_size)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids with a token behind them: a model may have more rows, as padding."""
    return max(tokenizer.get_vocab().values()) + 1


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The recipe's tokenizer, trained on the rendered training examples if it asks for that. Raises InputError."""
    if config.tokenizer.kind is not None:
        texts = (prompt + response for _, _, prompt, response in render(config.data, config.data.train))
        try:
            return train_tokenizer(texts, config.tokenizer.kind, config.tokenizer.vocab_size)
        except ValueError as error:
            raise InputError(f"[tokenizer] {error}") from error
    tokenizer = _read_tokenizer(config.tokenizer.path, "[tokenizer] path")
    if tokenizer.eos_token_id is None:
        raise InputError(f"[tokenizer] path: the tokenizer {config.tokenizer.path} has no end-of-sequence token")
    return tokenizer


def load_student(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The student, read from its path or with fresh weights, in training mode. Raises InputError.

    Fresh weights are float32 until the engine gives them the run's dtype: a seed draws the same weights for all.
    """
    if config.student.path is not None:
        return _load_model(config.student.path, "[student] path", config, tokenizer).train()
    return AutoModelForCausalLM.from_config(_architecture(config, tokenizer), dtype=torch.float32).train()


def load_teacher(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The frozen teacher in evaluation mode; its tokenizer must give every token the id that `tokenizer` gives it.
    Raises InputError.
    """
    vocabulary = _read_tokenizer(config.teacher.path, "[teacher] path").get_vocab()
    if vocabulary != tokenizer.get_vocab():
        differ = sorted(set(vocabulary.items()) ^ set(tokenizer.get_vocab().items()))
        raise InputError(
            f"[teacher] path: expected the student's tokenizer, but that of {config.teacher.path} differs in "
            f"{len(differ)} entries, for instance {differ[0]}"
        )
    return _load_model(config.teacher.path, "[teacher] path", config, tokenizer).eval().requires_grad_(False)


def count_parameters(config: Config, tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Parameters of student and teacher, found without allocating them. Raises InputError."""
    models = {}
    with torch.device("meta"):
        if config.student.path is None:
            models["student"] = _architecture(config, tokenizer)
        else:
            models["student"] = _configuration(config.student.path, "[student] path")
        if config.teacher is not None:
            models["teacher"] = _configuration(config.teacher.path, "[teacher] path")
        return {name: AutoModelForCausalLM.from_config(model).num_parameters() for name, model in models.items()}


def _architecture(config: Config, tokenizer: PreTrainedTokenizerBase):
    """The transformers configuration of a fresh student, its vocabulary that of the tokenizer, padded."""
    options = dict(config.student.architecture)
    place = "[student] architecture:"
    try:
        default = AutoConfig.for_model(options.pop("model_type"))
    except ValueError as error:
        raise InputError(f"{place} {error}") from error
    owned = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
    known = {*default.to_dict(), *default.attribute_map} - {*owned, "model_type"}
    refuse_unknown(options, known, place, "key")
    multiple = config.student.pad_vocab_to
    options["vocab_size"] = -(-vocabulary_size(tokenizer) // multiple) * multiple
    options |= {name: getattr(tokenizer, name) for name in owned[1:]}
    return AutoConfig.for_model(config.student.architecture["model_type"], **options)


def _read_tokenizer(path: str, key: str) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, as it was saved.

    AutoTokenizer prefers the class that goes with the model's type (beside a Qwen2 model it puts Qwen2's pre-tokenizer
    in place of the saved one); a tokenizer that declares itself a plain tokenizer.json is read as such.
    """
    with _named(key):
        declared = get_tokenizer_config(path).get("tokenizer_class")
        plain = declared in ("PreTrainedTokenizerFast", "TokenizersBackend")
        return (PreTrainedTokenizerFast if plain else AutoTokenizer).from_pretrained(path)


def _configuration(path: str, key: str):
    with _named(key):
        return AutoConfig.from_pretrained(path)


def _load_model(path: str, key: str, config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    with _named(key):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, config.run.dtype))
    rows, words = model.get_output_embeddings().weight.shape[0], vocabulary_size(tokenizer)
    if rows < words:
        raise InputError(
            f"{key}: expected a vocabulary of at least {words}, that of the tokenizer, got {rows} in {path}"
        )
    return model


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Names the recipe's key in what transformers says about a model that cannot be read."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise InputError(f"{key}: {error}") from error
