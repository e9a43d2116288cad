"""What a recipe would do, found out without training: everything is read and checked, nothing is written."""

from collections.abc import Sequence
from pathlib import Path

from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.training.deepspeed_strategy import accumulation_steps
from kdkernels.training.inputs import build_objective, read_inputs
from kdkernels.training.models.ends import describe_ends
from kdkernels.training.models.loading import load_student, load_teacher
from kdkernels.training.needs import check_disk, check_output, describe, describe_dtype, needs
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.recipe.schema import to_toml
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.lock import refuse_if_locked


def plan(config: Config, resume: bool = False, recipes: Sequence[Path] = ()) -> str:
    """The resolved recipe and what it comes to. Raises InputError where training would.

    recipes: the file that it was read from, and those that it extends.
    """
    distributed.start()
    objective = build_objective(config)
    run = RunDirectory(config.run.output)
    accumulation_steps(config)
    check_output(run.root)
    refuse_if_locked(run.root)
    if resume and run.is_finished(config):
        return f"{to_toml(config)}# plan\n{run.root}: the run is finished, nothing is left to do; model: {run.final}"
    start = run.find_start(config, resume)
    inputs = read_inputs(config, objective, start.tokenizer)
    models = {"student": load_student(config, inputs.tokenizer, meta=True)}
    if config.teacher is not None:
        models["teacher"] = load_teacher(config, inputs.tokenizer, meta=True)
    needed = needs(config, models["student"], models.get("teacher"), start.progress["step"])
    check_disk(run, needed)
    lines = [to_toml(config), "# plan", *map(str, inputs.data)]
    lines[:0] = [f"# {' extends '.join(map(str, recipes))}"] if len(recipes) > 1 else []
    lines += [inputs.examples.first, f"tokenizer: {vocabulary_size(inputs.tokenizer)} tokens"]
    lines += [f"{name}: {model.num_parameters():,} parameters" for name, model in models.items()]
    if config.student.adapter is not None:
        trained = sum(one.numel() for one in models["student"].parameters() if one.requires_grad)
        lines.append(f"student's adapter: {trained:,} parameters, which alone are trained")
    lines += [
        f"{name}: {path} is not on this disk: its weights were not looked at"
        for name, path in (("student", config.student.path), ("teacher", config.teacher and config.teacher.path))
        if path is not None and not Path(path).is_dir()
    ]
    lines += describe(run, needed) + describe_dtype(config)
    lines += describe_ends(config, inputs.tokenizer, models["student"], models.get("teacher"))
    responses = config.train.steps * config.train.batch_size
    longest = max(config.data.max_response_tokens, config.rollout.max_new_tokens)
    lines.append(
        f"{config.train.steps} steps of {config.train.batch_size} responses: "
        f"{responses / len(inputs.examples.usable):.2f} epochs, at most {responses * longest:,} response tokens"
    )
    lines += [f"{name}: {path}" for name, path in {"run": run.root, "metrics": run.metrics, "model": run.final}.items()]
    return "\n".join(lines)
