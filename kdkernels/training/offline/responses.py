"""Responses to a recipe's prompts, the teacher's and the student's, written once and read by training.

teacher-00000.jsonl, student-00000.jsonl ...: a line for each prompt of [data], `[responses] shard` to a file, in the
order of the data; the same line of both files answers the same prompt. Axes: none; all are token ids.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkernels.data import Example, Examples
from kdkernels.data.jsonl import json_line
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.rollouts import LocalSampler, write
from kdkernels.training.models.loading import load_student, load_teacher
from kdkernels.training.offline.progress import Progress
from kdkernels.training.offline.store import Store
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.run.identity import Identity

AUTHORS = ("teacher", "student")
OF_THE_DATA = (
    "prompt",
    "messages",
    "answers",
    "max_prompt_tokens",
    "max_response_tokens",
    "special_tokens_in_fields",
)  # keys of [data] that say what the prompts are
MADE_FROM = ("[data] train", "[student] path", "[teacher] path", "[tokenizer] path")


def responses_store(config: Config, made_from: Mapping[str, Identity]) -> Store:
    """Where the responses are. made_from: the identities of what a run of the recipe is made from."""
    settings = config.responses
    return Store(
        settings.output,
        "[responses] output",
        {key: value for key, value in made_from.items() if key.startswith(MADE_FROM)},
        {f"[data] {key}": getattr(config.data, key) for key in OF_THE_DATA}
        | {f"[responses] {key}": getattr(settings, key) for key in ("temperature", "top_p", "batch_size", "shard")}
        | {"[run] seed": config.run.seed, "[run] dtype": config.run.dtype, "[teacher] dtype": config.teacher.dtype},
    )


def file_names(author: str, prompts: int, shard: int, ending: str = "jsonl") -> list[str]:
    """The files of one author's responses to so many prompts."""
    return [f"{author}-{number:05d}.{ending}" for number in range(-(-prompts // shard))]


def write_responses(config: Config, store: Store, tokenizer: PreTrainedTokenizerBase, prompts: Examples) -> None:
    """Writes what is missing of the responses to `prompts`; all processes call this together, with the store opened."""
    names = {author: file_names(author, len(prompts.usable), config.responses.shard) for author in AUTHORS}
    for author in AUTHORS:
        _write_author(config, store, tokenizer, prompts, author, names[author])
    store.finish([name for author in AUTHORS for name in names[author]])


def _write_author(
    config: Config,
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Examples,
    author: str,
    names: Sequence[str],
) -> None:
    size = config.responses.shard
    with of_author(config, tokenizer, author, store, names) as model:
        if model is None:
            return
        sampler = LocalSampler(model, tokenizer, config.responses.temperature, config.responses.top_p)
        with Progress(f"the {author}'s responses", len(prompts.usable)) as progress:

            def make(name: str) -> bytes:
                first = size * names.index(name)
                return _answers(
                    config, tokenizer, sampler, author, name, prompts.usable[first : first + size], progress
                )

            store.make(names, make)


@contextmanager
def of_author(
    config: Config, tokenizer: PreTrainedTokenizerBase, author: str, store: Store, names: Sequence[str]
) -> Iterator[PreTrainedModel | None]:
    """The author's model on this process's device, frozen, as it is before training; None where none of the files is
    missing. All processes enter this together.
    """
    if not distributed.by_first(lambda: store.missing(names)):
        yield None
        return
    with distributed.together():
        if author == "teacher":
            model = load_teacher(config, tokenizer)
        else:  # an adapter of the recipe changes nothing before it is trained
            plain = replace(config.train, gradient_checkpointing=False)
            whole = replace(config, train=plain, student=replace(config.student, adapter=None))
            model = load_student(whole, tokenizer)
        model = model.eval().requires_grad_(False).to(distributed.device())
    yield model


def seed_of(*parts: object) -> int:
    """A seed that depends on `parts` alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()[:7], "big")


def _answers(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    sampler: LocalSampler,
    author: str,
    name: str,
    prompts: Sequence[Example],
    progress: Progress,
) -> bytes:
    """The contents of a file: what it is depends on its name and on what the store is made from, nothing else."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].prompt_ids))  # next to no padding
    size, lines = config.responses.batch_size, [""] * len(prompts)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        torch.manual_seed(seed_of(config.run.seed, name, start))
        given = [prompts[i].prompt_ids for i in part]
        written = write(sampler, given, config.data.max_response_tokens, vocabulary_size(tokenizer))
        for i, ids in zip(part, written, strict=True):
            finished = ids[-1] in sampler.ends
            text = tokenizer.decode(
                ids[:-1] if finished else ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
            lines[i] = json_line(
                {
                    "line": prompts[i].line,
                    "author": author,
                    "prompt": prompts[i].prompt,
                    "response": text,
                    "finished": finished,
                    "prompt_ids": prompts[i].prompt_ids,
                    "response_ids": ids,
                }
            )
        progress.add(len(part))
    return "".join(lines).encode()


def read_responses(config: Config, made_from: Mapping[str, Identity]) -> Examples:
    """The responses of a recipe, those of each prompt one behind the other. Raises InputError where they are missing,
    cut, or of anything else than the recipe says.
    """
    store = responses_store(config, made_from)
    paths = store.check()
    half = len(paths) // len(AUTHORS)
    usable = []
    for pair in zip(paths[:half], paths[half:], strict=True):
        by_author = [[json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] for path in pair]
        for records in zip(*by_author, strict=True):
            usable += [_example(record) for record in records]
    return Examples(str(store.root), tuple(usable), 0, 0, together=len(AUTHORS), first=_first(usable))


def _example(record: Mapping[str, Any]) -> Example:
    return Example(
        line=record["line"],
        prompt=record["prompt"],
        response=record["response"],
        prompt_ids=tuple(record["prompt_ids"]),
        response_ids=tuple(record["response_ids"]),
        from_teacher=record["author"] == "teacher",
    )


def _first(examples: Sequence[Example]) -> str:
    shown = "".join(
        f"\n  {author}  {one.response!r}" for author, one in zip(AUTHORS, examples[: len(AUTHORS)], strict=True)
    )
    return f"first prompt, line {examples[0].line} of the data: {examples[0].prompt!r}{shown}"
