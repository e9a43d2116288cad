"""`kdkernels eval`: how often a model's greedy responses to the prompts of a JSON lines file have the right answer."""

import itertools
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from kdkernels.data.jsonl import json_line
from kdkernels.errors import InputError
from kdkernels.rollouts import LocalSampler
from kdkernels.training.errors import DiskError
from kdkernels.training.evaluation import evaluate, expected_answer, summarize, wilson
from kdkernels.training.inputs import read_examples
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.processes import distributed
from kdkernels.training.processes.exits import DISK, DONE, UNUSABLE, end
from kdkernels.training.recipe.config import Config
from kdkernels.training.recipe.measuring import by_argument, complete
from kdkernels.training.run.atomic import write_text, writing


def run(config: Config, output: Path) -> int:
    """As `measure`, printed. Returns the exit status."""
    try:
        text = measure(config, output)
        if distributed.rank() == 0:
            with writing(Path("standard output")):
                print(text, flush=True)
        status = DONE
    except InputError as error:
        status = end(UNUSABLE, error)
    except DiskError as error:
        status = end(DISK, error)
    distributed.leave()
    return status


def measure(config: Config, output: Path) -> str:
    """Evaluates the student of a recipe that `recipe.measuring` made, on as many processes as a launcher started, and
    writes the records to `output`.

    Returns:
        What was found, to be printed.

    Raises:
        InputError: naming the argument of the command line. DiskError.
    """
    distributed.start()
    try:
        with distributed.together():
            config = complete(config, torch.accelerator.is_available())
            tokenizer = load_tokenizer(config)
            data = read_examples(config.data, config.evaluation.data, tokenizer, tokenize_responses=False)
            chosen = data.usable[: config.evaluation.limit]
            for example in chosen:  # before the model is loaded
                expected_answer(config.evaluation, example)
            model = load_student(config, tokenizer).to(distributed.device()).eval()
            records = _records(config, model, tokenizer, chosen[distributed.rank() :: distributed.world_size()])
    except InputError as error:
        raise by_argument(error) from error
    except FloatingPointError as error:
        raise InputError(f"MODEL: {config.student.path}: {error}") from error
    records = sorted(itertools.chain(*distributed.gathered(records)), key=lambda record: record["line"])
    distributed.by_first(lambda: write_text(output, "".join(map(json_line, records))))
    found, right = summarize(records), sum(record["correct"] for record in records)
    low, high = wilson(right, len(records))
    first = "" if len(chosen) == len(data.usable) else f", the first {len(chosen)} of them"
    return (
        f"{data}{first}\n"
        f"exact match: {found['exact_match']:.4f} ({right} of {len(records)}), 95 % interval {low:.4f} to {high:.4f}\n"
        f"responses that ended by themselves: {found['finished']:.4f}\n"
        f"records: {output}"
    )


def _records(config: Config, model, tokenizer, examples) -> list[dict]:
    sampler, size, records = LocalSampler(model, tokenizer), config.evaluation.batch_size, []
    shown = distributed.rank() == 0 and sys.stderr.isatty()
    with tqdm(total=len(examples), unit="problem", disable=not shown, dynamic_ncols=True) as bar:
        for start in range(0, len(examples), size):
            part = evaluate(model, sampler, tokenizer, examples[start : start + size], config)
            records += part
            bar.update(len(part))
            bar.set_postfix(right=f"{summarize(records)['exact_match']:.3f}")
    return records
