"""What [curation] in a recipe may say, in frozen dataclasses, and what must hold beyond the types."""

import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from kdkernels.curation.prompts import Prompt, read_prompt
from kdkernels.curation.server import key_of
from kdkernels.errors import InputError
from kdkernels.training.recipe.config import (
    Count,
    CountOrZero,
    Name,
    Place,
    Positive,
    PositiveOrZero,
    Seed,
    Share,
    Timeout,
)
from kdkernels.training.recipe.extends import read_tables
from kdkernels.training.recipe.schema import Rule, override, parse_section, show

SECTION = "curation"
OWN_KEYS = {  # of a kind of teacher: what it needs, what is another kind's
    "local": (("path",), ("url", "model", "key_variable", "requests_per_minute")),
    "openai": (("url", "model"), ("path",)),
}
Nucleus = Annotated[float, Rule(lambda value: 0 < value <= 1, "a number > 0 and at most 1")]


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """`kind` "local": the model in the directory `path`, in this process (`dtype` of its weights; `concurrency`
    conversations at a time). "openai": `model` on the server at `url`, which speaks OpenAI's chat completions (vLLM and
    others); `concurrency` requests at a time, at most `requests_per_minute`, each asked again up to `retries` times
    after `timeout` seconds without a sign, 408, 409, 425, 429 (Retry-After is honoured), 5xx or an answer that is none.

    `key_variable`: the environment variable that has the server's key. The key itself never stands in a recipe.
    `logprobs`: asks the server for log-probabilities. `extra`: further fields of the request.
    `price_in`, `price_out`: of a million tokens, in any currency, for the report.
    """

    name: Name
    kind: Literal["local", "openai"]
    path: Place | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    url: str | None = None
    model: Name | None = None
    key_variable: str | None = None
    temperature: PositiveOrZero = 0.0
    top_p: Nucleus = 1.0
    seed: Seed = 0
    max_new_tokens: Count = 2048
    logprobs: bool = False
    extra: dict | None = None
    concurrency: Count = 4
    requests_per_minute: Positive | None = None
    timeout: Timeout = 120.0
    retries: CountOrZero = 8
    backoff: PositiveOrZero = 1.0
    price_in: PositiveOrZero = 0.0
    price_out: PositiveOrZero = 0.0


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """`output`: the directory of the dataset and of all that was decided. `queries`: JSON lines or a dataset, as
    [data] train; `query` and `label`: templates over its fields. `label`, the right answer, is what quality "correct"
    needs.

    `task`: "code", "multiple_choice", "mathematics", or the path of a prompt file (.toml) of your own.

    `quality`: an answer is kept where its "confidence" is at least `threshold`, where the exponential of its mean
    "log_probability" is, where its label is the "correct" one, or always ("none"). `disagreement`: where the labels of
    a query's answers that are left differ, "keep" them all, those of the "majority" alone (none without one), or
    "drop" the query. `diversity`: where three or more teachers are left, the two answers are kept whose rationales are
    least alike to the sentence-transformers model in the directory `embedding`; two at "random" (drawn by `seed`); or
    all of them ("none").

    `score_in_response`: the response of the dataset ends with the confidence, as the teachers' answers do.
    `answers`: the file that keeps all answers, answers.jsonl in `output` by default. Runs one after another may share
    one: what it has is not asked for again.
    """

    output: Place
    queries: Place
    query: str
    label: str | None = None
    task: Name
    teachers: tuple[TeacherConfig, ...]
    quality: Literal["confidence", "log_probability", "correct", "none"] = "confidence"
    threshold: Share = 0.95
    disagreement: Literal["keep", "majority", "drop"] = "keep"
    diversity: Literal["embedding", "random", "none"] = "embedding"
    embedding: Place | None = None
    seed: Seed = 0
    score_in_response: bool = False
    answers: Place | None = None


def read_curation(path: str, overrides: tuple[str, ...] | list[str] = ()) -> CurationConfig:
    """The section [curation] of the recipe at `path`, with each override `curation.key=value` laid over it, checked.
    The recipe's other sections are those of a training, which `kdkernels train` reads.

    Raises:
        InputError: it cannot be used.
    """
    tables = read_tables(path)
    for assignment in overrides:
        override(tables, assignment)
    if not isinstance(tables.get(SECTION), dict):
        raise InputError(f"{path}: section [{SECTION}] is missing: it says who is asked what")
    try:
        config = parse_section(CurationConfig, tables[SECTION], f"[{SECTION}]")
        check(config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return config


def check(config: CurationConfig, given: tuple[str, ...] = (), embedded: bool = False) -> Prompt:
    """The prompt of the task, all that can be known before anybody is asked being in order. `given`: names of teachers
    that the caller brings; `embedded`: it brings an embedding. Raises InputError.
    """
    if not config.teachers:
        raise InputError("[curation] teachers: expected at least one table [[curation.teachers]], got none")
    names = [teacher.name for teacher in config.teachers]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"[curation] teachers: expected names that differ, got {show(name)} twice")
    for i, teacher in enumerate(config.teachers):
        if teacher.name not in given:
            _check_teacher(teacher, f"[curation] teachers[{i}] ({teacher.name})")
    if not (config.queries.startswith("hf:") or os.path.exists(config.queries)):
        raise InputError(f"[curation] queries: no such file: {config.queries}")
    prompt = read_prompt(config.task)
    _check_choice(config, prompt, embedded)
    return prompt


def _check_choice(config: CurationConfig, prompt: Prompt, embedded: bool) -> None:
    """What the ways to choose need."""
    if config.quality == "correct" and config.label is None:
        raise InputError('[curation] label: quality "correct" compares with it: give the template of the right answer')
    if config.quality == "log_probability":
        silent = [one.name for one in config.teachers if one.kind == "openai" and not one.logprobs]
        if silent:
            raise InputError(f'[curation] teachers: quality "log_probability" needs logprobs = true of {silent[0]}')
    if prompt.labels == "code" and config.disagreement != "keep":
        raise InputError(
            f'[curation] disagreement: expected "keep" of programs, which may differ and both be right, got '
            f"{config.disagreement!r}"
        )
    if config.diversity == "embedding" and len(config.teachers) >= 3 and not embedded:
        if config.embedding is None:
            raise InputError(
                '[curation] embedding: diversity "embedding" of three or more teachers needs the directory of a '
                'sentence-transformers model; or set diversity = "random" or "none"'
            )
        if not os.path.isdir(config.embedding):
            raise InputError(f"[curation] embedding: no such directory: {config.embedding}")


def _check_teacher(teacher: TeacherConfig, place: str) -> None:
    needed, others = OWN_KEYS[teacher.kind]
    for key in needed:
        if getattr(teacher, key) is None:
            raise InputError(f'{place} {key}: a teacher of kind "{teacher.kind}" needs it')
    for key in others:
        if getattr(teacher, key) is not None:
            raise InputError(f'{place} {key}: a teacher of kind "{teacher.kind}" has none: take it out')
    if teacher.kind == "local" and not os.path.isdir(teacher.path):
        raise InputError(f"{place} path: no such directory: {teacher.path}")
    if teacher.kind == "openai":
        _check_url(teacher.url, place)
        try:
            key_of(teacher.key_variable)
        except InputError as error:
            raise InputError(f"{place} {error}") from error


def _check_url(url: str, place: str) -> None:
    """The url is written into the manifest: nothing that is secret may be in it."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        sound = False
    if not sound or "@" in url or parts.query or parts.fragment:
        raise InputError(
            f"{place} url: expected http://HOST:PORT/v1 or https://HOST/v1, without user, password or anything behind "
            "a ?: a key goes into an environment variable, which key_variable names"
        )


def settings(config: CurationConfig) -> dict[str, Any]:
    """What decides which dataset comes out, beside teachers and files: what a run that goes on must find as it was."""
    own = ("query", "label", "quality", "threshold", "disagreement", "diversity", "seed", "score_in_response")
    return {key: getattr(config, key) for key in own} | {"teachers": [one.name for one in config.teachers]}
