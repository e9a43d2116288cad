"""The trainer: one loop of rollout, teacher, student and step (`step.py` is one turn of it).

    result = train(load_config("recipes/gsm8k-small.toml"))

Without a launcher it is one process; torchrun starts several, which run this together.
"""

import random
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkernels.data import ExampleStream
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.distillation import Distillation
from kdkernels.errors import InputError
from kdkernels.judges import Judge
from kdkernels.objectives import Objective
from kdkernels.teachers import LocalTeacher, Teacher
from kdkernels.training.buffer import Buffer
from kdkernels.training.collapse import Collapse
from kdkernels.training.deepspeed_strategy import DeepSpeedStrategy, accumulation_steps
from kdkernels.training.errors import Collapsed, DiskError, Stopped
from kdkernels.training.evaluation import evaluate, summarize
from kdkernels.training.finite import first_nonfinite, nonfinite
from kdkernels.training.inputs import Inputs, build_objective, read_inputs
from kdkernels.training.models.agreement import check_model
from kdkernels.training.models.attention import describe_attention
from kdkernels.training.models.ends import describe_ends
from kdkernels.training.models.loading import load_student, load_teacher
from kdkernels.training.models.placement import describe, place
from kdkernels.training.models.saving import save_model
from kdkernels.training.needs import check_disk, describe_dtype, needs
from kdkernels.training.offline.scores import read_judge
from kdkernels.training.processes import distributed
from kdkernels.training.processes.termination import Termination
from kdkernels.training.recipe.config import Config
from kdkernels.training.recipe.resolve import resolve_steps
from kdkernels.training.run import checkpoint
from kdkernels.training.run.atomic import write_directory, writing
from kdkernels.training.run.directory import RunDirectory, Start
from kdkernels.training.run.identity import Identity
from kdkernels.training.run.lock import remove_if_nobodys
from kdkernels.training.run.log import MetricsLog
from kdkernels.training.run.metrics import EVALUATION, evaluations, read_metrics
from kdkernels.training.run.report import write_report
from kdkernels.training.run.samples import Samples
from kdkernels.training.run.trackers import check_trackers, open_trackers
from kdkernels.training.sampling import make_sampler
from kdkernels.training.step import Parts, describe_phases, train_step


@dataclass(frozen=True)
class Result:
    """A finished run: its directory, that of the trained model, and the metrics of its evaluations by step (None:
    not finite)."""

    output: Path
    final: Path
    evaluations: dict[int, dict[str, float | None]]

    @classmethod
    def of(cls, run: RunDirectory) -> "Result":
        """That of the finished run in its directory."""
        return cls(run.root, run.final, evaluations(read_metrics(run.metrics)))


def train(config: Config, resume: bool = False, judge: Judge | None = None, changes: Collection[str] = ()) -> Result:
    """Trains the recipe's student.

    SIGTERM ends it after the step under way, with a checkpoint; if that step was skipped, after one that is not.

    Args:
        config: a recipe, as `load_config` gives it.
        resume: goes on from the latest checkpoint in the run's directory, or begins where there is none. Of a run that
            is finished nothing is left to do.
        judge: gives the tokens of each micro-batch their weights, on every process. A run that is resumed needs the
            same one again, which nothing can check.
        changes: keys of the recipe, such as "train.steps", that may have other values than the run to be resumed has:
            of those in run/history.py's CHANGEABLE. config-000050.toml in its directory is what it was up to step 50.

    Raises:
        InputError: data, models or a run directory that cannot be used, or an objective that needs a judge without one.
        FloatingPointError: the run diverged: too many steps in a row had to be skipped ([train] max_skipped_steps), or
            what would be saved is not finite.
        Collapsed: the student stayed beyond a limit of [collapse] for too long.
        DiskError: what the disk did not take.
        Stopped: after SIGTERM.
    """
    distributed.start(config.run.timeout_seconds)
    objective = build_objective(config, judge)
    run = RunDirectory(config.run.output)
    accumulation_steps(config)
    check_trackers(config)
    if resume and run.is_finished(config, changes):
        return _finished(run, config)
    with Termination() as termination, run.locked(), ExitStack() as held:
        termination.stop_at_once()  # not while the directory was locked: the lock would have stayed
        start = run.find_start(config, resume, changes)
        try:
            with distributed.together():
                inputs = read_inputs(config, objective, start.tokenizer, start.inputs)
                judge = judge or read_judge(config, inputs.examples)
            config = resolve_steps(config, len(inputs.examples.usable))
            run.check_resolved(config, start, changes)
            training = _Training(config, objective, judge, run, start, inputs, held)
            training.loop(termination)
            return training.finish()
        except DiskError as error:
            raise DiskError(f"{error}. Once that is mended, {run.way_on()}") from error


class _Training:
    """A run from where it starts to its end, on every process alike. What it has to close is `held`.

    `step`: the last one, which is `first` before the loop begins. `skipped`, `in_a_row`: how many steps were skipped in
    all, and since the last one that was not. `unsaved`: a checkpoint is due.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        judge: Judge | None,
        run: RunDirectory,
        start: Start,
        inputs: Inputs,
        held: ExitStack,
    ):
        self.config, self.run, self.inputs = config, run, inputs
        self.first = self.step = start.progress["step"]
        self.skipped, self.in_a_row, self.unsaved = start.progress["skipped_steps"], 0, False
        self.collapse = Collapse(config, start.progress["steps_beyond_limits"])
        with distributed.together():
            student, teacher = _load_models(config, run, self.inputs.tokenizer, done=self.first)
        tokenizer, examples = self.inputs.tokenizer, self.inputs.examples.usable
        entries = vocabulary_size(tokenizer)
        strategy = DeepSpeedStrategy(config, Distillation(student, objective, entries))
        sampler = make_sampler(config, run, student, tokenizer, strategy)
        lengths = [one.tokens for one in examples] if config.data.by_length else None
        position, batch_size = start.progress["position"], config.train.batch_size
        together = self.inputs.examples.together
        self.stream = ExampleStream(len(examples), config.run.seed, position, lengths, batch_size, together)
        self.parts = Parts(
            strategy=strategy,
            teacher=place(config, teacher, strategy, tokenizer),
            sampler=sampler,
            judge=judge,
            pad_id=tokenizer.eos_token_id,
            samples=Samples(config, run, tokenizer, sampler.ends),
            buffer=Buffer(config, examples, self.stream),
        )
        held.callback(self.parts.sampler.close)
        with self.parts.strategy.whole(), distributed.together():
            tokens = (*examples[0].prompt_ids, *examples[0].response_ids, tokenizer.eos_token_id)[:2]
            _check_models(config, student, self.parts.teacher, tokens)
            self.notes = [*describe_dtype(config), *describe_ends(config, tokenizer, student, teacher)]
            self.notes += [describe_attention(config, student, teacher), describe_phases(self.parts, config)]
            self.notes += describe(self.parts.teacher)
        self.resumed = start.checkpoint is not None
        self.made_from = self._begin(start)

    def _begin(self, start: Start) -> dict[str, Identity]:
        """Makes strategy, random state and directory what they were at `start`; the identities of what the run is made
        from.
        """
        config, run = self.config, self.run
        run.remove_left_overs()
        if start.checkpoint is not None:
            self.parts.buffer.load_state(checkpoint.restore(self.parts.strategy, start.checkpoint))
            run.go_on(config, self.first)
            made_from = start.inputs
        else:
            _seed(config.run.seed + distributed.rank())  # every process samples rollouts of its own
            made_from = run.create(config, self.inputs.tokenizer, start.inputs)
        run.restore_log(start.checkpoint)
        return made_from

    def loop(self, termination: Termination) -> None:
        """Takes all the steps that are left. Raises Stopped where `termination` was asked for."""
        config, inputs, steps = self.config, self.inputs, self.config.train.steps
        termination.at_once = False
        trackers = open_trackers(config, self.run, self.resumed)
        with MetricsLog(self.run, steps, self.first, trackers) as log:
            log.say(*inputs.data, inputs.examples.first, *self.notes)
            if inputs.held_out and not self.resumed:
                log.write(0, self._evaluation())
            while self.step < steps:
                self.step += 1
                values, defect = train_step(self.parts, self.parts.buffer.batch(self.step), self.step, config)
                self.skipped, self.in_a_row = (self.skipped + 1, self.in_a_row + 1) if defect else (self.skipped, 0)
                last = self.step == steps
                if inputs.held_out and (last or _due(self.step, config.evaluation.every)):
                    values |= self._evaluation()
                with distributed.together():
                    log.write(self.step, values | {"skipped_steps": self.skipped})
                if defect:
                    log.say(f"step {self.step}: {defect}: skipped")
                if self.in_a_row > config.train.max_skipped_steps:
                    raise self._diverged(f"{defect}; {self.in_a_row} steps in a row ([train] max_skipped_steps)")
                collapsed = None if defect else self.collapse.see(values)
                if collapsed:
                    raise Collapsed(f"step {self.step}: {collapsed}: the student collapsed; see {self.run.metrics}")
                stop = termination.asked()
                # after the last step too: final/ may not fit on the disk
                due = _due(self.step, config.checkpoint.every) or (last and config.checkpoint.every > 0)
                self.unsaved = self.unsaved or stop or due
                if not self.in_a_row:  # after a skipped step, the checkpoint waits until these weights have a loss
                    self._save_if_due()
                    if stop and not last:  # what is trained is saved
                        raise Stopped(f"stopped by SIGTERM after step {self.step}")

    def finish(self) -> Result:
        """Writes the report and the trained model."""
        run, config = self.run, self.config
        if self.in_a_row:  # nothing says yet that the weights are good for anything: one more batch, without an update
            _, defect = train_step(self.parts, self.parts.buffer.batch(self.step), self.step, config, apply=False)
            if defect:
                raise self._diverged(f"{defect}, and so it is of one more batch")
        self._save_if_due()
        self._check_finite()
        student = self.parts.strategy.module.student
        weights = self.parts.strategy.weights(frozen=config.student.adapter is None)
        write_report(run, config, self.inputs.data, self.first)
        # the last thing: a run that has it is finished
        save = partial(save_model, config, student, weights, self.inputs.tokenizer)
        write_directory(run.final, save)
        return Result.of(run)

    def _evaluation(self) -> dict[str, float]:
        """Evaluates the student on the held-out data, each process its share, and writes the records; the metrics. The
        shares are equally long: where the examples do not divide, some are in two of them, and count once.
        """
        parts, tokenizer, processes = self.parts, self.inputs.tokenizer, distributed.world_size()
        chosen = self.inputs.held_out.usable[: self.config.evaluation.limit]
        places = range(distributed.rank(), -(-len(chosen) // processes) * processes, processes)
        share = [chosen[place % len(chosen)] for place in places]
        parts.sampler.sync()
        try:
            with parts.strategy.whole():
                student, own_pace = parts.strategy.module.student, distributed.together
                own = evaluate(student, parts.sampler, tokenizer, share, self.config, parts.teacher, own_pace)
        except FloatingPointError as error:
            raise self._diverged(f"evaluation: {error}") from error
        found = distributed.gathered(own)
        records = [found[place % processes][place // processes] for place in range(len(chosen))]
        self.run.write_records(self.run.evaluation(self.step), records)
        return {EVALUATION + name: value for name, value in summarize(records).items()}

    def _save_if_due(self) -> None:
        if not self.unsaved:
            return
        self._check_finite()
        progress = {"step": self.step, "position": self.stream.position, "skipped_steps": self.skipped}
        progress["steps_beyond_limits"] = self.collapse.in_a_row
        run, keep, buffer = self.run, self.config.checkpoint.keep, self.parts.buffer.state()
        checkpoint.save(self.parts.strategy, run.checkpoints, progress, self.made_from, run.metrics, keep, buffer)
        self.unsaved = False

    def _check_finite(self) -> None:
        """Nothing that is not finite may be saved."""
        name = nonfinite(self.parts.strategy)
        if name is not None:
            raise self._diverged(f"{name} has values that are not finite")

    def _diverged(self, what: str) -> FloatingPointError:
        return FloatingPointError(f"step {self.step}: {what}: the run diverged; see {self.run.metrics}")


def _finished(run: RunDirectory, config: Config) -> Result:
    """The result of a run that came to its end earlier, and may have been killed right behind it."""

    def say() -> None:
        remove_if_nobodys(run.root)
        with writing(Path("standard output")):
            print(run.nothing_left(config), flush=True)

    distributed.by_first(say)
    return Result.of(run)


def _load_models(
    config: Config, run: RunDirectory, tokenizer: PreTrainedTokenizerBase, done: int
) -> tuple[PreTrainedModel, PreTrainedModel | None]:
    """Student and teacher, of finite weights, where the disk can hold the run, of which `done` steps are trained."""
    _seed(config.run.seed)
    student = load_student(config, tokenizer)
    teacher = load_teacher(config, tokenizer) if config.teacher and config.teacher.model else None
    check_disk(run, needs(config, student, teacher, done))
    for section, model in (("student", student), ("teacher", teacher)):
        name = None if model is None else first_nonfinite(model.state_dict().items())
        if name is not None:
            raise InputError(f"[{section}] path: {name} has values that are not finite")
    return student, teacher


def _check_models(config: Config, student: PreTrainedModel, teacher: Teacher | None, tokens: Sequence[int]) -> None:
    check_model("[student] path" if config.student.path else "[student] architecture", student, tokens, trained=True)
    if isinstance(teacher, LocalTeacher):
        key = "[teacher] base" if config.teacher.base else "[teacher] path"
        teacher.present(lambda: check_model(key, teacher.model, tokens, trained=False))


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
