"""One optimizer step: rollout, teacher, judge, student, update.

The loss of a step is the mean over all its responses (or tokens: what the objective's reduction counts), however they
are spread over processes and micro-batches: each micro-batch's mean is weighted with its share of the step's count, and
sums add up.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from kdkernels.data import Batch, Example, collate
from kdkernels.judges import Judge
from kdkernels.rollouts import Sampler, write
from kdkernels.teachers import Teacher
from kdkernels.training.buffer import Buffer, student_steps
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config, OptimizerConfig
from kdkernels.training.run.metrics import PEAK_MEMORY, STALENESS, TIME, TOKENS_PER_SECOND
from kdkernels.training.run.samples import Samples
from kdkernels.training.strategy import Strategy


@dataclass(frozen=True)
class Parts:
    """What a step works with. `pad_id` fills up the shorter responses of a batch; `samples` keeps some of what the
    student writes; `buffer`, which gave the step's examples, what it wrote for steps to come (None: nothing).
    """

    strategy: Strategy
    teacher: Teacher | None
    sampler: Sampler
    judge: Judge | None
    pad_id: int
    samples: Samples | None = None
    buffer: Buffer | None = None


def train_step(
    parts: Parts, examples: Sequence[Example], step: int, config: Config, apply: bool = True
) -> tuple[dict[str, float], str | None]:
    """One optimizer step on `examples`, shared among the processes: its metrics, over all of them, and what in it was
    not finite. Such a step is skipped: weights and optimizer state stay as they were, on all processes alike.

    apply=False computes everything and updates nothing.
    """
    clock, strategy = Clock(), parts.strategy
    objective, reduction = strategy.module.objective, strategy.module.metric_reduction
    lr = config.optimizer.lr * rate(config.optimizer, step - 1, config.train.steps)
    share = examples[distributed.rank() :: distributed.world_size()]
    prompts = [example.prompt_ids for example in share]
    written = student_steps(step, config.rollout.student_fraction)
    writes = written > student_steps(step - 1, config.rollout.student_fraction)
    by_teacher = [not writes and example.from_teacher for example in share]
    try:
        responses, told = [example.response_ids for example in share], {}
        if writes:
            with clock("rollout"):
                responses, told = _rollout(parts, prompts, step, config)
    except FloatingPointError as error:
        return {"loss": math.nan, "lr": lr, "gradient_norm": math.nan, "tokens": 0} | clock.metrics(0), str(error)

    if writes and apply and parts.samples is not None:
        parts.samples.keep(step, written, share, responses)
    batches = micro_batches(share, responses, by_teacher, config.train.micro_batch_size, parts.pad_id)
    counts = [objective.counts(batch.layout, batch.from_teacher) for batch in batches]
    own = [*map(sum, zip(*counts, strict=True)), *_lengths(responses, by_teacher, parts.sampler.ends)]
    first, second, *lengths = distributed.total(torch.tensor(own, device=strategy.device)).tolist()
    count, tokens = max(first, second), sum(lengths[1::3])

    sums = defaultdict(float)
    for batch, own_count in zip(batches, map(max, counts), strict=True):
        batch = batch.to(strategy.device)
        shares = {"count": own_count / count, "tokens": len(batch.layout) / tokens, "sum": 1}
        for name, value in _forward_backward(parts, batch, shares[reduction("loss")], clock).items():
            sums[name] += value.double() * shares[reduction(name)]
    with clock("optimizer"):
        means = dict(zip(sums, distributed.total(torch.stack(list(sums.values()))).tolist(), strict=True))
        gradient_norm, defect = strategy.step(means["loss"], lr, apply)
    return {
        **means,
        "lr": lr,
        "gradient_norm": gradient_norm,
        "tokens": tokens,
        **_length_metrics(lengths),
        PEAK_MEMORY: distributed.peak_memory(),
        **told,
    } | clock.metrics(tokens), defect


def describe_phases(parts: Parts, config: Config) -> str:
    """A line on the phases of a step: what of it is timed."""
    some = {
        "rollout": config.rollout.student_fraction > 0,
        "teacher": parts.strategy.module.objective.needs_teacher,
        "judge": parts.judge is not None,
    }
    names = [*(name for name, there in some.items() if there), "student", "loss", "optimizer"]
    return f"timed in each step: {', '.join(names)}; shown are their shares of the last steps' seconds"


def _rollout(
    parts: Parts, prompts: Sequence[Sequence[int]], step: int, config: Config
) -> tuple[list[list[int]], dict[str, float]]:
    """What the student writes, or wrote before, to this process's prompts, and what there is to log of that. Raises
    FloatingPointError, on all processes.
    """
    told = {}

    def generate(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        parts.sampler.sync()
        with parts.strategy.whole(), distributed.together():
            responses = write(parts.sampler, prompts, config.rollout.max_new_tokens, parts.strategy.module.vocab_size)
        told.update(parts.sampler.metrics())
        return responses

    if parts.buffer is None:
        return generate(prompts), told
    responses, staleness = parts.buffer.write(step, generate)
    return responses, told | ({STALENESS: staleness} if config.rollout.updates > 1 else {})


def micro_batches(
    examples: Sequence[Example],
    responses: Sequence[Sequence[int]],
    by_teacher: Sequence[bool],
    size: int,
    pad_id: int,
) -> list[Batch]:
    """Batches of `size` responses to the examples' prompts. The loss does not depend on who shares one: those of
    similar lengths do, which takes less padding.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt_ids) + len(responses[i]))
    batches = []
    for start in range(0, len(order), size):
        group = order[start : start + size]
        batches.append(
            collate(
                [examples[i].prompt_ids for i in group],
                [responses[i] for i in group],
                pad_id,
                [by_teacher[i] for i in group],
                [examples[i].teacher for i in group],
            )
        )
    return batches


def _lengths(responses: Sequence[Sequence[int]], by_teacher: Sequence[bool], ends: Sequence[int]) -> list[int]:
    """Of the teacher's responses, then of the student's: how many, their tokens, and how many end by themselves."""
    out = []
    for author in (True, False):
        own = [response for response, teachers in zip(responses, by_teacher, strict=True) if teachers == author]
        out += [len(own), sum(map(len, own)), sum(response[-1] in ends for response in own)]
    return out


def _length_metrics(lengths: Sequence[int]) -> dict[str, float]:
    """Of each author who wrote some, as `_lengths` has them: tokens of a response, and the share that end."""
    out = {}
    for author, (count, tokens, finished) in (("teacher", lengths[:3]), ("student", lengths[3:])):
        if count:
            out |= {f"{author}_length": tokens / count, f"{author}_finished": finished / count}
    return out


def _forward_backward(parts: Parts, batch: Batch, share: float, clock: "Clock") -> dict[str, torch.Tensor]:
    """Adds the gradient of the mean over `batch`, which has this share in that of the step; its loss and metrics."""
    scored = weights = None
    if parts.strategy.module.objective.needs_teacher:
        with clock("teacher"), distributed.together() if parts.teacher.alone else nullcontext():
            scored = parts.teacher.score(batch)
    if parts.judge is not None:
        with clock("judge"), torch.no_grad():
            weights = parts.judge(batch)
        if weights is None:  # which an objective takes for no judge
            raise TypeError("judge: expected the weights [B, L] of the batch's tokens, got None")
    with clock("student"), clock.around("loss", parts.strategy.module.objective):
        out = parts.strategy.forward(batch, scored, weights)
        parts.strategy.backward(out.loss * share)
    return out.metrics | {"loss": out.loss.detach()}


def rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step 0 ... steps-1 as a share of the peak: a linear rise, then constant or half a cosine
    towards 0.
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant" or step >= steps:
        return 1.0 if config.schedule == "constant" else 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def _now() -> float:
    """Seconds, once the accelerator has done what it was asked for."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


class Clock:
    """Seconds spent in each phase of a step; those of a phase within another count for the inner one alone."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = [0.0]  # seconds spent in the phases within each one that is open

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = _now()
        self.seconds[phase] += 0.0  # phases are in the order in which they begin
        self._inner.append(0.0)
        try:
            yield
        finally:
            spent = _now() - start
            self.seconds[phase] += spent - self._inner.pop()
            self._inner[-1] += spent

    @contextmanager
    def around(self, phase: str, module: nn.Module) -> Iterator[None]:
        """Counts every forward of `module` in here as a phase."""
        with ExitStack() as running, ExitStack() as hooks:
            hooks.callback(module.register_forward_pre_hook(lambda *_: running.enter_context(self(phase))).remove)
            hooks.callback(module.register_forward_hook(lambda *_: running.close()).remove)
            yield

    def metrics(self, tokens: int) -> dict[str, float]:
        """The seconds by phase, and the tokens that were trained on in a second of all of them."""
        phases = {TIME + phase: seconds for phase, seconds in self.seconds.items()}
        return {TOKENS_PER_SECOND: tokens / sum(self.seconds.values()), **phases}
