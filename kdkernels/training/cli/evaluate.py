"""`kdkernels eval`: how often a model's answers are right."""

import argparse
from pathlib import Path

from kdkernels.errors import InputError, MissingPackage
from kdkernels.training import with_reason
from kdkernels.training.cli.common import count, show
from kdkernels.training.processes.exits import UNUSABLE, end
from kdkernels.training.recipe.measuring import ANSWER, PROMPT, RESPONSE, measuring


def add(commands) -> None:
    command = commands.add_parser(
        "eval",
        help="how often a model's answers are right",
        description="Answers the prompts of a JSON lines file greedily and counts the right answers; by default as in "
        "GSM8K, where a line has a question and an answer whose number follows ####. Or runs tasks of "
        "lm-evaluation-harness. Under torchrun, the processes share the prompts.",
    )
    command.set_defaults(run=_run)
    add = command.add_argument
    add("model", metavar="MODEL", help="directory or hub name: a model, or an adapter on one")
    add("data", metavar="DATA.jsonl", nargs="?", help="one JSON object a line")
    add("--prompt", type=_text, help="template over a line's fields, where \\n is a line break "
        f"(default: {PROMPT!r})")  # fmt: skip
    add("--response", type=_text, help=f"template of the text that has the right answer (default: {RESPONSE!r})")
    add("--messages", metavar="FIELD", help="in place of both: the field that holds a conversation, a list of "
        "{role, content}, for the tokenizer's chat template; the last answer is the right one")  # fmt: skip
    add("--answer", metavar="REGEX", default=ANSWER, help="its one group is the answer; the last match counts, and "
        "1,450 is 1450 (default: %(default)s)")  # fmt: skip
    add("--limit", metavar="N", type=count, help="only the first N problems; of each task with --lm-eval")
    add("--batch-size", metavar="N", type=count, default=32, help="prompts at a time (default: %(default)s)")
    add("--max-new-tokens", metavar="N", type=count, default=512, help="of a response (default: %(default)s)")
    add("--max-prompt-tokens", metavar="N", type=count, default=1024, help="problems with longer prompts are left "
        "out and counted (default: %(default)s)")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), help="of the weights (default: bfloat16 on a GPU, else float32)")
    add("--output", metavar="FILE", default="kdkernels-eval.jsonl", help="where the records go: a line a problem with "
        "its response; of --lm-eval, one JSON object of all results (default: %(default)s)")  # fmt: skip
    add("--lm-eval", metavar="TASKS", nargs="?", const="tsd-kd", help="instead of DATA.jsonl: tasks of "
        "lm-evaluation-harness (kdkernels[lm-eval]) with commas between them, or those of the papers that it has: "
        "tsd-kd (the default), vcrd-math, vcrd-code")  # fmt: skip
    add("--chat", action="store_true", help="with --lm-eval: prompts through the tokenizer's chat template")
    add("--run-code", action="store_true", help="with --lm-eval: allows tasks that run the code which the model writes")


def _run(options: argparse.Namespace) -> int:
    output = Path(options.output)
    try:
        if bool(options.data) == bool(options.lm_eval):
            raise InputError("eval: expected either DATA.jsonl or --lm-eval")
        if not output.parent.is_dir():
            raise InputError(f"--output: no such directory: {output.parent}")
        if options.lm_eval:
            from kdkernels.training import harness

            chosen = harness.tasks(options.lm_eval, options.run_code)
            return show(harness.measure(options.model, chosen, output, options))
        for name in ("chat", "run_code"):
            if getattr(options, name):
                raise InputError(f"--{name.replace('_', '-')} belongs to --lm-eval, which is not given")
        config = measuring(options)
        with with_reason():
            from kdkernels.training.measuring import run  # torch, transformers: seconds
    except (InputError, MissingPackage) as error:
        return end(UNUSABLE, error)
    return run(config, output)


def _text(text: str) -> str:
    """What a shell hands on, with line breaks for \\n."""
    return text.replace("\\n", "\n")
