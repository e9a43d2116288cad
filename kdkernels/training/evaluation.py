"""Held-out evaluation: does the model find the answer, and how probable are the data's responses to it and its teacher?

Axes: B examples of a batch, L length.
"""

import math
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import kdkernels as kd
from kdkernels.data import Batch, Example, collate
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.errors import InputError
from kdkernels.rollouts import Sampler, write
from kdkernels.rollouts.local import evaluating
from kdkernels.teachers import Teacher
from kdkernels.training.recipe.config import Config, EvaluationConfig

Z95 = 1.959963984540054  # standard normal quantile of 0.975
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # their separators


def evaluate(
    model: PreTrainedModel,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: Config,
    teacher: Teacher | None = None,
    together: Callable[[], AbstractContextManager] = nullcontext,
) -> list[dict[str, Any]]:
    """One record per example, in the given order, with all that the `metrics` of [evaluation] come from (`summarize`).

    exact_match: the `sampler` answers each prompt greedily; an answer is right if it equals that of the data's
    response, separators of thousands aside. The answer of a text is what the regular expression `answer` matches last
    in it.
    cross_entropy, kl: -log q(token) and KL(p || q) of the teacher p and the model q, in nats per token of the data's
    responses, the end-of-sequence token included. agreement: the share of these tokens at which p and q have the same
    most probable one.

    Of several processes, each calls this with as many examples as the others, where a teacher in parts scores for all
    of them at once. `together` is around what each does on its own: answers at its own pace, and all before the first
    score, as a process that cannot answer would leave the others waiting there.

    Raises InputError for a data response in which `answer` finds nothing.
    """
    settings, size = config.evaluation, config.evaluation.batch_size
    records = [{"line": example.line, "prompt": example.prompt} for example in examples]
    parts = [slice(start, start + size) for start in range(0, len(examples), size)]
    with torch.no_grad(), evaluating(model):
        if "exact_match" in settings.metrics:
            with together():
                for part in parts:
                    _add(records[part], _answers(sampler, tokenizer, examples[part], settings))
        if settings.by_token:
            in_parts = config.teacher is not None and config.teacher.placement == "zero3"
            with nullcontext() if in_parts else together():
                for part in parts:
                    _add(records[part], _token_means(model, tokenizer, examples[part], settings, teacher))
    return records


def summarize(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The metrics of evaluation records, those that the records have data for.

    exact_match: share of right answers. finished: share of the generated responses that ended by themselves (with any
    of the tokens that end one), not at the limit. response_tokens: their mean length, with the token that ends one.
    cross_entropy, kl, agreement: means over all tokens of the data's responses.
    """
    metrics = {}
    for name, field in (("exact_match", "correct"), *((name, name) for name in ("finished", "response_tokens"))):
        if field in records[0]:
            metrics[name] = sum(record[field] for record in records) / len(records)
    for name in ("cross_entropy", "kl", "agreement"):
        if name in records[0]:
            tokens = sum(record["tokens"] for record in records)
            metrics[name] = sum(record[name] * record["tokens"] for record in records) / tokens
    return metrics


def wilson(right: int, problems: int) -> tuple[float, float]:
    """The 95 % score interval of a share of `right` among `problems` (Wilson, JASA 1927).

        (share + z^2 / 2n -+ z sqrt(share (1 - share) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Raises ValueError unless 0 <= right <= problems and problems > 0.
    """
    if not 0 <= right <= problems or problems == 0:
        raise ValueError(f"right: expected 0 to {problems} of at least one problem, got {right}")
    share, square = right / problems, Z95**2 / problems
    middle = share + square / 2
    margin = math.sqrt(square * (share * (1 - share) + square / 4))
    return max(0.0, (middle - margin) / (1 + square)), min(1.0, (middle + margin) / (1 + square))


def find_answer(pattern: str, text: str) -> str | None:
    """What the one group of `pattern` matches last in `text`; None where it matches nowhere."""
    found = re.findall(pattern, text)
    return found[-1] if found else None


def expected_answer(settings: EvaluationConfig, example: Example) -> str:
    """The answer of the data's response. Raises InputError where `answer` finds nothing in it."""
    expected = find_answer(settings.answer, example.response)
    if expected is None:
        place = f"{settings.data}, line {example.line}"
        raise InputError(f"{place}: [evaluation] answer {settings.answer!r} not found in {example.response!r}")
    return expected


def _plain(answer: str) -> str:
    """1,450 is 1450, and -1,450 is -1450."""
    return THOUSANDS.sub("", answer)


def _add(records: list[dict], values: list[dict]) -> None:
    for record, more in zip(records, values, strict=True):
        record.update(more)


def _answers(
    sampler: Sampler, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Example], settings: EvaluationConfig
) -> list[dict[str, Any]]:
    """Greedy responses and whether their answers are right."""
    prompts = [example.prompt_ids for example in batch]
    responses = write(sampler, prompts, settings.max_new_tokens, vocabulary_size(tokenizer), greedy=True)
    answers, ends = [], sampler.ends
    for example, ids in zip(batch, responses, strict=True):
        expected = expected_answer(settings, example)
        finished = ids[-1] in ends  # such a token may be none of the special ones, which decoding leaves out
        response = tokenizer.decode(
            ids[:-1] if finished else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        answer = find_answer(settings.answer, response)
        answers.append(
            {
                "response": response,
                "answer": answer,
                "expected": expected,
                "correct": answer is not None and _plain(answer) == _plain(expected),
                "finished": finished,
                "response_tokens": len(ids),
            }
        )
    return answers


def as_batch(examples: Sequence[Example], pad_id: int) -> Batch:
    """The examples with the data's responses, as they are scored together."""
    prompts, responses = [one.prompt_ids for one in examples], [one.response_ids for one in examples]
    return collate(prompts, responses, pad_id, teachers=[one.teacher for one in examples])


def _token_means(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Example],
    settings: EvaluationConfig,
    teacher: Teacher | None,
) -> list[dict[str, Any]]:
    """Cross-entropy, KL and agreement of each example, per token of its response."""
    inputs = as_batch(batch, tokenizer.eos_token_id).to(model.device)
    layout = inputs.layout.to(model.device)
    student = kd.Head.of(model, vocab_size=vocabulary_size(tokenizer), **inputs.inputs)
    values = {}  # each [B, L], 0 where no response token is predicted
    if "cross_entropy" in settings.metrics:
        values["cross_entropy"] = kd.cross_entropy(student, inputs.target, rows=layout)
    scored = teacher.score(inputs) if settings.by_teacher else None
    if "kl" in settings.metrics:
        values["kl"] = kd.divergence(student, scored, kd.ForwardKL(), rows=layout)
    if "agreement" in settings.metrics:
        found = kd.statistics(student, scored, rows=layout)
        values["agreement"] = found.argmax == found.teacher.argmax
    lengths = torch.tensor(layout.lengths)
    means = {
        name: layout.sums(value.flatten()[layout.index].double()).cpu() / lengths for name, value in values.items()
    }
    return [
        {"tokens": tokens} | {name: mean[b].item() for name, mean in means.items()}
        for b, tokens in enumerate(layout.lengths)
    ]
