"""One optimizer step: rollout, teacher, student, update.

The loss of a step is the mean over all its responses (or tokens: what the objective counts), however they are spread
over processes and micro-batches: each micro-batch's mean is weighted with its share of the step's count, and
DeepSpeed's own averaging is undone.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kdkernels.training import distributed
from kdkernels.training.config import Config
from kdkernels.training.data import Example, collate
from kdkernels.training.engine import step_engine
from kdkernels.training.model import head
from kdkernels.training.rollouts import generate


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
