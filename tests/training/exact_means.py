"""Five steps of SGD on stored rollouts, by the trainer's engine, however the batch is cut, and in fp64 on full logits.
Run by test_exact_means.py, also as a program under torch.distributed.run, which takes a JSON list of recipes with their
overrides and a file for the results.
"""

import json
import random
import sys
from collections.abc import Sequence

import torch
from deepspeed.runtime.zero import utils
from deepspeed.utils import safe_get_full_grad

from kdkernels import reference
from kdkernels.data import collate
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.distillation import Distillation
from kdkernels.training import deepspeed_strategy, load_config, step
from kdkernels.training.deepspeed_strategy import DeepSpeedStrategy
from kdkernels.training.inputs import read_examples
from kdkernels.training.models.placement import place
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config

from .engine_steps import EXAMPLES, models

STEPS = 5


class Stored:
    """Rollouts that were written before: 1 to 6 tokens to each prompt, always the same."""

    ends = ()

    def __init__(self, entries: int):
        self.entries = entries

    def generate(self, prompts, max_new_tokens, *, greedy=False):
        drawn = [random.Random(repr(list(prompt))) for prompt in prompts]
        return [[one.randrange(self.entries) for _ in range(one.randint(1, max_new_tokens))] for one in drawn]

    def sync(self):
        pass

    def metrics(self):
        return {}


def batches(config: Config, tokenizer):
    """The examples of each step."""
    usable = read_examples(config.data, config.data.train, tokenizer).usable
    return [usable[start : start + EXAMPLES] for start in (0, 8, 16, 24, 4)][:STEPS]


def sgd(config: Config, module) -> torch.optim.SGD:
    """In place of AdamW, which hides a factor on the gradient."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=config.optimizer.lr)
    optimizer.skip = False
    return optimizer


def engine_steps(config: Config) -> tuple[dict, dict]:
    """(name -> gradient of the first step, name -> weight after the last one), on process 0."""
    distributed.start()
    deepspeed_strategy.STAY_WHOLE, deepspeed_strategy._optimizer = 0, sgd
    if torch.optim.SGD not in utils.ZERO_SUPPORTED_OPTIMIZERS:
        utils.ZERO_SUPPORTED_OPTIMIZERS.append(torch.optim.SGD)
    tokenizer, student, teacher, _ = models(config)
    entries = vocabulary_size(tokenizer)
    strategy = DeepSpeedStrategy(config, Distillation(student, config.objective.build(), entries))
    parts = step.Parts(strategy, place(config, teacher, strategy, None), Stored(entries), None, 0)
    gradients, step_once = {}, strategy.step

    def capturing(*arguments):
        if not gradients:
            trained = ((n, p) for n, p in student.named_parameters() if p.requires_grad)
            gradients.update({n: safe_get_full_grad(p).double().clone() for n, p in trained})
        return step_once(*arguments)

    strategy.step = capturing
    for number, examples in enumerate(batches(config, tokenizer), 1):
        _, defect = step.train_step(parts, examples, number, config)
        assert defect is None, defect
    weights = strategy.weights() or {}
    strategy.engine.destroy()
    return gradients, {name: weights[name].double().clone() for name in gradients if name in weights}


def exact_steps(config: Config) -> tuple[dict, dict]:
    """The same on one process, plainly."""
    tokenizer, student, teacher, _ = models(config)
    student, teacher, entries = student.double(), teacher.double(), vocabulary_size(tokenizer)
    trained, gradients = {n: p for n, p in student.named_parameters() if p.requires_grad}, {}
    for examples in batches(config, tokenizer):
        prompts = [one.prompt_ids for one in examples]
        responses = Stored(entries).generate(prompts, config.rollout.max_new_tokens)
        batch = collate(prompts, responses, 0)

        def by_response(model, batch=batch):
            logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[..., :entries]
            return list(logits.flatten(0, 1)[batch.layout.index].split(batch.layout.lengths))

        z_s, z_t, objective = by_response(student), by_response(teacher), config.objective.build()
        if config.objective.name == "GKD":
            loss = reference.gkd([torch.cat(z_s)], [torch.cat(z_t)], objective.beta)  # the mean over all tokens
        else:
            loss = reference.tsd_kd(z_s, z_t, k=objective.k)
        found = dict(zip(trained, torch.autograd.grad(loss, trained.values()), strict=True))
        gradients = gradients or found
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter -= config.optimizer.lr * found[name]
    return gradients, {name: parameter.detach() for name, parameter in trained.items()}


def main(arguments: Sequence[str]) -> None:
    cases, results = arguments
    found = [engine_steps(load_config(recipe, overrides)) for recipe, overrides in json.loads(cases)]
    if distributed.rank() == 0:
        torch.save(found, results)
    distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1:])
