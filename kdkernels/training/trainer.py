"""The trainer: one loop of rollout, teacher, student and step (`step.py` is one turn of it).

    result = train(load_config("recipes/gsm8k-small.toml"))

Without a launcher it is one process; torchrun starts several, which run this together.
"""

import itertools
import random
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkernels.data import Example, ExampleStream
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.distillation import Distillation
from kdkernels.errors import InputError
from kdkernels.judges import Judge
from kdkernels.objectives import Objective
from kdkernels.rollouts import LocalSampler, Sampler
from kdkernels.teachers import LocalTeacher, Teacher
from kdkernels.training import checkpoint, distributed
from kdkernels.training.agreement import check_model
from kdkernels.training.atomic import write_directory
from kdkernels.training.config import Config
from kdkernels.training.deepspeed_strategy import DeepSpeedStrategy, accumulation_steps
from kdkernels.training.errors import DiskError, Stopped
from kdkernels.training.evaluation import evaluate, summarize
from kdkernels.training.finite import first_nonfinite, nonfinite
from kdkernels.training.inputs import build_objective, read_inputs
from kdkernels.training.metrics import EVALUATION, MetricsLog, evaluations
from kdkernels.training.model import load_student, load_teacher
from kdkernels.training.needs import check_disk, describe_dtype, needs
from kdkernels.training.report import write_report
from kdkernels.training.run_directory import RunDirectory, Start
from kdkernels.training.step import Parts, train_step
from kdkernels.training.strategy import Strategy
from kdkernels.training.termination import Termination


@dataclass(frozen=True)
class Result:
    """A finished run: its directory, that of the trained model, and the metrics of its evaluations by step (None:
    not finite)."""

    output: Path
    final: Path
    evaluations: dict[int, dict[str, float | None]]


def train(config: Config, resume: bool = False, judge: Judge | None = None) -> Result:
    """Trains the recipe's student; with `resume`, from the latest checkpoint in the run's directory on.

    Each micro-batch's tokens have the weights that `judge` gives them, on every process; a run that is resumed needs
    the same judge again, which nothing can check.

    SIGTERM ends it after the step under way, with a checkpoint; if that step was skipped, after one that is not.

    Raises InputError for data, models or a run directory that cannot be used, FloatingPointError for a run that
    diverged: too many steps in a row had to be skipped ([train] max_skipped_steps), or what would be saved is not
    finite, DiskError for what the disk did not take, Stopped after SIGTERM.
    """
    distributed.start(config.run.timeout_seconds)
    objective = build_objective(config, judge)
    run = RunDirectory(config.run.output)
    accumulation_steps(config)
    with Termination() as termination, run.locked(), ExitStack() as held:
        start = run.find_start(config, resume)
        try:
            return _train(config, objective, judge, run, start, termination, held)
        except DiskError as error:
            raise DiskError(f"{error}. Once that is mended, {run.way_on(config)}") from error


def _train(
    config: Config,
    objective: Objective,
    judge: Judge | None,
    run: RunDirectory,
    start: Start,
    termination: Termination,
    held: ExitStack,
) -> Result:
    with distributed.together():
        inputs = read_inputs(config, objective, start.tokenizer)
        tokenizer, examples, held_out = inputs.tokenizer, inputs.examples, inputs.held_out
        _seed(config.run.seed)
        student = load_student(config, tokenizer)
        teacher = load_teacher(config, tokenizer).to(distributed.device()) if config.teacher else None
        check_disk(run, needs(config, student, teacher, start.progress["step"]))
        _refuse_nonfinite({"student": student} | ({"teacher": teacher} if teacher else {}))
    entries = vocabulary_size(tokenizer)
    scorer = LocalTeacher(teacher, entries) if teacher is not None else None
    strategy = DeepSpeedStrategy(config, Distillation(student, objective, entries))
    sampler = LocalSampler(student, tokenizer)
    held.callback(sampler.close)
    parts = Parts(strategy, scorer, sampler, judge, tokenizer.eos_token_id)
    with distributed.together():
        first = examples.usable[0]
        tokens = (*first.prompt_ids, *first.response_ids, tokenizer.eos_token_id)[:2]
        check_model(
            "[student] path" if config.student.path else "[student] architecture", student, tokens, trained=True
        )
        if teacher is not None:
            check_model("[teacher] path", teacher, tokens, trained=False)
    stream = ExampleStream(len(examples.usable), config.run.seed, start.progress["position"])
    run.remove_left_overs()
    if start.checkpoint is not None:
        checkpoint.restore(strategy, start.checkpoint)
        made_from = start.inputs
    else:
        _seed(config.run.seed + distributed.rank())  # every process samples rollouts of its own
        made_from = run.create(config, tokenizer, start.inputs)
    run.restore_log(start.checkpoint)

    def batch() -> list[Example]:
        return [examples.usable[i] for i in stream.next(config.train.batch_size)]

    def evaluation(step: int) -> dict[str, float]:
        try:
            chosen = held_out.usable[: config.evaluation.limit]
            records = _evaluate(student, sampler, tokenizer, chosen, config, scorer)
        except FloatingPointError as error:
            raise _diverged(run, step, f"evaluation: {error}") from error
        run.write_records(step, records)
        return {EVALUATION + name: value for name, value in summarize(records).items()}

    def save(step: int) -> None:
        _check_finite(run, step, strategy)
        progress = {"step": step, "position": stream.position, "skipped_steps": skipped}
        checkpoint.save(strategy, run.checkpoints, progress, made_from, run.metrics, config.checkpoint.keep)

    termination.training = True
    step = first = start.progress["step"]
    skipped, in_a_row, unsaved = start.progress["skipped_steps"], 0, False
    with MetricsLog(run, config.train.steps, last_step=first) as log:
        log.say(examples, *([held_out] if held_out else []), examples.first, *describe_dtype(config))
        if held_out and start.checkpoint is None:
            log.write(0, evaluation(0))
        for step in range(first + 1, config.train.steps + 1):
            values, defect = train_step(parts, batch(), step, config)
            skipped, in_a_row = (skipped + 1, in_a_row + 1) if defect else (skipped, 0)
            if held_out and (step == config.train.steps or _due(step, config.evaluation.every)):
                values |= evaluation(step)
            with distributed.together():
                log.write(step, values | {"skipped_steps": skipped})
            if defect:
                log.say(f"step {step}: {defect}: skipped")
            if in_a_row > config.train.max_skipped_steps:
                raise _diverged(run, step, f"{defect}; {in_a_row} steps in a row ([train] max_skipped_steps)")
            last, stop = step == config.train.steps, termination.asked()
            # after the last step too: final/ may not fit on the disk
            unsaved = unsaved or stop or _due(step, config.checkpoint.every) or (last and config.checkpoint.every > 0)
            if unsaved and not in_a_row:  # after a skipped step, the checkpoint waits until these weights have a loss
                save(step)
                unsaved = False
            if stop and not last and not in_a_row:  # what is trained is saved
                raise Stopped(f"stopped by SIGTERM after step {step}")

    if in_a_row:  # nothing says yet that the weights are good for anything: one more batch, without an update
        _, defect = train_step(parts, batch(), step, config, apply=False)
        if defect:
            raise _diverged(run, step, f"{defect}, and so it is of one more batch")
    if unsaved:
        save(step)
    _check_finite(run, step, strategy)
    write_directory(run.final, lambda directory: _save_final(student, tokenizer, directory))
    write_report(run, config, [examples, held_out] if held_out else [examples], first)
    return Result(run.root, run.final, evaluations(run.metrics))


def _evaluate(
    student: PreTrainedModel,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: Config,
    teacher: Teacher | None,
) -> list[dict[str, Any]]:
    """The records of all `examples`, each process having evaluated its share."""
    share = examples[distributed.rank() :: distributed.world_size()]
    sampler.sync()
    with distributed.together():
        records = evaluate(student, sampler, tokenizer, share, config, teacher)
    return sorted(itertools.chain(*distributed.gathered(records)), key=lambda record: record["line"])


def _refuse_nonfinite(models: Mapping[str, PreTrainedModel]) -> None:
    for section, model in models.items():
        name = first_nonfinite(model.state_dict().items())
        if name is not None:
            raise InputError(f"[{section}] path: {name} has values that are not finite")


def _check_finite(run: RunDirectory, step: int, strategy: Strategy) -> None:
    """Nothing that is not finite may be saved."""
    name = nonfinite(strategy)
    if name is not None:
        raise _diverged(run, step, f"{name} has values that are not finite")


def _diverged(run: RunDirectory, step: int, what: str) -> FloatingPointError:
    return FloatingPointError(f"step {step}: {what}: the run diverged; see {run.metrics}")


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
