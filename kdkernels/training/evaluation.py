"""Held-out evaluation: does the model find the answer, and how probable are the given responses to it and to the teacher?

Shapes: B examples of a batch, L length, N response tokens of a batch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kdkernels as kd
from kdkernels.training.config import Config, EvaluationConfig
from kdkernels.training.data import Example, collate
from kdkernels.training.model import head, vocabulary_size
from kdkernels.training.rollouts import evaluating, generate
from kdkernels.training.schema import InputError


@dataclass(frozen=True)
class Evaluation:
    """`metrics`: see `summarize`. `records`: one dict per example, in the given order, with everything the metrics are computed from."""

    metrics: dict[str, float]
    records: list[dict[str, Any]]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: Config,
    teacher: PreTrainedModel | None = None,
) -> Evaluation:
    """What [evaluation] metrics asks for, over `examples`.

    exact_match: the model answers each prompt greedily; its answer is right if it equals the one of the data's response, both being what
    `answer` finds last in the text. cross_entropy: -log q(token), kl: KL(p || q) of teacher p and model q, both in nats per token of the data's
    responses, end-of-sequence token included.

    Raises InputError for a data response in which `answer` finds nothing.
    """
    settings = config.evaluation
    records = []
    with torch.no_grad(), evaluating(model):
        for start in range(0, len(examples), settings.batch_size):
            batch = examples[start : start + settings.batch_size]
            rows = [{"line": example.line, "prompt": example.prompt} for example in batch]
            if "exact_match" in settings.metrics:
                _add(rows, _answers(model, tokenizer, batch, settings))
            if {"cross_entropy", "kl"} & set(settings.metrics):
                _add(rows, _token_means(model, tokenizer, batch, settings, teacher))
            records += rows
    return Evaluation(summarize(records), records)


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The metrics of evaluation records: exact_match (share of right answers), finished (share of generated responses that ended by
    themselves, not at the limit), cross_entropy and kl (means over all response tokens); those the records have data for.
    """
    metrics = {}
    for name, field in (("exact_match", "correct"), ("finished", "finished")):
        if field in records[0]:
            metrics[name] = sum(record[field] for record in records) / len(records)
    for name in ("cross_entropy", "kl"):
        if name in records[0]:
            tokens = sum(record["tokens"] for record in records)
            metrics[name] = sum(record[name] * record["tokens"] for record in records) / tokens
    return metrics


def _add(rows: list[dict], columns: list[dict]) -> None:
    for row, more in zip(rows, columns, strict=True):
        row.update(more)


def _answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Example], settings: EvaluationConfig
) -> list[dict[str, Any]]:
    """Greedy responses and whether their answers are right."""
    prompts = [example.prompt_ids for example in batch]
    rows = []
    for example, ids in zip(batch, generate(model, tokenizer, prompts, settings.max_new_tokens, sample=False), strict=True):
        expected = find_answer(settings.answer, example.response)
        if expected is None:
            raise InputError(
                f"{settings.data}, line {example.line}: [evaluation] answer {settings.answer!r} finds nothing in the response {example.response!r}"
            )
        response = tokenizer.decode(ids, skip_special_tokens=True)
        found = find_answer(settings.answer, response)
        finished = ids[-1] == tokenizer.eos_token_id
        rows.append({"response": response, "answer": found, "expected": expected, "correct": found == expected, "finished": finished})
    return rows


def find_answer(pattern: str, text: str) -> str | None:
    """What the one group of `pattern` matches last in `text`; None where it matches nowhere."""
    found = re.findall(pattern, text)
    return found[-1] if found else None


def _token_means(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Example],
    settings: EvaluationConfig,
    teacher: PreTrainedModel | None,
) -> list[dict[str, Any]]:
    """Cross-entropy and KL of each example, per token of its response."""
    examples = collate([one.prompt_ids for one in batch], [one.response_ids for one in batch], tokenizer.eos_token_id).to(model.device)
    layout = examples.layout.to(model.device)

    def response_head(scorer: PreTrainedModel) -> kd.Head:
        full = head(scorer, examples, vocabulary_size(tokenizer))  # hidden [B, L, H] -> [N, H]: the lm_head sees response tokens only
        return replace(full, hidden=full.hidden.flatten(0, 1)[layout.index])

    student = response_head(model)
    values = {}
    if "cross_entropy" in settings.metrics:
        values["cross_entropy"] = kd.cross_entropy(student, examples.target.flatten()[layout.index])
    if "kl" in settings.metrics:
        values["kl"] = kd.divergence(student, response_head(teacher), kd.ForwardKL())
    lengths = torch.tensor(layout.lengths)
    means = {name: (layout.spread(token.double(), 0.0).sum(1).cpu() / lengths).tolist() for name, token in values.items()}
    return [{"tokens": tokens} | {name: means[name][b] for name in means} for b, tokens in enumerate(layout.lengths)]
