"""Responses written by a model in this process: sampled from exactly its distribution, or greedily."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from kdkernels.data.tokenizers import vocabulary_size

UNTRUNCATED = {"do_sample": True, "top_k": 0}  # transformers' own default is top_k=50


class LocalSampler:
    """The student's own `generate` in transformers: its weights are always the present ones, so nothing is synced.

    `temperature`, `top_p`: of what is sampled; with any but 1 and 1, that is not the model's own distribution, which
    training on what the student writes needs.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float = 1.0, top_p: float = 1.0
    ):
        self.model, self.tokenizer = model, tokenizer
        self.sampling = UNTRUNCATED | {"temperature": temperature, "top_p": top_p}

    @property
    def ends(self) -> tuple[int, ...]:
        return end_ids(self.model, self.tokenizer)

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, *, greedy: bool = False
    ) -> list[list[int]]:
        """The model's response to each prompt, as in `Sampler.generate`.

        Every token is drawn from softmax(logits) over the tokenizer's vocabulary (or as the sampler's temperature and
        top_p change that), whatever the checkpoint's own generation_config asks for. Ids without a token, which pad a
        vocabulary, have probability 0, as they have in the objectives.

        Raises:
            FloatingPointError: for logits that are no distribution: with a NaN or +inf among them, or none above -inf.
        """
        model, ends = self.model, self.ends
        padding = ends[0]
        length = max(map(len, prompts))
        input_ids = torch.full((len(prompts), length), padding)  # the attention mask alone says what is padding
        attention_mask = torch.zeros_like(input_ids)
        for b, prompt in enumerate(prompts):
            input_ids[b, length - len(prompt) :] = torch.tensor(prompt)
            attention_mask[b, length - len(prompt) :] = 1
        settings = GenerationConfig(
            **({"do_sample": False} if greedy else self.sampling),
            max_new_tokens=max_new_tokens,
            eos_token_id=list(ends),
            pad_token_id=padding,
        )
        with torch.no_grad(), evaluating(model), _without_generation_config(model), _without_router_loss(model):
            output = model.generate(
                input_ids.to(model.device),
                attention_mask=attention_mask.to(model.device),
                generation_config=settings,
                logits_processor=LogitsProcessorList([TokenDistribution(vocabulary_size(self.tokenizer))]),
            )
        return [_until_end(response, ends) for response in output[:, length:].tolist()]

    def sync(self) -> None:
        """Nothing: the model is the student."""

    def metrics(self) -> dict[str, float]:
        """Nothing."""
        return {}

    def close(self) -> None:
        """Nothing: the model is the trainer's."""


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids any of which ends a response of `model`: the tokenizer's end-of-sequence token first, then those that the
    checkpoint's generation_config names beside it (chat models end a turn with one and a text with another).
    """
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, (list, tuple)) else [] if named is None else [named]
    return tuple(dict.fromkeys((tokenizer.eos_token_id, *map(int, named))))


class TokenDistribution(LogitsProcessor):
    """Gives the ids from `vocab_size` on, which no token has, probability 0, and refuses logits that are no
    distribution: the draw would end in an error that names no cause, the greedy choice in any token.
    """

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, self.vocab_size :] = -torch.inf
        if not scores.amax(1).isfinite().all():  # the largest is NaN where any is
            raise FloatingPointError("the logits of the model that writes a response are not finite")
        return scores


def _until_end(response: list[int], ends: Sequence[int]) -> list[int]:
    """Cuts off what follows the first token that ends a response: padding, which may be such a token again."""
    end = next((i for i, token in enumerate(response) if token in ends), len(response))
    return response[: end + 1]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode (no dropout) for a while, then whatever mode the model was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """Hides the checkpoint's generation_config: `generate` takes from it whatever the given settings leave unset (bad
    words, forced tokens ...).
    """
    hidden, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = hidden


@contextmanager
def _without_router_loss(model: PreTrainedModel) -> Iterator[None]:
    """Keeps a mixture of experts from computing its router loss, which nobody reads here: from the second token on, it
    would weight the one position that `generate` gives it with the mask of all, and fail where prompts differ in
    length.
    """
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    told = [config for config in configs.values() if getattr(config, "output_router_logits", False)]
    for config in told:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config in told:
            config.output_router_logits = True
