"""The student's answers to the training queries: greedy, and its rationale in each."""

import gc
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdkernels.data import Example
from kdkernels.data.jsonl import json_line
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.rollouts import LocalSampler, write
from kdkernels.training.inputs import read_examples
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import FINAL, Config, StudentConfig, TokenizerConfig
from kdkernels.training.recipe.stages import Compression
from kdkernels.training.run.atomic import write_text, writing


def answer_queries(compression: Compression, directory: Path) -> dict[int, str]:
    """What the student of the stage before writes to each query of the source, by the record's number; a query that is
    too long for it is left out. Every process writes its share into `directory`, batch by batch; what is there already
    is not written again. All processes call this together. Raises DiskError.
    """
    config = answering(compression.student)
    with distributed.together():
        tokenizer = load_tokenizer(config)
        examples = read_examples(config.data, compression.source, tokenizer, False, read_responses=False).usable
    distinct = list({one.prompt_ids: one for one in reversed(examples)}.values())[::-1]

    def there() -> list[int]:
        with writing(directory):
            directory.mkdir(exist_ok=True)
        return list(_read(directory))

    written = set(distributed.by_first(there))
    left, size = [one for one in distinct if one.line not in written], compression.settings.batch_size
    batches = [left[start : start + size] for start in range(0, len(left), size)]
    with distributed.together():
        if batches:
            _write(config, tokenizer, batches[distributed.rank() :: distributed.world_size()], directory)
    distributed.barrier()
    found = _read(directory)
    texts = {one.prompt_ids: found[one.line] for one in distinct}
    return {one.line: texts[one.prompt_ids] for one in examples}


def answering(config: Config) -> Config:
    """The recipe of the stage before, for the model that it trained: whole, its adapter merged."""
    final = str(Path(config.run.output) / FINAL)
    student = StudentConfig(path=final, attention=config.student.attention)
    return replace(config, student=student, tokenizer=TokenizerConfig(path=final))


def rationale(pattern: str, text: str) -> str | None:
    """What the one group of `pattern` matches last in the student's answer; None where there is nothing."""
    found = re.findall(pattern, text)
    return found[-1].strip() or None if found else None


def _read(directory: Path) -> dict[int, str]:
    """The answers that are written, by the record's number."""
    files = sorted(directory.glob("[0-9]*.jsonl"))
    records = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return {one["line"]: one["text"] for one in records}


def _write(config: Config, tokenizer, batches: Sequence[list[Example]], directory: Path) -> None:
    model = load_student(config, tokenizer).to(distributed.device()).eval()
    sampler, evaluation = LocalSampler(model, tokenizer), config.evaluation
    longest = evaluation.max_new_tokens if evaluation else config.data.max_response_tokens
    for batch in batches:
        prompts = [one.prompt_ids for one in batch]
        responses = write(sampler, prompts, longest, vocabulary_size(tokenizer), greedy=True)
        records = [
            {"line": one.line, "tokens": len(ids), "text": _text(tokenizer, ids, sampler.ends)}
            for one, ids in zip(batch, responses, strict=True)
        ]
        write_text(directory / f"{batch[0].line:06d}.jsonl", "".join(map(json_line, records)))  # of its first record
    del model, sampler
    gc.collect()


def _text(tokenizer, ids: Sequence[int], ends: Sequence[int]) -> str:
    ids = ids[:-1] if ids[-1] in ends else ids
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
