"""What a recipe would do, found out without training: everything is read and checked, nothing is written.

Models that are not on this machine are planned with all the same where their configurations are known (elsewhere.py).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.engine.gpu import Gpu
from kdkernels.errors import InputError
from kdkernels.sources.from_model import tail
from kdkernels.training.deepspeed_strategy import accumulation_steps
from kdkernels.training.inputs import read_inputs
from kdkernels.training.models.attention import describe_attention
from kdkernels.training.models.ends import describe_ends
from kdkernels.training.models.loading import load_student, load_teacher
from kdkernels.training.needs import check_disk, check_output, describe, describe_dtype, needs, teacher_bytes, text
from kdkernels.training.offline.rollout import describe_offline
from kdkernels.training.offline.scores import read_judge
from kdkernels.training.plan.memory import Load
from kdkernels.training.plan.report import describe_plan
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.recipe.elsewhere import described
from kdkernels.training.recipe.resolve import NO_JUDGE, model_paths, resolve_steps
from kdkernels.training.recipe.schema import to_toml
from kdkernels.training.recipe.teachers import each_teacher, of_section
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.lock import refuse_if_locked
from kdkernels.training.run.trackers import check_trackers

Models = dict[str, PreTrainedModel]


@dataclass(frozen=True)
class Machine:
    """`gpus` of one kind, with a process each."""

    gpu: Gpu
    gpus: int


def plan(
    config: Config,
    resume: bool = False,
    recipes: Sequence[Path] = (),
    machine: Machine | None = None,
    asked: Collection[str] = (),
) -> str:
    """The resolved recipe and, in comments, what it comes to. Raises InputError where training would, but for a judge
    or what `kdkernels rollout` makes that is missing, and for files of other machines.

    Args:
        recipes: the file that the recipe was read from, and those that it extends.
        machine: plans for this one, not for the one that this is.
        asked: as `changes` of `train`.
    """
    distributed.start()
    processes = machine.gpus if machine else distributed.world_size()
    accumulation_steps(config, processes)
    check_trackers(config)
    objective, run, elsewhere = config.objective.build(), RunDirectory(config.run.output), described(config, recipes)
    if resume and not elsewhere and run.is_finished(config, asked):
        return f"{to_toml(config)}# plan\n# {run.nothing_left(config)}; model: {run.final}"
    lines = describe_offline(config)
    if objective.needs_weights and not config.asks_judge:
        lines.append(f"objective: {config.objective.name} with these options {NO_JUDGE}")
    _refuse_several(config, bool(elsewhere or machine))
    if elsewhere:
        models, vocabulary, read = _from_descriptions(config, elsewhere)
        needed = needs(_counted(config), models["student"], models.get("teacher"), processes=processes)
    else:
        config, models, vocabulary, read, done = _from_here(config, run, resume, asked)
        needed = needs(config, models["student"], models.get("teacher"), done, processes)
        needed = replace(needed, memory=needed.memory | _of_several(config, models))
        check_disk(run, needed)
    lines += read + [_describe_model(name, model) for name, model in models.items()]
    if config.student.adapter is not None:
        trained = sum(one.numel() for one in models["student"].parameters() if one.requires_grad)
        lines.append(f"student's adapter: {trained:,} parameters, which alone are trained")
    lines += _describe_step(config, models, processes)
    here = not elsewhere and machine is None
    lines.append(describe_attention(config, models["student"], models.get("teacher"), here))
    if machine:
        load = Load(config, models["student"], models.get("teacher"), processes, vocabulary, machine.gpu)
        lines += describe_plan(load)
    else:
        lines.append(_describe_loss(config, vocabulary))
    lines += describe(run, needed, here)[machine is not None :] + (describe_dtype(config) if here else [])
    lines += [f"{name}: {path}" for name, path in {"run": run.root, "metrics": run.metrics, "model": run.final}.items()]
    chain = [" extends ".join(map(str, recipes))] if len(recipes) > 1 else []
    return "\n".join([*_comments(chain), to_toml(config), *_comments(["plan", *lines])])


def _refuse_several(config: Config, not_here: bool) -> None:
    if config.teachers and not_here:
        raise InputError("[teachers]: expected one [teacher] for a plan of another machine, got several")


def _of_several(config: Config, models: Models) -> dict[str, int]:
    """The bytes of each of several teachers, by section; those of the same files and settings are there once."""
    several = {alone.teacher: (section, alone) for section, alone in each_teacher(config).items() if config.teachers}
    return {one: teacher_bytes(alone, models[one], None) for one, alone in several.values() if one in models}


def _comments(lines: Sequence[str]) -> list[str]:
    """What is printed is a recipe itself."""
    return [f"# {line}".rstrip() for text in lines for line in text.splitlines()]


def _from_here(
    config: Config, run: RunDirectory, resume: bool, asked: Collection[str]
) -> tuple[Config, Models, int, list[str], int]:
    """The recipe with its steps, models on the meta device, the tokenizer's vocabulary, what was read, and how many
    steps are trained already.
    """
    check_output(run.root)
    refuse_if_locked(run.root)
    start = run.find_start(config, resume, asked)
    made_from = start.inputs if "[responses] output" in start.inputs else None
    inputs = read_inputs(config, config.objective.build(), start.tokenizer, made_from)
    if config.needs_scores and "[judge] output" in start.inputs:
        read_judge(config, inputs.examples)
    config = resolve_steps(config, len(inputs.examples.usable))
    run.check_resolved(config, start, asked)
    models, vocabulary = _models(config, inputs.tokenizer), vocabulary_size(inputs.tokenizer)
    lines = [*map(str, inputs.data), inputs.examples.first, f"tokenizer: {vocabulary} tokens"]
    lines += [
        f"{name}: {path} is not on this disk: its weights were not looked at"
        for name, path in (("student", config.student.path), ("teacher", config.teacher and config.teacher.model))
        if path is not None and not Path(path).is_dir()
    ]
    lines += describe_ends(config, inputs.tokenizer, models["student"], models.get("teacher"))
    epochs = config.train.steps * config.train.batch_size / len(inputs.examples.usable)
    lines.append(f"{epochs:.2f} epochs")
    return config, models, vocabulary, lines, start.progress["step"]


def _from_descriptions(config: Config, elsewhere: Mapping[str, Path]) -> tuple[Models, int, list[str]]:
    """As `_from_here`, where models are not on this machine: from their configurations, reading nothing else."""
    names = model_paths(config)
    lines = [f"{key}: {names[key]} is not on this machine: planned with {file}" for key, file in elsewhere.items()]
    unread = [config.data.train, *([config.evaluation.data] if config.evaluation else [])]
    lines.append(f"not looked at, whether there or not: tokenizer {config.tokenizer.path}, data {', '.join(unread)}")
    student = elsewhere.get("[student] path", config.student.path)
    config = replace(config, student=replace(config.student, path=str(student)))
    if "[teacher] path" in elsewhere:
        config = replace(config, teacher=replace(config.teacher, path=str(elsewhere["[teacher] path"])))
    models = _models(config, None)
    return models, min(tail(model).entries for model in models.values()), lines


def _counted(config: Config) -> Config:
    """The recipe with steps: where the data would tell how many its epochs are, more than it keeps checkpoints."""
    if config.train.steps is not None:
        return config
    many = 10 * (config.checkpoint.keep + 1) * (config.checkpoint.every or 1)
    return resolve_steps(replace(config, train=replace(config.train, epochs=None, steps=many)), 0)


def _models(config: Config, tokenizer) -> Models:
    models = {"student": load_student(config, tokenizer, meta=True)}
    for section, alone in each_teacher(config).items():
        if alone.teacher.model is not None:
            with of_section(section):
                models[section] = load_teacher(alone, tokenizer, meta=True)
    return models


def _describe_model(name: str, model: PreTrainedModel) -> str:
    head = tail(model)
    weight = " x ".join(map(str, head.layer.weight.shape))
    softcap = "" if head.softcap is None else f", logits soft-capped at {head.softcap:g}"
    return f"{name}: {type(model).__name__}, {model.num_parameters():,} parameters, head {weight}{softcap}"


def _describe_step(config: Config, models: Models, processes: int) -> list[str]:
    """What a step takes of the processes, at most."""
    train, accumulation = config.train, accumulation_steps(config, processes)
    prompt, response = config.data.max_prompt_tokens, _longest_response(config)
    steps = f"{train.epochs:g} epochs in steps" if train.steps is None else f"{train.steps} steps"
    whole = "" if train.steps is None else f", at most {train.steps * train.batch_size * response:,} response tokens"
    where = f"on each of {processes} processes " if processes > 1 else ""
    size = f"{train.micro_batch_size} x {prompt + response}"
    hidden = [f", hidden states of the {name} {size} x {_width(model)}" for name, model in models.items()]
    written = f"{train.batch_size // processes} x {prompt + config.rollout.max_new_tokens}"
    return [
        f"{steps} of {train.batch_size} responses "
        f"({where}{accumulation} micro-batches of {train.micro_batch_size}){whole}",
        *([f"rollout: tokens {written} at most"] if config.rollout.student_fraction > 0 else []),
        f"micro-batch: tokens {size} (prompt {prompt}, response {response}){''.join(hidden)} at most",
    ]


def _width(model: PreTrainedModel) -> int:
    """H, the entries of a hidden state."""
    return tail(model).layer.weight.shape[1]


def _longest_response(config: Config) -> int:
    return max(config.data.max_response_tokens, config.rollout.max_new_tokens)


def _describe_loss(config: Config, vocabulary: int) -> str:
    """What the loss of a micro-batch would take as logits."""
    tokens = config.train.micro_batch_size * _longest_response(config)
    size = text(4 * tokens * vocabulary)
    return f"loss: {tokens} tokens x {vocabulary} entries at most, {size} as whole float32 logits of one model"
