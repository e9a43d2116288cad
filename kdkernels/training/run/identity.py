"""What a run was made from, by its contents: training data, held-out data, models and tokenizer.

A run that goes on must find the same, wherever it lies by now. An identity is the SHA-256 of a data file or of the rows
of a dataset, those of all files of a model's directory that transformers may read, or for a model of the hub the commit
of its snapshot; of a served teacher, what its server says; of a cache, its manifest and index. Weights are read as a
whole: a changed weight in a file of the same size and date is noticed.
"""

import hashlib
import json
import os
from pathlib import Path

from transformers.utils.hub import cached_file, extract_commit_hash

from kdkernels.data.records import hash_of_rows, is_dataset
from kdkernels.errors import InputError
from kdkernels.http import Server
from kdkernels.teachers.served import about
from kdkernels.teachers.stored import INDEX, MANIFEST, finished
from kdkernels.training.recipe.config import Config, TeacherConfig
from kdkernels.training.recipe.resolve import adapter_base
from kdkernels.training.recipe.teachers import each_teacher, of_section
from kdkernels.training.run.hashes import sha256_of_all

MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
URL, CACHE = "] url", "] cache"  # of a teacher
TOKENIZER, DATA = "[tokenizer]", ("[data] train", "[evaluation] data")
Identity = str | dict[str, str]  # of a file or commit, or of every file in a directory


def sources(config: Config, trained_tokenizer: Path | None) -> dict[str, str]:
    """Where everything that a run is made from lies, by its key in the recipe; a tokenizer that the recipe trained
    earlier in `trained_tokenizer`.
    """
    paths = {
        "[data] train": config.data.train,
        "[evaluation] data": config.evaluation and config.evaluation.data,
        "[student] path": config.student.path,
        **_of_teachers(config),
        "[tokenizer] path": config.tokenizer.path,
        TOKENIZER: trained_tokenizer and str(trained_tokenizer),
    }
    made = {  # of files that are made once, the manifest, which has their hashes
        "[responses] output": config.responses.output if config.reads_responses else None,
        "[judge] output": config.judge.output if config.needs_scores else None,
    }
    paths |= {key: os.path.join(root, MANIFEST) for key, root in made.items() if root is not None}
    paths = {key: path for key, path in paths.items() if path is not None and (key not in made or os.path.isfile(path))}
    bases = {f"{key} (its base)": adapter_base(path) for key, path in paths.items()}
    return paths | {key: base for key, base in bases.items() if base is not None}


def identify(sources: dict[str, str]) -> dict[str, Identity]:
    """The identity of each source. Raises InputError for one that cannot be read."""
    keys = {path: key for key, path in sources.items()}  # a tokenizer often is the student's: read once
    known = {path: _identify(key, path) for path, key in keys.items()}
    return {key: known[path] for key, path in sources.items()}


def _of_teachers(config: Config) -> dict[str, str | None]:
    found = {}
    for section, alone in each_teacher(config).items():
        teacher = alone.teacher
        asked = None if teacher.cache is not None else teacher.url
        found |= {f"[{section}] path": teacher.path, f"[{section}{URL}": asked, f"[{section}{CACHE}": teacher.cache}
    return found


def check_caches(config: Config, inputs: dict[str, Identity]) -> None:
    """Raises InputError where the model at the path of a teacher is not the one that wrote its cache. inputs: the
    identities of what a run is made from.
    """
    for section, alone in each_teacher(config).items():
        if alone.teacher.cache is not None and alone.teacher.path is not None:
            with of_section(section):
                _check_cache(alone.teacher, inputs[f"[{section}] path"])


def _check_cache(teacher: TeacherConfig, identity: Identity) -> None:
    manifest, key = finished(Path(teacher.cache), "[teacher] cache"), "[teacher] path"
    told = differences({key: manifest.get(key)}, {key: identity}, {key: teacher.path})
    if manifest["dtype"] != teacher.dtype:
        told.append(f"[teacher] dtype: {manifest['dtype']} -> {teacher.dtype}")
    if told:
        raise InputError(
            f"[teacher] cache: {teacher.cache} was made by another teacher: {'; '.join(told)}. Give that one's path, "
            "or write another cache with kdkernels teacher-cache"
        )


def digest(identity: object) -> str:
    """An identity, and what belongs to it, as one hash."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def differences(old: dict[str, Identity], new: dict[str, Identity], sources: dict[str, str]) -> list[str]:
    """What has other contents now than the run began with, in words."""
    places = {key: f"{key} ({sources[key]})" if key in sources else key for key in {**old, **new}}
    return [f"{place}: {change}" for key, place in places.items() for change in _changes(old.get(key), new.get(key))]


def _identify(key: str, path: str) -> Identity:
    place = Path(path)
    if key.endswith(CACHE):
        finished(Path(path), key)
        files = [Path(path, name) for name in (MANIFEST, INDEX)]
        return dict(zip((file.name for file in files), sha256_of_all(files), strict=True))
    if key.endswith(URL):
        return f"model {about(Server(path))['model']}"
    try:
        if key in DATA and is_dataset(path):
            return f"rows {hash_of_rows(path)}"
        if place.is_file():
            return sha256_of_all([place])[0]
        if place.is_dir():
            files = sorted(file for file in place.iterdir() if file.suffix in MODEL_FILES and file.is_file())
            return dict(zip((file.name for file in files), sha256_of_all(files), strict=True))
        return f"commit {_commit(path)}"
    except OSError as error:
        raise InputError(f"{key}: {path} cannot be read: {error}") from error


def _commit(name: str) -> str:
    """The commit of the snapshot from which transformers reads the model `name` of the hub."""
    try:
        file = cached_file(name, "config.json")
    except OSError:  # a tokenizer alone has none
        file = cached_file(name, "tokenizer_config.json")
    return extract_commit_hash(file, None)


def _changes(old: Identity | None, new: Identity | None) -> list[str]:
    if old == new:
        return []
    if old is None or new is None:
        return ["the run began without it" if old is None else "the run began with it"]
    if isinstance(old, dict) and isinstance(new, dict):
        names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
        return [
            f"{name} {'is new' if name not in old else 'is missing' if name not in new else 'changed'}"
            for name in names
        ]
    commits = [value for value in (old, new) if isinstance(value, str) and value.startswith("commit ")]
    return [f"{old} -> {new}" if len(commits) == 2 else "its contents changed"]
