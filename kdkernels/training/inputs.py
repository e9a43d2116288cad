"""What a run is made from, read and checked against each other: the same for training and for a dry run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from kdkernels.data import Examples, load_examples, sample_id
from kdkernels.data.records import records
from kdkernels.data.tokenizers import vocabulary_hash, vocabulary_size
from kdkernels.errors import InputError
from kdkernels.judges import Judge
from kdkernels.objectives import DivergenceTerm, Objective
from kdkernels.reference import sampled_slope
from kdkernels.teachers.stored import HIDDEN, SAMPLED, Cache, described
from kdkernels.training.evaluation import expected_answer
from kdkernels.training.models.loading import load_tokenizer
from kdkernels.training.offline.responses import AUTHORS, read_responses
from kdkernels.training.recipe.config import Config, DataConfig
from kdkernels.training.recipe.resolve import NO_JUDGE
from kdkernels.training.recipe.teachers import each_teacher, of_section
from kdkernels.training.run.identity import Identity, identify


@dataclass(frozen=True)
class Inputs:
    """Tokenizer, training examples and, where the recipe has an [evaluation], the held-out ones."""

    tokenizer: PreTrainedTokenizerBase
    examples: Examples
    held_out: Examples | None

    @property
    def data(self) -> list[Examples]:
        """All examples, those to train on first."""
        return [self.examples] if self.held_out is None else [self.examples, self.held_out]


def build_objective(config: Config, judge: Judge | None = None) -> Objective:
    """The objective of a run, with its `judge` where it has one. Raises InputError for one that needs a judge and has
    none.
    """
    objective = config.objective.build()
    if judge is not None and config.judge is not None:
        raise InputError("judge: expected either the recipe's [judge] or the argument, got both")
    if objective.needs_weights and judge is None and not config.asks_judge:
        raise InputError(f"[objective] {config.objective.name} with these options {NO_JUDGE}")
    return objective


def read_inputs(
    config: Config,
    objective: Objective,
    trained: Path | None = None,
    made_from: Mapping[str, Identity] | None = None,
) -> Inputs:
    """Everything but the models; `trained` is where the run has the tokenizer that it trained, `made_from` the
    identities of what it is made from: without them, the prompts of [data] stand for stored responses. Raises
    InputError.
    """
    tokenizer = load_tokenizer(config, trained)
    candidates, entries = objective.needs.candidates, vocabulary_size(tokenizer)
    if candidates > entries:
        raise InputError(f"[objective] k: expected at most {entries}, the tokenizer's vocabulary, got {candidates}")
    if config.reads_responses and made_from is not None:
        examples = read_responses(config, made_from)
    elif config.reads_responses:
        prompts = read_prompts(config, tokenizer)
        twice = tuple(one for one in prompts.usable for _ in AUTHORS)
        examples = replace(prompts, usable=twice, together=len(AUTHORS))
    else:
        read = config.rollout.student_fraction < 1
        examples = read_examples(config.data, config.data.train, tokenizer, read_responses=read)
    _check_names(config, examples)
    held_out = None
    if config.evaluation is not None:
        held_out = read_examples(of_evaluation(config), config.evaluation.data, tokenizer, config.evaluation.by_token)
    if held_out is not None and config.evaluation.answer is not None:
        for example in held_out.usable[: config.evaluation.limit]:
            expected_answer(config.evaluation, example)
    if held_out is not None:
        _check_names(config, held_out)
    inputs = Inputs(tokenizer, examples, held_out)
    for section, alone in each_teacher(config).items():
        if alone.teacher.cache is not None:
            with of_section(section):
                _check_cache(alone, objective, inputs, section.partition(".")[2] or None)
    return inputs


def _check_sampled(objective: Objective, cache: Cache) -> None:
    """Raises InputError for a divergence that drawn entries cannot estimate."""
    for term in objective.current_terms().by_name.values():
        if isinstance(term, DivergenceTerm):
            try:
                sampled_slope(term.divergence)
            except ValueError as error:
                raise InputError(
                    f"[objective] {error}; {cache.root} has {described(cache.manifest)} of each token: write the most "
                    "probable ones (kdkernels teacher-cache without --sampled) or hidden states"
                ) from error


def _check_cache(config: Config, objective: Objective, inputs: Inputs, name: str | None) -> None:
    """Raises InputError where [teacher] cache is not one of what the objective needs, or not of these inputs. name:
    that of one of several teachers.
    """
    key, by_teacher = "[teacher] cache", config.evaluation is not None and config.evaluation.by_teacher
    cache = Cache(Path(config.teacher.cache), key)
    whole = objective.needs.all_entries
    words = cache.manifest["kind"] != HIDDEN
    if words and (whole or by_teacher or name):
        who = f"[objective] {config.objective.name}" if whole else '[evaluation] "kl" or "agreement"'
        who = who if whole or by_teacher else "a batch of several teachers"
        raise InputError(
            f"{key}: {who} needs the teacher's probability of every entry, and {cache.root} has {cache.manifest['k']} "
            "of each token: write one of hidden states (kdkernels teacher-cache without --top-k)"
        )
    temperature = objective.current_terms().temperature
    if words and temperature != 1:
        drawn = cache.manifest["kind"] == SAMPLED
        why = "which were drawn at 1" if drawn else f"of which all but {cache.manifest['k']} share one number"
        raise InputError(
            f"[objective] temperature: expected 1 with the stored words of {cache.root}, {why}, got {temperature:g}: "
            "write hidden states (kdkernels teacher-cache without --top-k)"
        )
    if cache.manifest["kind"] == SAMPLED:
        _check_sampled(objective, cache)
    if cache.manifest["tokenizer"] != vocabulary_hash(inputs.tokenizer):
        raise InputError(
            f"{key}: {cache.root} was made with another tokenizer (sha256 {cache.manifest['tokenizer'][:12]}, not "
            f"{vocabulary_hash(inputs.tokenizer)[:12]}): ids in it mean other words"
        )
    used = [(config.data.train, inputs.examples.usable)]
    if by_teacher:
        used.append((config.evaluation.data, inputs.held_out.usable[: config.evaluation.limit]))
    for path, examples in used:
        for example in examples:
            if example.teacher == name and sample_id(example.prompt_ids, example.response_ids) not in cache.places:
                made_from, now = cache.manifest["[data] train"], identify({"[data] train": config.data.train})
                raise InputError(
                    f"{key}: {cache.root} has no sample of {path}, line {example.line}: it was made from data of "
                    f"sha256 {made_from}, and [data] train is {now['[data] train']}, or from other settings of [data]; "
                    "write another one with kdkernels teacher-cache"
                )


def _check_names(config: Config, examples: Examples) -> None:
    """Raises InputError for an example whose teacher is none of the recipe's."""
    for example in examples.usable:
        if config.teachers and example.teacher not in config.teachers:
            raise InputError(
                f"{examples.path}, line {example.line}: [data] teacher: expected one of {', '.join(config.teachers)} "
                f"([teachers.NAME]) in field {config.data.teacher!r}, got {example.teacher!r}"
            )


def of_evaluation(config: Config) -> DataConfig:
    """[data] as the held-out data have it."""
    response = config.evaluation.response
    return config.data if response is None else replace(config.data, response=response)


def read_prompts(config: Config, tokenizer: PreTrainedTokenizerBase) -> Examples:
    """The prompts of [data], whose responses nobody reads. Raises InputError."""
    return read_examples(config.data, config.data.train, tokenizer, read_responses=False)


def read_examples(
    data: DataConfig,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    tokenize_responses: bool = True,
    read_responses: bool = True,
) -> Examples:
    """The examples of the data at `path`, which has the format and the limits of [data]. Raises InputError."""
    examples = load_examples(
        path,
        tokenizer,
        prompt=data.prompt,
        response=data.response,
        messages=data.messages,
        answers=data.answers,
        max_prompt_tokens=data.max_prompt_tokens,
        max_response_tokens=data.max_response_tokens,
        special_tokens_in_fields=data.special_tokens_in_fields,
        tokenize_responses=tokenize_responses,
        read_responses=read_responses,
    )
    return examples if data.teacher is None else _routed(examples, data.teacher)


def _routed(examples: Examples, field: str) -> Examples:
    """The examples with the names in this field of their records as their teachers. Raises InputError."""
    named = {line: record.get(field) for line, record in records(examples.path)}
    for example in examples.usable:
        if not isinstance(named[example.line], str):
            raise InputError(
                f"{examples.path}, line {example.line}: [data] teacher: expected the name of a teacher in field "
                f"{field!r}, got {named[example.line]!r}"
            )
    return replace(examples, usable=tuple(replace(one, teacher=named[one.line]) for one in examples.usable))
