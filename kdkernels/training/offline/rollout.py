"""`kdkernels rollout`: makes whatever of a recipe's stored responses and scores is missing."""

from kdkernels.errors import InputError
from kdkernels.training.inputs import read_prompts
from kdkernels.training.models.loading import load_tokenizer
from kdkernels.training.offline.responses import read_responses, responses_store, write_responses
from kdkernels.training.offline.scores import scores_store, write_scores
from kdkernels.training.offline.store import Store
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.run.identity import identify, sources


def rollout(config: Config) -> list[str]:
    """Writes the responses of [responses] and, where the objective needs them, the scores of [judge]; what is there
    already stays as it is. All processes of a launcher call this together.

    Returns:
        What is there now, in words.

    Raises:
        InputError: the recipe has no [responses], or what is there was made from something else.
        DiskError: what the disk did not take.
        FloatingPointError: a model's logits are no distribution.
    """
    distributed.start(config.run.timeout_seconds)
    if config.responses is None:
        raise InputError(
            "section [responses] is missing: it says where the models' responses go, and how to sample them"
        )
    made_from = distributed.by_first(lambda: identify(sources(config, None)))
    with distributed.together():
        tokenizer = load_tokenizer(config)
        prompts = read_prompts(config, tokenizer)
    store = responses_store(config, made_from)
    with store.opened():
        write_responses(config, store, tokenizer, prompts)
    made = [f"responses to {len(prompts.usable)} prompts: {store.root}"]
    if config.needs_scores:
        with distributed.together():
            responses = read_responses(config, made_from)
        scored = distributed.by_first(lambda: scores_store(config))
        with scored.opened():
            write_scores(config, scored, tokenizer, responses)
        made.append(f"scores of both models' proposals in {len(responses.usable)} responses: {scored.root}")
    return made


def describe_offline(config: Config) -> list[str]:
    """Of a plan: what `kdkernels rollout` has yet to make, and whether the judge is asked."""
    lines = []
    if config.judge is not None and not config.asks_judge:
        lines.append(f"[judge] is not asked: {config.objective.name} with these options takes no weights from it")
    if not config.reads_responses:
        return lines
    parts = {"[responses]": config.responses, **({"[judge]": config.judge} if config.needs_scores else {})}
    for section, settings in parts.items():
        store = Store(settings.output, f"{section} output", {}, {})
        if not store.is_complete():
            lines.append(f"{store.key}: {store.root} is not there, or not complete: first kdkernels rollout RECIPE")
    return lines
