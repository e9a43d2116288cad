"""Gradients of one step of the trainer's engine, and of full logits in fp64: run by test_engine.py, also as a program
under torch.distributed.run, which takes a JSON list of recipes with their overrides and a file for the results.
"""

import copy
import json
import sys
from collections.abc import Sequence

import torch
from deepspeed.utils import safe_get_full_grad

from kdkernels import reference
from kdkernels.data import collate
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.distillation import Distillation
from kdkernels.judges import Judge
from kdkernels.rollouts import LocalSampler
from kdkernels.training import deepspeed_strategy, load_config, step
from kdkernels.training.deepspeed_strategy import DeepSpeedStrategy
from kdkernels.training.inputs import read_examples
from kdkernels.training.models.loading import load_student, load_teacher, load_tokenizer
from kdkernels.training.models.placement import place
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config

EXAMPLES = 8


def models(config: Config):
    """Tokenizer, student in the run's dtype, teacher and examples, the same on every process."""
    tokenizer = load_tokenizer(config)
    torch.manual_seed(config.run.seed)
    student = load_student(config, tokenizer).to(getattr(torch, config.run.dtype))
    teacher = load_teacher(config, tokenizer) if config.teacher and config.teacher.path else None
    examples = read_examples(config.data, config.data.train, tokenizer).usable
    chosen = [examples[i] for i in torch.randperm(len(examples), generator=torch.Generator().manual_seed(1))[:EXAMPLES]]
    return tokenizer, student, teacher, chosen


def engine_gradients(config: Config, judge: Judge | None = None) -> dict[str, torch.Tensor | float]:
    """name -> gradient before clipping of one step on the examples; "norm": what the trainer logs."""
    distributed.start()
    tokenizer, student, teacher, examples = models(config)
    strategy = DeepSpeedStrategy(config, Distillation(student, config.objective.build(), vocabulary_size(tokenizer)))
    parts = step.Parts(
        strategy,
        place(config, teacher, strategy, tokenizer),
        LocalSampler(student, tokenizer),
        judge,
        tokenizer.eos_token_id,
    )
    found, step_once = {}, strategy.step

    def capturing(*arguments):
        trained = ((n, p) for n, p in student.named_parameters() if p.requires_grad)
        found.update({n: safe_get_full_grad(p).double().clone() for n, p in trained})
        return step_once(*arguments)

    strategy.step = capturing
    try:
        metrics, defect = step.train_step(parts, examples, 1, config)
    finally:
        strategy.engine.destroy()
    assert defect is None, defect
    return found | {"norm": metrics["gradient_norm"]}


def exact_gradients(config: Config, judge: Judge | None = None) -> dict[str, torch.Tensor]:
    """The same from the papers' formulas on full logits, all in fp64."""
    tokenizer, student, teacher, examples = models(config)
    student = copy.deepcopy(student).double()
    entries = vocabulary_size(tokenizer)
    batch = collate([one.prompt_ids for one in examples], [one.response_ids for one in examples], 0, from_teacher=True)

    def by_response(values):
        return list(values.flatten(0, 1)[batch.layout.index].split(batch.layout.lengths))

    def logits(model):
        z = model.double()(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[..., :entries]
        return by_response(z)

    z_s, name = logits(student), config.objective.name
    if name == "SFT":
        loss = reference.sft(z_s, by_response(batch.target))
    else:
        with torch.no_grad():
            z_t = logits(teacher)
        objective = config.objective.build()
        weights = by_response(judge(batch).double()) if judge else None
        loss = {
            "GKD": lambda: reference.gkd(z_s, z_t, objective.beta),
            "TSDKD": lambda: reference.tsd_kd(z_s, z_t, k=objective.k),
            "DistiLLM2": lambda: reference.distillm2(z_s, z_t, [True] * len(z_s)),
            "VCRD": lambda: reference.vcrd(z_s, z_t, [True] * len(z_s), weights),
        }[name]()
    loss.backward()
    return {name: parameter.grad for name, parameter in student.named_parameters() if parameter.requires_grad}


def main(arguments: Sequence[str]) -> None:
    cases, results = arguments
    deepspeed_strategy.STAY_WHOLE = 0  # weights as small as these are in parts too
    found = [engine_gradients(load_config(recipe, overrides)) for recipe, overrides in json.loads(cases)]
    if distributed.rank() == 0:
        torch.save(found, results)
    distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1:])
