"""What no single key of a recipe shows: defaults that follow from others, keys that exclude each other, missing files.

Raises InputError naming the section and key; the caller adds the recipe's name.
"""

import json
import math
import os
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from kdkernels.errors import InputError
from kdkernels.training.recipe.config import (
    FINAL,
    CollapseConfig,
    Config,
    EvaluationConfig,
    JudgeConfig,
    RolloutConfig,
    TokenizerConfig,
    TrainConfig,
)
from kdkernels.training.recipe.engines import resolve_engine
from kdkernels.training.recipe.teachers import each_teacher, resolve_teachers


def resolve(config: Config) -> Config:
    """The recipe checked, and its defaults filled in, but for what follows from the objective and for its paths."""
    config = _expand_paths(config)
    _check_student(config)
    _check_data(config)
    _check_train(config)
    _check_optimizer(config)
    config = replace(config, **resolve_teachers(config), tokenizer=_tokenizer(config), evaluation=_evaluation(config))
    config = replace(config, judge=_judge(config))
    _check_responses(config)
    if config.deepspeed.zero_stage is None:
        stage = 1 if config.run.dtype == "bfloat16" or config.deepspeed.offload_optimizer else 0
        config = replace(config, deepspeed=replace(config.deepspeed, zero_stage=stage))
    based = next((name for name, one in config.teachers.items() if one.base), None)
    if based and config.deepspeed.zero_stage == 3:
        raise InputError(
            f"[teachers.{based}] base: expected [deepspeed] zero_stage 0, 1 or 2 with it: with 3 all processes put the "
            "base together, and they ask one of several teachers unequally often; got 3: give the base's path instead"
        )
    if config.deepspeed.offload_optimizer and config.deepspeed.zero_stage == 0:
        raise InputError("[deepspeed] offload_optimizer: expected zero_stage 1, 2 or 3 with it, got 0")
    return config


def resolve_objective(config: Config) -> Config:
    """The resolved recipe with what follows from its objective checked and filled in."""
    config = replace(config, rollout=_rollout(config))
    config = replace(config, collapse=_collapse(config))
    without = config.data.response is None and config.data.messages is None
    unanswered = config.evaluation is not None and config.evaluation.response is None
    read = config.rollout.student_fraction < 1 and config.responses is None
    if without and (read or unanswered):
        raise InputError(
            "[data] key 'response' is missing; only a recipe with [responses], or whose student writes every response, "
            "can do without, and only without [evaluation]"
        )
    if config.asks_judge and not config.reads_responses:
        raise InputError(
            "[judge] scores stored responses, which [rollout] student_fraction 1 leaves unread: leave student_fraction "
            'out, or set [objective] weighting = "likelihood_ratio"'
        )
    return config if config.train.epochs is not None else resolve_steps(config, 0)


def resolve_steps(config: Config, examples: int) -> Config:
    """The resolved recipe with what follows from how many of its training examples are usable: the steps of its epochs,
    and what happens every so many steps by default.
    """
    train, checkpoint, rollout = config.train, config.checkpoint, config.rollout
    if train.epochs is not None:
        steps = math.ceil(Fraction(str(train.epochs)) * examples / train.batch_size)  # as the recipe writes the number
        if train.steps not in (None, steps):
            raise InputError(
                f"[train] steps: expected one of steps and epochs; {train.epochs:g} epochs of {examples} usable "
                f"examples are {steps} steps of {train.batch_size}, got {train.steps}"
            )
        train = replace(train, steps=steps)
    every = max(1, train.steps // 10)
    if checkpoint.every is None:
        checkpoint = replace(checkpoint, every=every)
    if rollout.samples is not None and rollout.samples_every is None:
        rollout = replace(rollout, samples_every=every)
    return replace(config, train=train, checkpoint=checkpoint, rollout=rollout)


NO_JUDGE = (  # said of an objective whose `weights` come from nowhere
    "needs a judge's weight for each token; expected a section [judge] with [responses], weighting = "
    '"likelihood_ratio" or "uniform", or from Python kdkernels.training.train(config, judge=...)'
)
PATHS = (  # the keys of a recipe that say where something lies
    ("run", "output"),
    ("data", "train"),
    ("evaluation", "data"),
    ("student", "path"),
    ("teacher", "path"),
    ("teacher", "cache"),
    ("tokenizer", "path"),
    ("rollout", "weights"),
    ("responses", "output"),
    ("judge", "path"),
    ("judge", "output"),
)


def _expand_paths(config: Config) -> Config:
    """The recipe with the home directory in place of a `~` in front of any of its paths, and the trained model of a run
    in place of its directory.
    """
    for name, key in PATHS:
        section = getattr(config, name)
        if section is not None:
            config = replace(config, **{name: _expanded(name, section, key)})
    found = dict(config.teachers)
    for name in found:
        for key in ("path", "cache"):
            found[name] = _expanded(f"teachers.{name}", found[name], key)
    return replace(config, teachers=found)


def _expanded(name: str, section: Any, key: str) -> Any:
    """The section of this name with the path under `key` as `_expand_paths` says."""
    path = getattr(section, key)
    if path is not None and path.startswith("~"):
        try:
            path = str(Path(path).expanduser())
        except RuntimeError as error:
            raise InputError(f"[{name}] {key}: no home directory is known for {path}: write it out") from error
    if key == "path" and path is not None:
        of_run = (_is(f"[{name}] {key}", Path(path) / file, Path.is_file) for file in ("config.toml", "inputs.json"))
        path = os.path.join(path, FINAL) if all(of_run) else path
    return replace(section, **{key: path})


def _check_student(config: Config) -> None:
    student = config.student
    if student.path is None and student.architecture is None:
        raise InputError("[student] key 'path' or 'architecture' is missing; expected exactly one of them")
    if student.path is not None and student.architecture is not None:
        raise InputError("[student] expected exactly one of path and architecture, got both")
    if student.architecture is not None and type(student.architecture.get("model_type")) is not str:
        raise InputError(
            '[student] architecture: expected a model_type, as in {model_type = "qwen2", hidden_size = 64}'
        )
    if student.path is None and student.adapter is not None:
        raise InputError("[student.adapter] belongs to a model at [student] path: fresh weights have nothing to adapt")
    if student.adapter is not None and not student.adapter.target_modules:
        raise InputError('[student.adapter] target_modules: expected at least one, as in ["all-linear", "lm_head"]')
    if student.path is not None and student.pad_vocab_to != 1:
        raise InputError(
            "[student] pad_vocab_to belongs to an architecture; the model at path has its vocabulary already"
        )


def _check_data(config: Config) -> None:
    data = config.data
    if data.messages is None and data.prompt is None:
        raise InputError("[data] key 'prompt' or 'messages' is missing; expected exactly one of them")
    if data.messages is None and data.answers != "all":
        raise InputError(f"[data] answers are those of messages: leave it out, got {data.answers!r}")
    if data.messages is not None and (data.prompt is not None or data.response is not None):
        raise InputError("[data] expected either messages or prompt and response, got both")
    if data.messages is not None and config.tokenizer.kind is not None:
        raise InputError(
            "[tokenizer] kind: a tokenizer that is trained has no chat template, which [data] messages needs: give path"
        )


def _check_train(config: Config) -> None:
    if config.train.steps is None and config.train.epochs is None:
        raise InputError("[train] key 'steps' or 'epochs' is missing; expected one of them")
    if config.train.batch_size % config.train.micro_batch_size:
        raise InputError(
            f"[train] batch_size: expected a multiple of micro_batch_size {config.train.micro_batch_size}, "
            f"got {config.train.batch_size}"
        )


def _check_responses(config: Config) -> None:
    """That both models can write the responses of [responses]."""
    if config.responses is None:
        return
    if config.student.path is None or config.teacher is None or config.teacher.path is None:
        raise InputError(
            "[responses] are those of the models at [student] path and [teacher] path: expected both, got "
            f"{'no student' if config.student.path is None else 'no teacher'} with a path"
        )
    if config.teacher.cache is not None:
        raise InputError(
            "[teacher] cache holds what a teacher says of the data's responses: leave out it or [responses]"
        )
    if config.train.batch_size % 2:
        raise InputError(
            "[train] batch_size: expected an even number with [responses], two of each prompt, got "
            f"{config.train.batch_size}"
        )


def _judge(config: Config) -> JudgeConfig | None:
    judge = config.judge
    if judge is None:
        return None
    if (judge.path is None) == (judge.function is None):
        raise InputError(f"[judge] expected either path or function, got {'neither' if judge.path is None else 'both'}")
    if config.responses is None:
        raise InputError("section [responses] is missing: [judge] scores those, which kdkernels rollout RECIPE writes")
    output = judge.output or os.path.join(config.responses.output, "scores")
    return replace(judge, output=output, dtype=judge.dtype or config.run.dtype)


def _check_optimizer(config: Config) -> None:
    lr, decay = config.optimizer.lr, config.optimizer.weight_decay
    if lr * decay > 1:  # a step would take more off each weight than there is
        raise InputError(f"[optimizer] weight_decay: expected at most 1 / lr = {1 / lr:g}, got {decay:g}")


def _tokenizer(config: Config) -> TokenizerConfig:
    tokenizer = config.tokenizer
    if tokenizer.path is not None and tokenizer.kind is not None:
        raise InputError("[tokenizer] expected at most one of path and kind")
    if config.student.path is not None and tokenizer.kind is not None:
        raise InputError(
            "[tokenizer] kind belongs to an architecture; the model at [student] path has its tokens already"
        )
    if tokenizer.kind == "bpe" and tokenizer.vocab_size is None:
        raise InputError("[tokenizer] key 'vocab_size' is missing; kind \"bpe\" needs it")
    if tokenizer.kind != "bpe" and tokenizer.vocab_size is not None:
        raise InputError(
            f'[tokenizer] vocab_size belongs to kind "bpe": leave it out, or set that kind; got {tokenizer.vocab_size}'
        )
    if tokenizer.path is None and tokenizer.kind is None:
        if config.student.path is None:
            raise InputError(
                "[tokenizer] key 'path' or 'kind' is missing: a student made from an architecture has no tokenizer"
            )
        tokenizer = replace(tokenizer, path=config.student.path)
    return tokenizer


def _rollout(config: Config) -> RolloutConfig:
    rollout = config.rollout
    try:
        objective = config.objective.build()
    except (ValueError, TypeError) as error:
        raise InputError(f"[objective] {error}") from error
    needs_teacher = objective.needs_teacher
    teachers = each_teacher(config)
    if needs_teacher and not teachers:
        raise InputError(f"section [teacher] is missing: the objective {config.objective.name} needs one")
    if rollout.student_fraction is None:
        fraction = 0.5 if objective.by_author else 1.0 if needs_teacher else 0.0
        fraction = fraction if config.responses is None else 0.0
        rollout = replace(rollout, student_fraction=fraction)
    if rollout.student_fraction > 0 and not needs_teacher:
        raise InputError(
            f"[rollout] student_fraction: expected 0, since {config.objective.name} learns from the data's responses, "
            f"got {rollout.student_fraction}"
        )
    cached = next((section for section, alone in teachers.items() if alone.teacher.cache is not None), None)
    if rollout.student_fraction > 0 and cached is not None:
        raise InputError(
            f"[rollout] student_fraction: expected 0, since [{cached}] cache holds what a teacher says about the "
            f"data's responses, got {rollout.student_fraction:g}; for responses that the student writes give the "
            "teacher's path or url, or store them as data"
        )
    if config.responses is not None and 0 < rollout.student_fraction < 1:
        raise InputError(
            "[rollout] student_fraction: expected 0 with [responses], which both models wrote, or 1, where the student "
            f"writes others in every step, got {rollout.student_fraction:g}"
        )
    if rollout.max_new_tokens is None:
        rollout = replace(rollout, max_new_tokens=config.data.max_response_tokens)
    return _samples(resolve_engine(rollout, config), config.train)


def _samples(rollout: RolloutConfig, train: TrainConfig) -> RolloutConfig:
    if rollout.student_fraction == 0:
        for name in ("samples", "samples_every"):
            if getattr(rollout, name) is not None:
                raise InputError(f"[rollout] {name} is of what the student writes; student_fraction is 0")
        return rollout
    if rollout.samples is None:
        rollout = replace(rollout, samples=min(4, train.batch_size))
    if rollout.samples > train.batch_size:
        raise InputError(
            f"[rollout] samples: expected at most train.batch_size = {train.batch_size}, got {rollout.samples}"
        )
    return rollout


def _collapse(config: Config) -> CollapseConfig:
    limits, longest = config.collapse, config.rollout.max_new_tokens
    if config.rollout.student_fraction == 0:
        for name in ("min_length", "max_length"):
            if getattr(limits, name) is not None:
                raise InputError(f"[collapse] {name} is of what the student writes; rollout.student_fraction is 0")
    elif limits.min_length is None:
        limits = replace(limits, min_length=float(min(2, longest)))
    if limits.min_length is not None and limits.min_length > longest:  # whatever the student writes
        raise InputError(
            f"[collapse] min_length: expected at most rollout.max_new_tokens = {longest}, got {limits.min_length:g}"
        )
    for name in ("entropy", "length"):
        low, high = getattr(limits, f"min_{name}"), getattr(limits, f"max_{name}")
        if low is not None and high is not None and high <= low:
            raise InputError(f"[collapse] max_{name}: expected more than min_{name} = {low:g}, got {high:g}")
    return limits


def _evaluation(config: Config) -> EvaluationConfig | None:
    evaluation = config.evaluation
    if evaluation is None:
        return None
    if evaluation.response is not None and config.data.messages is not None:
        raise InputError(
            "[evaluation] response belongs to a [data] response; with messages the conversations have them"
        )
    if not evaluation.metrics:
        raise InputError("[evaluation] metrics: expected at least one")
    compared = next((name for name in evaluation.metrics if name in ("kl", "agreement")), None)
    if compared and not each_teacher(config):
        raise InputError(f'[evaluation] metrics: "{compared}" needs a [teacher]')
    if "exact_match" in evaluation.metrics and evaluation.answer is None:
        raise InputError("[evaluation] key 'answer' is missing; the metric \"exact_match\" needs it")
    if "exact_match" not in evaluation.metrics and evaluation.answer is not None:
        raise InputError(
            '[evaluation] answer belongs to the metric "exact_match": leave it out, or add the metric; '
            f"got {evaluation.answer!r}"
        )
    if evaluation.answer is not None:
        try:
            groups = re.compile(evaluation.answer).groups
        except (re.error, RecursionError, OverflowError) as error:
            raise InputError(f"[evaluation] answer: not a regular expression: {error}") from error
        if groups != 1:
            raise InputError(
                f"[evaluation] answer: expected a regular expression with one group, "
                f"got {groups} in {evaluation.answer!r}"
            )
    if evaluation.max_new_tokens is None:
        evaluation = replace(evaluation, max_new_tokens=config.data.max_response_tokens)
    return evaluation


def check_paths(config: Config, coming: Collection[str] = ()) -> None:
    """Raises InputError for a file or model that is not there. `coming`: real paths of those that may be missing."""
    _is("[run] output", Path(config.run.output) / "config.toml", Path.exists)  # whether there is such a path at all
    files = {"[data] train": config.data.train, "[evaluation] data": config.evaluation and config.evaluation.data}
    for key, path in files.items():
        there = path is None or path.startswith("hf:") or os.path.realpath(path) in coming
        if not (there or _is(key, Path(path), Path.exists)):
            raise InputError(f"{key}: no such file: {path}")
    for key, path in model_paths(config).items():
        if os.path.realpath(path) not in coming:
            _check_model(key, path)


def model_paths(config: Config) -> dict[str, str]:
    """Where the recipe's models and tokenizer are, by key."""
    paths = {
        "[student] path": config.student.path,
        **{f"[{section}] path": alone.teacher.path for section, alone in each_teacher(config).items()},
        "[tokenizer] path": config.tokenizer.path,
        "[judge] path": config.judge and config.judge.path,
    }
    return {key: path for key, path in paths.items() if path is not None}


def adapter_base(path: str) -> str | None:
    """Where the base model is of the adapter in the directory `path`; None where there is no adapter. Raises InputError
    for one that does not say it.
    """
    file = Path(path) / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        base = json.loads(file.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if isinstance(base, str) and base:
            return base
        problem = f"got {base!r}"
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
    raise InputError(f"{file}: expected base_model_name_or_path, the model that the adapter belongs to; {problem}")


HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")  # name or owner/name


def _check_model(key: str, path: str) -> None:
    """Refuses a directory without a model in it, and a missing one unless `path` may be a name on the hub."""
    if _is(key, Path(path), Path.is_dir):
        if _is(key, Path(path) / "progress.json", Path.is_file):
            raise InputError(
                f"{key}: {path} is a run's checkpoint: kdkernels export {path} DIRECTORY makes a model of it"
            )
        base = adapter_base(path)
        if base is not None:
            return _check_model(f"{key} {path}: base_model_name_or_path", base)
        if not any(_is(key, Path(path) / name, Path.is_file) for name in ("config.json", "tokenizer_config.json")):
            raise InputError(f"{key}: no model in directory {path}: config.json is missing")
    elif not HUB_NAME.fullmatch(path) or Path(Path(path).parts[0]).is_dir():
        raise InputError(f"{key}: no such directory: {path}")


def _is(key: str, path: Path, kind: Callable[[Path], bool]) -> bool:
    """`kind(path)`, where it can be asked: no path that is too long, nothing in a directory that may not be read."""
    try:
        return kind(path)
    except OSError as error:
        raise InputError(f"{key}: cannot be read: {error.strerror}: {path}") from error
