"""The rehearsal from beginning to end. What an interrupted one has made is gone on with."""

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kdkernels.curation import LocalChat, curate, read_curation
from kdkernels.demo.phases import Workers
from kdkernels.demo.twt.arms import ARMS, DATASETS, HERE, STEPS, TARGETS
from kdkernels.demo.twt.plots import plot_stages
from kdkernels.demo.twt.report import render
from kdkernels.demo.twt.results import load
from kdkernels.demo.twt.task import STYLES, write_data
from kdkernels.demo.twt.teachers import Confident, Words


def rehearse(output: Path, seeds: int = 3, settings: Sequence[str] = ()) -> Path:
    """Runs everything below `output` and returns the path of the report. `settings`: --set of every training.

    Raises FileNotFoundError without the recipes, RuntimeError for a training that fails.
    """
    started = time.monotonic()
    if not HERE.is_dir():
        raise FileNotFoundError(f"no recipes in {HERE}: run the rehearsal from a clone of the repository")
    if not (output / "data" / "test.jsonl").is_file():
        write_data(output / "data")
    workers, options = Workers(_logs(output)), [word for one in settings for word in ("--set", one)]
    first = {f"teachers/{style}": _teacher(output, style) for style in STYLES} | {"student": _student(output)}
    workers.run({name: [*command, *options] for name, command in first.items()})
    curated = {name: _curate(output, name) for name in DATASETS}
    commands = {}
    for seed in range(seeds):
        recipes = [_recipe(output, seed, arm) for arm in ARMS]
        commands[f"seed-{seed}/arms"] = [sys.executable, "-m", "kdkernels", "train", *map(str, recipes), *options]
    workers.run(commands)
    results = load(output, range(seeds), curated)
    plot_stages(results, output / "stages.png")
    report = output / "report.md"
    seconds, cpu = time.monotonic() - started, sum(os.times()[:4])  # of this process and those it has waited for
    report.write_text(render(results, seconds, cpu, workers.cores), encoding="utf-8")
    return report


def _logs(output: Path) -> Path:
    """A new directory."""
    return next(path for i in range(1000) if not (path := output / f"logs-{i}").exists())


def _train(recipe: str, assignments: dict[str, object]) -> list[str]:
    told = [word for key, value in assignments.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return [sys.executable, "-m", "kdkernels", "train", str(HERE / recipe), "--resume", *told]


def _teacher(output: Path, style: str) -> list[str]:
    data, run = output / "data" / f"{style}.jsonl", output / "teachers" / style
    return _train("teacher.toml", {"run.output": str(run), "data.train": str(data), "train.steps": STEPS[style]})


def _student(output: Path) -> list[str]:
    run, data = output / "student", output / "data" / "student.jsonl"
    return _train("student.toml", {"run.output": str(run), "data.train": str(data)})


def _curate(output: Path, name: str) -> Path:
    """The dataset of that name. All share the teachers' answers."""
    print(f"curating {name}", flush=True)
    config = read_curation(str(_recipe(output, 0, "twt")))
    changes = dict(DATASETS[name])
    only = changes.pop("only", STYLES)
    teachers = tuple(one for one in config.teachers if one.name in only)
    place, answers = output / "curated" / name, output / "curated" / "answers.jsonl"
    config = replace(config, output=str(place), answers=str(answers), teachers=teachers, **changes)
    chats = {
        one.name: Confident(LocalChat.load(one.path, max_new_tokens=one.max_new_tokens, batch=one.concurrency))
        for one in teachers
    }
    return curate(config, chats=chats, embedding=Words())


def _recipe(output: Path, seed: int, arm: str) -> Path:
    """Writes the recipe of an arm: twt.toml with its own data, stages and places."""
    dataset, stages, start = ARMS[arm]
    own = output / f"seed-{seed}"
    tables = {
        "run": {"output": str(own / arm), "seed": seed},
        "student": {"path": str(own / start / "final" if start else output / "student" / "final")},
        "data": {"train": str(output / "curated" / dataset / "dataset.jsonl")},
        "evaluation": {"data": str(output / "data" / "test.jsonl")},
        "reasoning": {"request": str(HERE / "rewrite.toml")},
        "curation": {"queries": str(output / "data" / "queries.jsonl"), "task": str(HERE / "answer.toml")},
    }
    lines = [f"extends = {json.dumps(str(HERE / 'twt.toml'))}"]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    for style in STYLES:
        path = json.dumps(str(output / "teachers" / style / "final"))
        lines += ["", "[[curation.teachers]]", f'name = "{style}"', 'kind = "local"', f"path = {path}"]
        lines += ["max_new_tokens = 50", "concurrency = 200"]
    for stage in stages:
        lines += ["", "[[stages]]", f'name = "{stage}"', f'target = "{TARGETS[stage]}"']
        lines += ["train.steps = 100"] if stage == "label" else []
    path = own / "recipes" / f"{arm}.toml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return path
