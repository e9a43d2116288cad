"""The trainer: one loop of rollout, teacher, student and step over a DeepSpeed engine.

    result = train(load_config("recipes/gsm8k-small.toml"))

The loss of a step is the mean over all its responses (or tokens: what the objective counts), however they are spread
over processes and micro-batches: each micro-batch's mean is weighted with its share of the step's count, and
DeepSpeed's own averaging is undone.
"""

import itertools
import math
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkernels.training import checkpoint, distributed
from kdkernels.training.atomic import write_directory
from kdkernels.training.config import Config
from kdkernels.training.data import Example, ExampleStream, collate
from kdkernels.training.engine import accumulation_steps, build_engine, step_engine
from kdkernels.training.evaluation import evaluate, summarize
from kdkernels.training.inputs import read_inputs
from kdkernels.training.metrics import EVALUATION, MetricsLog, evaluations
from kdkernels.training.model import Distillation, head, load_student, load_teacher, vocabulary_size
from kdkernels.training.report import write_report
from kdkernels.training.rollouts import generate
from kdkernels.training.run import RunDirectory


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


def train_step(
    engine,
    teacher: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    step: int,
    config: Config,
) -> dict[str, float]:
    """One optimizer step on `examples`, shared among the processes; the step's metrics, over all of them."""
    clock = Clock()
    student, objective, vocab_size = engine.module.student, engine.module.objective, engine.module.vocab_size
    share = examples[distributed.rank() :: distributed.world_size()]
    prompts = [example.prompt_ids for example in share]
    with clock("rollout"):
        by_student = student_writes(step, config.rollout.student_fraction)
        if by_student:
            responses = generate(student, tokenizer, prompts, config.rollout.max_new_tokens, sample=True)
        else:
            responses = [example.response_ids for example in share]

    # the loss does not depend on who shares a micro-batch: with similar lengths there is less padding
    pairs = sorted(zip(prompts, responses, strict=True), key=lambda pair: len(pair[0]) + len(pair[1]))
    size = config.train.micro_batch_size
    groups = [pairs[i : i + size] for i in range(0, len(pairs), size)]
    batches = [
        collate([p for p, _ in group], [r for _, r in group], tokenizer.eos_token_id, from_teacher=not by_student)
        for group in groups
    ]
    counts = [objective.count(batch.layout, batch.from_teacher) for batch in batches]
    tokens = sum(len(batch.layout) for batch in batches)
    count, tokens = distributed.total(torch.tensor([sum(counts), tokens], device=engine.device)).tolist()

    sums = defaultdict(float)
    for batch, own_count in zip(batches, counts, strict=True):
        batch, share_of_count, share_of_tokens = batch.to(engine.device), own_count / count, len(batch.layout) / tokens
        with clock("teacher"), torch.no_grad():
            scored = head(teacher, batch, vocab_size) if objective.needs_teacher else None
        with clock("student"):
            out = engine(batch, scored)
            engine.backward(out.loss * share_of_count * distributed.world_size(), scale_wrt_gas=False)
        with clock("step"):
            lr, gradient_norm = engine.lr_scheduler.get_last_lr()[0], step_engine(engine)
        terms = {"loss", *objective.names.values()}
        for name, value in out.metrics.items():
            weight = share_of_count if name in terms else share_of_tokens if value.is_floating_point() else 1
            sums[name] += value.double() * weight

    means = distributed.total(torch.stack(list(sums.values()))).tolist()
    return {
        **dict(zip(sums, means, strict=True)),
        "lr": lr,
        "gradient_norm": gradient_norm,
        "tokens": tokens,
        "response_length": tokens / len(examples),
        "tokens_per_second": tokens / clock.total(),
        **{f"time/{phase}": seconds for phase, seconds in clock.seconds.items()},
    }


def student_writes(step: int, fraction: float) -> bool:
    """Whether the student writes the responses of `step` (1, 2, ...): the given fraction of steps, evenly spread."""
    return math.floor(step * fraction) > math.floor((step - 1) * fraction)


class Clock:
    """Seconds spent in each phase of a step."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds[phase] += time.perf_counter() - start

    def total(self) -> float:
        """Seconds of all phases together."""
        return sum(self.seconds.values())


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
