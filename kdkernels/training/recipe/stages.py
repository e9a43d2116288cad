"""Recipes of several trainings, one after another: several files, or one with `[[stages]]`.

    [reasoning]                # "Thinking without Tokens" (TwT), section 3.2: docs/TWT.md
    label = "{label}"

    [[stages]]
    name = "full"
    target = "rationale"       # what [data] response says

    [[stages]]
    name = "short"
    target = "compressed"      # the same, of rationales that are rewritten for the student of the stage before
    train.epochs = 2           # any key of the recipe, for this stage alone

    [[stages]]
    name = "label"
    target = "label"           # what [reasoning] label says

A stage is the recipe with what the stage says otherwise: its run is in the directory `name` below [run] output, and
from the second stage on its student is the one that the stage before trained: an adapter is trained further, unless it
was merged ([student.adapter] merge = true): then each stage begins a new one.
"""

import copy
import os
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from kdkernels.errors import InputError
from kdkernels.training.recipe.config import FINAL, Config, Count, Name, Place
from kdkernels.training.recipe.elsewhere import described
from kdkernels.training.recipe.extends import CURATION, INSTEAD, STAGES, lay, lineage, read_tables, set_keys
from kdkernels.training.recipe.read import naming, parse_tables
from kdkernels.training.recipe.resolve import check_paths, model_paths
from kdkernels.training.recipe.schema import Rule, parse_section, refuse_unknown, show

REASONING, COMPRESSIONS = "reasoning", "compressions"
Target = Literal["rationale", "compressed", "label"]
StageName = Annotated[
    str,
    Rule(
        lambda value: value.replace("-", "").replace("_", "").isalnum() and value != COMPRESSIONS,
        f"a name of letters, digits, - and _ that is not {COMPRESSIONS!r}",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ReasoningConfig:
    """What the targets of the stages are made of. `label`: the template of the response of `target = "label"`; [data]
    response is that of the others.

    `rationale`, `teacher`: the fields of a record that hold the rationale and the name of the teacher that wrote it;
    `query`: the template of what the teacher was asked.
    `pattern`: a regular expression with one group, the rationale in a response of the student (the last match counts).

    `compressor`: "teacher": the student of the stage before answers the training queries, and each rationale's own
    teacher rewrites it to the length, style and structure of the student's. "length": the teacher rewrites it in at
    most `words` words, whatever the student writes. `teachers`: the recipe whose [curation] has the teachers; by
    default this one.
    `request`: a file with the wording of what they are asked for, instead of the project's own.

    `unusable`: what becomes of a record whose compression cannot be used (no rationale in the student's response, an
    empty rewriting, one of more than `words`): "keep" its rationale as it is, or "drop" the record; counted either way.

    `batch_size`: queries that the student answers at a time.
    """

    label: str
    rationale: Name = "rationale"
    teacher: Name = "teacher"
    query: str = "{query}"
    pattern: str | None = None
    compressor: Literal["teacher", "length"] = "teacher"
    words: Count | None = None
    teachers: Place | None = None
    request: Place | None = None
    unusable: Literal["keep", "drop"] = "keep"
    batch_size: Count = 32


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One training of several, in their order; beside `name` and `target`, any section of the recipe with the keys that
    this stage has otherwise (`train.epochs = 2`).

    `target`: "rationale": [data] response as it is. "compressed": the same, of rationales rewritten for the student of
    the stage before. "label": [reasoning] label.
    """

    name: StageName
    target: Target


@dataclass(frozen=True)
class Compression:
    """Where the data of a stage come from: the records of `source`, their rationales rewritten for the `student` (the
    recipe of the stage before, whose model is in its final/), go to `output`.
    """

    source: str
    output: str
    student: Config
    settings: ReasoningConfig


@dataclass(frozen=True)
class Stage:
    """One training. `source`: what errors name; `path`: the file of the recipe. `root`, `name`, `target`: of one of
    several in that file, the directory of them all, and what StageConfig says.
    """

    config: Config
    source: str
    path: str
    root: str | None = None
    name: str | None = None
    target: Target | None = None
    compression: Compression | None = None


def read_recipes(paths: Sequence[str | Path], overrides: Iterable[str] = (), dry_run: bool = False) -> list[Stage]:
    """`read_recipe` of each training of the recipes. A later one may start from the model of an earlier one, which need
    not be there yet. `dry_run`: as there; each stage of a file then starts from what the first one starts from.

    Raises:
        InputError: one cannot be used, starts from a model that it or a later one makes, or has the output of another.
    """
    stages = [stage for path in paths for stage in parse_stages(path, list(overrides), dry_run)]
    outputs = {}
    for stage in stages:
        coming = [os.path.join(output, FINAL) for output in outputs]
        if stage.compression is not None:
            coming.append(os.path.realpath(stage.compression.output))
        with naming(stage.source):
            if not (dry_run and described(stage.config, lineage(stage.path))):
                check_paths(stage.config, coming)
        output = os.path.realpath(stage.config.run.output)
        if output in outputs:
            raise InputError(
                f"{stage.source}: [run] output: {stage.config.run.output} is that of {outputs[output]} already: every "
                "stage needs a directory of its own"
            )
        outputs[output] = stage.source
    _check_order(stages)
    return stages


def _check_order(stages: Sequence[Stage]) -> None:
    makers = {os.path.join(os.path.realpath(stage.config.run.output), FINAL): i for i, stage in enumerate(stages)}
    for i, stage in enumerate(stages):
        for key, model in model_paths(stage.config).items():
            maker = makers.get(os.path.realpath(model), -1)
            if maker >= i and not os.path.isdir(model):
                raise InputError(
                    f"{stage.source}: {key}: {model} is what {stages[maker].source} trains, which has to come before"
                )


def parse_stages(path: str | Path, overrides: Sequence[str] = (), dry_run: bool = False) -> list[Stage]:
    """The trainings of one file, all of whose models and data may be missing."""
    tables = read_tables(path)
    set_keys(tables, overrides)
    listed, reasoning = tables.pop(STAGES, None), tables.pop(REASONING, None)
    curated = tables.pop(CURATION, None) is not None
    if listed is None:
        if reasoning is not None:
            raise InputError(f"{path}: [{REASONING}] belongs to [[{STAGES}]], which the recipe does not have")
        return [Stage(parse_tables(tables, str(path)), str(path), str(path))]
    if not isinstance(listed, list) or not listed or not all(isinstance(one, Mapping) for one in listed):
        raise InputError(f"{path}: {STAGES}: expected one table [[{STAGES}]] or more, got {show(listed)}")
    settings = parse_section(ReasoningConfig, reasoning or {}, f"{path}: [{REASONING}]")
    if curated and settings.teachers is None:
        settings = replace(settings, teachers=str(path))
    said = [_stage(dict(one), i, str(path)) for i, one in enumerate(listed, start=1)]
    _check_chain([config for config, _ in said], settings, str(path))
    stages: list[Stage] = []
    for config, own in said:
        stages.append(_expanded(config, own, tables, settings, overrides, stages, str(path), dry_run))
    return stages


def _stage(table: dict[str, Any], number: int, path: str) -> tuple[StageConfig, dict[str, Any]]:
    """What StageConfig says of a stage, and the tables that it lays over the recipe."""
    place = f"{path}: [[{STAGES}]] {number}:"
    own, sections = {entry.name for entry in fields(StageConfig)}, {entry.name for entry in fields(Config)}
    refuse_unknown(table, [*own, *sections], place, "key")
    config = parse_section(StageConfig, {key: value for key, value in table.items() if key in own}, place)
    laid = {key: value for key, value in table.items() if key in sections}
    for key, value in laid.items():
        if not isinstance(value, Mapping):
            raise InputError(f"{place} {key}: expected a table, got {show(value)}")
    if "output" in laid.get("run", {}):
        raise InputError(f"{place} run.output: expected that of [run] alone, below which the stage's name is")
    return config, laid


def _check_chain(configs: Sequence[StageConfig], settings: ReasoningConfig, path: str) -> None:
    """Raises InputError unless each stage has what it needs of those before it."""
    if has_field(settings.label, settings.rationale):
        raise InputError(
            f"{path}: [{REASONING}] label: expected it without {{{settings.rationale}}}, got {show(settings.label)}"
        )
    names = [config.name for config in configs]
    for i, (name, config) in enumerate(zip(names, configs, strict=True)):
        place = f"{path}: [[{STAGES}]] {i + 1} ({name}):"
        if name in names[:i]:
            raise InputError(f"{place} name: expected one that no other stage has, got {name!r} again")
        if config.target != "compressed":
            continue
        if i == 0:
            raise InputError(f'{place} target: "compressed" is for the student of the stage before, and there is none')
        if configs[i - 1].target == "label" and settings.compressor == "teacher":
            raise InputError(
                f'{place} target: "compressed" is for what the student of the stage before writes, and after the stage '
                f'{names[i - 1]} (target "label") it writes no rationale: put it before that one'
            )
        with naming(place.removesuffix(":")):
            _check_compressor(settings)


def _check_response(data: object, rationale: str, source: str) -> None:
    """Raises InputError unless the rationale, which the target is about, is in what is learnt."""
    response = data.get("response") if isinstance(data, Mapping) else None
    if not isinstance(response, str) or not has_field(response, rationale):
        raise InputError(
            f'{source}: expected [data] response with the field {{{rationale}}}, as in "{{{rationale}}}\\n{{label}}", '
            f"got {show(response)}"
        )


def has_field(template: str, name: str) -> bool:
    """Whether a record's field `name` is in the template, which may be none."""
    try:
        return any(field == name for _, field, _, _ in string.Formatter().parse(template))
    except ValueError:
        return False


def _check_compressor(settings: ReasoningConfig) -> None:
    if settings.compressor == "teacher" and settings.pattern is None:
        raise InputError(
            f"[{REASONING}] key 'pattern' is missing; the compressor \"teacher\" needs it to find the rationale in "
            "what the student writes, as in '(?s)^(.*)\\nAnswer:'"
        )
    if (settings.words is not None) != (settings.compressor == "length"):
        raise InputError(
            f'[{REASONING}] words belongs to the compressor "length", which needs it; got {show(settings.words)} with '
            f"{settings.compressor!r}"
        )


def _expanded(
    config: StageConfig,
    own: Mapping[str, Any],
    tables: Mapping[str, Any],
    settings: ReasoningConfig,
    overrides: Sequence[str],
    before: Sequence[Stage],
    path: str,
    dry_run: bool,
) -> Stage:
    """The stage as a recipe of its own: --set counts more than what the stage says, and that more than the recipe.
    What is learnt is the target's to say.
    """
    source = f"{path}, stage {config.name}"
    decided = {"label": "response", "compressed": "train"}.get(config.target)
    if decided in own.get("data", {}):
        raise InputError(f'{source}: data.{decided}: the target "{config.target}" decides it: take it out')
    laid = copy.deepcopy(dict(tables))
    lay(own, over=laid)
    set_keys(laid, overrides)
    if config.target == "label":
        lay({"data": {"response": settings.label}}, over=laid)
    else:
        _check_response(laid.get("data"), settings.rationale, source)
    for name in (STAGES, REASONING, CURATION):
        laid.pop(name, None)
    root = tables.get("run", {}).get("output")
    if isinstance(root, str):  # else the recipe's own reading refuses it
        laid.setdefault("run", {})["output"] = os.path.join(root, config.name)
    if before and not dry_run and "path" not in own.get("student", {}):
        started = {"student": {"path": os.path.join(before[-1].config.run.output, FINAL)}}
        lay(started, over=laid)
        for key in ("kind", *INSTEAD["tokenizer.path"]):
            laid.get("tokenizer", {}).pop(key, None)
    compression = None
    if config.target == "compressed":
        earlier = [stage.compression.output for stage in before if stage.compression is not None]
        source_data = earlier[-1] if earlier else before[-1].config.data.train
        output = os.path.join(os.path.dirname(before[-1].config.run.output), COMPRESSIONS, config.name, "train.jsonl")
        compression = Compression(source_data, output, before[-1].config, settings)
        if not dry_run:
            laid["data"]["train"] = output
    return Stage(parse_tables(laid, source), source, path, os.path.dirname(laid["run"]["output"]), config.name,
                 config.target, compression)  # fmt: skip
