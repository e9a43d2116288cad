"""The trainer: one loop of rollout, teacher, student and step over a DeepSpeed engine (`step.py` is one turn of it).

    result = train(load_config("recipes/gsm8k-small.toml"))

Without a launcher it is one process; torchrun starts several, which run this together.
"""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkernels.training import checkpoint, distributed
from kdkernels.training.atomic import write_directory
from kdkernels.training.config import Config
from kdkernels.training.data import Example, ExampleStream
from kdkernels.training.engine import accumulation_steps, build_engine
from kdkernels.training.evaluation import evaluate, summarize
from kdkernels.training.inputs import read_inputs
from kdkernels.training.metrics import EVALUATION, MetricsLog, evaluations
from kdkernels.training.model import Distillation, load_student, load_teacher, vocabulary_size
from kdkernels.training.report import write_report
from kdkernels.training.run import RunDirectory
from kdkernels.training.step import train_step


@dataclass(frozen=True)
class Result:
    """A finished run: its directory, that of the trained model, and the metrics of its evaluations by step."""

    output: Path
    final: Path
    evaluations: dict[int, dict[str, float]]


def train(config: Config, resume: bool = False) -> Result:
    """Trains the recipe's student; with `resume`, from the latest checkpoint in the run's directory on.

    Raises InputError for data, models or a run directory that cannot be used, FloatingPointError for a loss that is not
    finite.
    """
    distributed.start()
    run = RunDirectory(config.run.output)
    run.check(config, resume)
    accumulation_steps(config)
    newest, progress = checkpoint.newest_sound(run.checkpoints) if resume else (None, {"step": 0, "position": 0})

    inputs = read_inputs(config)
    tokenizer, examples, held_out = inputs.tokenizer, inputs.examples, inputs.held_out
    _seed(config.run.seed)
    student = load_student(config, tokenizer)
    teacher = load_teacher(config, tokenizer).to(distributed.device()) if config.teacher else None
    engine = build_engine(config, Distillation(student, config.objective.build(), vocabulary_size(tokenizer)))
    stream = ExampleStream(len(examples.usable), config.run.seed, progress["position"])
    if resume:
        checkpoint.restore(engine, newest)
    else:
        _seed(config.run.seed + distributed.rank())  # every process samples rollouts of its own
        run.create(config)

    def evaluation(step: int) -> dict[str, float]:
        records = _evaluate(student, tokenizer, held_out.usable[: config.evaluation.limit], config, teacher)
        run.write_records(step, records)
        return {EVALUATION + name: value for name, value in summarize(records).items()}

    with MetricsLog(run, config.train.steps, last_step=progress["step"] if resume else None) as log:
        log.say(examples, *([held_out] if held_out else []))
        if held_out and not resume:
            log.write(0, evaluation(0))
        for step in range(progress["step"] + 1, config.train.steps + 1):
            batch = [examples.usable[i] for i in stream.next(config.train.batch_size)]
            values = train_step(engine, teacher, tokenizer, batch, step, config)
            if held_out and (step == config.train.steps or _due(step, config.evaluation.every)):
                values |= evaluation(step)
            log.write(step, values)
            if not math.isfinite(values["loss"]):
                raise FloatingPointError(f"step {step}: the loss is {values['loss']}; see {run.metrics}")
            if _due(step, config.checkpoint.every):
                log.sync()
                progress = {"step": step, "position": stream.position}
                checkpoint.save(engine, run.checkpoints, progress, config.checkpoint.keep)

    write_directory(run.final, lambda directory: _save_final(student, tokenizer, directory))
    write_report(run, config, [examples, held_out] if held_out else [examples])
    return Result(run.root, run.final, evaluations(run.metrics))


def _evaluate(
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: Config,
    teacher: PreTrainedModel | None,
) -> list[dict[str, Any]]:
    """The records of all `examples`, each process having evaluated its share."""
    share = examples[distributed.rank() :: distributed.world_size()]
    records = evaluate(student, tokenizer, share, config, teacher)
    return sorted(itertools.chain(*distributed.gathered(records)), key=lambda record: record["line"])


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _save_final(student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    if distributed.rank() == 0:
        student.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
