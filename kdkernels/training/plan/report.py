"""The plan of a recipe on GPUs of a kind, in words: memory, seconds, and what to change where it does not fit."""

from collections.abc import Iterator
from dataclasses import replace

from kdkernels.training.needs import text
from kdkernels.training.plan.memory import RESERVE, Load, Memory, memory
from kdkernels.training.plan.seconds import seconds

WORTH = 0.02  # of the peak; what saves less is no way out


def describe_plan(load: Load) -> list[str]:
    """Lines; `load` has a GPU."""
    student, teacher = load.student_pass(), load.teacher_pass()
    needed, times = memory(load, student, teacher), seconds(load, student, teacher)
    call, total = load.loss, sum(times.values())
    lines = [
        f"GPUs: {load.processes} of {load.gpu.name} with {load.gpu.memory / 1e9:.0f} GB; texts of {load.prompt} prompt "
        f"and {load.response} response tokens, the recipe's limits",
        f"loss: {call.tokens} tokens x {call.vocabulary} entries a micro-batch, in chunks of {call.rows.student} tokens"
        + (f" (the teacher's of {call.rows.teacher})" if teacher else ""),
        f"memory of a GPU: {text(needed.peak)} at most, in the phase {needed.widest!r}",
        *_items("always", needed.lasting, needed.peak),
        *(line for name, items in needed.phases.items() for line in _items(name, items, needed.peak)),
        f"seconds a step: {total:.3g} at least (products at {load.gpu.flops / 1e12:.0f} TFLOP/s, memory at "
        f"{load.gpu.bandwidth / 1e12:.2f} TB/s; launches and communication on top)",
        *(f"  {name}: {spent:.3g} s ({spent / total:.0%})" for name, spent in times.items()),
    ]
    return lines + _fitting(load, needed)


def _items(phase: str, items: dict[str, int], peak: int) -> list[str]:
    return [f"  {phase}: {name} {text(size)} ({size / peak:.0%})" for name, size in items.items()]


def _fitting(load: Load, needed: Memory) -> list[str]:
    """Whether it fits, and where it does not, what makes it fit: of the changes one after another, those that help."""
    most, peak = int(load.gpu.memory * (1 - RESERVE)), needed.peak
    there = f"{text(most)} are there ({RESERVE:.0%} left to CUDA and fragmentation)"
    if peak <= most:
        return [f"fits: {there}"]
    lines = [f"does not fit: {there}"]
    for table, key, value in _changes(load):
        section = replace(getattr(load.config, table), **{key: value})
        changed = replace(load, config=replace(load.config, **{table: section}))
        smaller = memory(changed, changed.student_pass(), changed.teacher_pass()).peak
        if smaller > (1 - WORTH) * peak:
            continue
        load, peak = changed, smaller
        lines.append(f"  with --set {table}.{key}={str(value).lower()}: {text(peak)}{', which fits' * (peak <= most)}")
        if peak <= most:
            return lines
    return [*lines, "  too much all the same: take more GPUs, shorter texts, or train an adapter ([student.adapter])"]


def _changes(load: Load) -> Iterator[tuple[str, str, object]]:
    """Keys of the recipe with other values; what costs least time comes first."""
    train, stage, teacher = load.config.train, load.config.deepspeed.zero_stage, load.config.teacher
    several = load.processes > 1
    if several and stage < 2:
        yield "deepspeed", "zero_stage", 2
    if not train.gradient_checkpointing and load.student.supports_gradient_checkpointing:
        yield "train", "gradient_checkpointing", True
    size = train.micro_batch_size
    while size % 2 == 0:
        size //= 2
        yield "train", "micro_batch_size", size
    if load.teacher is not None and teacher.placement == "replicated":
        yield "teacher", "placement", "zero3" if several else "cpu"
    if not load.config.deepspeed.offload_optimizer and (stage or several):
        yield "deepspeed", "offload_optimizer", True
    if several and stage < 3:
        yield "deepspeed", "zero_stage", 3
