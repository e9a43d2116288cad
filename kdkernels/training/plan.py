"""What a recipe would do, found out without training: everything is read and checked, nothing is written."""

from kdkernels.training.config import Config
from kdkernels.training.data import load_examples
from kdkernels.training.model import count_parameters, load_tokenizer, vocabulary_size
from kdkernels.training.run import RunDirectory
from kdkernels.training.schema import to_toml


def plan(config: Config, resume: bool = False) -> str:
    """The resolved recipe and what it comes to. Raises InputError where training would."""
    run = RunDirectory(config.run.output)
    run.check(config, resume)
    tokenizer = load_tokenizer(config)
    examples = load_examples(config.data, config.data.train, tokenizer)
    lines = [to_toml(config), "# plan", str(examples)]
    if config.evaluation is not None:
        lines.append(str(load_examples(config.data, config.evaluation.data, tokenizer)))
    lines.append(f"tokenizer: {vocabulary_size(tokenizer)} tokens")
    lines += [f"{name}: {count:,} parameters" for name, count in count_parameters(config, tokenizer).items()]
    responses = config.train.steps * config.train.batch_size
    longest = max(config.data.max_response_tokens, config.rollout.max_new_tokens)
    lines.append(
        f"{config.train.steps} steps of {config.train.batch_size} responses: "
        f"{responses / len(examples.usable):.2f} epochs, at most {responses * longest:,} response tokens"
    )
    lines += [f"{name}: {path}" for name, path in {"run": run.root, "metrics": run.metrics, "model": run.final}.items()]
    return "\n".join(lines)
