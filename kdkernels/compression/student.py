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
    size = compression.settings.batch_size
    batches = [distinct[start : start + size] for start in range(0, len(distinct), size)]

    def missing() -> list[int]:
        with writing(directory):
            directory.mkdir(exist_ok=True)
        return [i for i in range(len(batches)) if not _file(directory, i).is_file()]

    left = distributed.by_first(missing)
    with distributed.together():
        if left:
            _write(config, tokenizer, batches, left[distributed.rank() :: distributed.world_size()], directory)
    distributed.barrier()
    texts = {}
    for i, batch in enumerate(batches):
        lines = _file(directory, i).read_text(encoding="utf-8").splitlines()
        texts |= {one.prompt_ids: json.loads(line)["text"] for one, line in zip(batch, lines, strict=True)}
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


def _write(config: Config, tokenizer, batches: Sequence[list[Example]], mine: Sequence[int], directory: Path) -> None:
    model = load_student(config, tokenizer).to(distributed.device()).eval()
    sampler, evaluation = LocalSampler(model, tokenizer), config.evaluation
    longest = evaluation.max_new_tokens if evaluation else config.data.max_response_tokens
    for i in mine:
        prompts = [one.prompt_ids for one in batches[i]]
        responses = write(sampler, prompts, longest, vocabulary_size(tokenizer), greedy=True)
        records = [
            {"line": one.line, "tokens": len(ids), "text": _text(tokenizer, ids, sampler.ends)}
            for one, ids in zip(batches[i], responses, strict=True)
        ]
        write_text(_file(directory, i), "".join(map(json_line, records)))
    del model, sampler
    gc.collect()


def _text(tokenizer, ids: Sequence[int], ends: Sequence[int]) -> str:
    ids = ids[:-1] if ids[-1] in ends else ids
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _file(directory: Path, batch: int) -> Path:
    return directory / f"{batch:06d}.jsonl"
