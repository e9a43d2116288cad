"""Responses written by a model: sampled from exactly its distribution, or greedily."""

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

from kdkernels.training.model import vocabulary_size

UNTRUNCATED = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}  # transformers' own default is top_k=50


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sample: bool,
) -> list[list[int]]:
    """The model's response to each prompt (token ids), its end-of-sequence token included where it came within
    `max_new_tokens`.

    `sample=True` draws every token from softmax(logits) over the tokenizer's vocabulary: temperature 1, nothing cut,
    nothing penalised, whatever the checkpoint's own generation_config asks for. `sample=False` takes the most probable
    token. Padding rows of the vocabulary have probability 0, as they have in the objectives.

    Raises FloatingPointError for logits that are no distribution: with a NaN or +inf among them, or none above -inf.
    """
    eos_id = tokenizer.eos_token_id
    length = max(map(len, prompts))
    input_ids = torch.full((len(prompts), length), eos_id)  # the attention mask alone says what is padding
    attention_mask = torch.zeros_like(input_ids)
    for b, prompt in enumerate(prompts):
        input_ids[b, length - len(prompt) :] = torch.tensor(prompt)
        attention_mask[b, length - len(prompt) :] = 1
    settings = GenerationConfig(
        **(UNTRUNCATED if sample else {"do_sample": False}),
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_id,
        pad_token_id=eos_id,
    )
    with torch.no_grad(), evaluating(model), _without_generation_config(model):
        output = model.generate(
            input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=settings,
            logits_processor=LogitsProcessorList([TokenDistribution(vocabulary_size(tokenizer))]),
        )
    return [_until_eos(response, eos_id) for response in output[:, length:].tolist()]


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


def _until_eos(response: list[int], eos_id: int) -> list[int]:
    """Cuts off the padding after the end-of-sequence token, which may be that token again."""
    return response[: response.index(eos_id) + 1] if eos_id in response else response


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
