"""Gradients of one step on stored responses with stored weights, by the trainer's engine, and from the paper's formulas
on full logits in fp64: run by test_offline.py, also as a program under torch.distributed.run, which takes a JSON list
of recipes with their overrides and a file for the results.
"""

import copy
import json
import sys
from collections.abc import Sequence

import torch
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import load_file

from kdkernels import reference
from kdkernels.data import Example, collate
from kdkernels.data.tokenizers import vocabulary_size
from kdkernels.distillation import Distillation
from kdkernels.judges import ValueHead
from kdkernels.rollouts import LocalSampler
from kdkernels.training import load_config, step
from kdkernels.training.deepspeed_strategy import DeepSpeedStrategy
from kdkernels.training.inputs import read_inputs
from kdkernels.training.models.loading import load_student, load_teacher
from kdkernels.training.models.placement import place
from kdkernels.training.offline.rollout import rollout
from kdkernels.training.offline.scores import read_judge
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config
from kdkernels.training.run.identity import identify, sources


def stored(config: Config):
    """The inputs of a run and the examples of a step of it: the responses to some prompts."""
    inputs = read_inputs(config, config.objective.build(), None, identify(sources(config, None)))
    half = config.train.batch_size // 2
    teachers, students = inputs.examples.usable[::2][3 : 3 + half], inputs.examples.usable[1::2][3 : 3 + half]
    return inputs, [*teachers, *students]


def engine_gradients(config: Config) -> dict[str, torch.Tensor | float]:
    """name -> gradient before clipping of one step; "norm", "loss": what the trainer logs."""
    distributed.start()
    inputs, examples = stored(config)
    tokenizer, judge = inputs.tokenizer, read_judge(config, inputs.examples)
    student, teacher = load_student(config, tokenizer), load_teacher(config, tokenizer)
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
        found.update({n: safe_get_full_grad(p).double().clone() for n, p in student.named_parameters()})
        return step_once(*arguments)

    strategy.step = capturing
    try:
        metrics, defect = step.train_step(parts, examples, 1, config)
    finally:
        strategy.engine.destroy()
    assert defect is None, defect
    assert {"teacher_length", "student_length"} <= metrics.keys()
    return found | {"norm": metrics["gradient_norm"], "loss": metrics["loss"]}


def exact_scores(config: Config, examples: Sequence[Example]) -> dict[tuple[Example, str], torch.Tensor]:
    """(response, model) -> r(c, a) of that model's proposals [n] in fp64, each by a forward of its own."""
    scorer = ValueHead.load(config.judge.path, torch.float64, torch.device("cpu"))

    def r(prefix, token):
        hidden = scorer.backbone(torch.tensor([[*prefix, token]])).last_hidden_state[0, -1]
        return torch.sigmoid(hidden @ scorer.weight.double() + scorer.bias.double())

    inputs, _ = stored(config)
    proposals, scores = {}, {}
    for first, author in enumerate(("teacher", "student")):
        own = inputs.examples.usable[first::2]
        files = sorted((config.judge.output + f"/proposals-{author}-{i:05d}.safetensors") for i in range(7))
        drawn = torch.cat([load_file(file)["proposals"] for file in files])
        proposals |= dict(zip(own, drawn.split([len(one.response_ids) for one in own]), strict=True))
    with torch.no_grad():
        for one in examples:
            prefixes = [[*one.prompt_ids, *one.response_ids[:t]] for t in range(len(one.response_ids))]
            mine, other = ("teacher", "student") if one.from_teacher else ("student", "teacher")
            for model, tokens in ((mine, one.response_ids), (other, proposals[one].tolist())):
                scores[one, model] = torch.stack([r(c, a) for c, a in zip(prefixes, tokens, strict=True)])
    return scores


def exact(config: Config) -> dict[str, torch.Tensor]:
    """As `engine_gradients`, from the paper's formulas on full logits, all in fp64."""
    inputs, examples = stored(config)
    tokenizer = inputs.tokenizer
    student = copy.deepcopy(load_student(config, tokenizer)).double()
    teacher = load_teacher(config, tokenizer).double()
    batch = collate([one.prompt_ids for one in examples], [one.response_ids for one in examples], 0)
    entries = vocabulary_size(tokenizer)

    def by_response(values):
        return list(values.flatten(0, 1)[batch.layout.index].split(batch.layout.lengths))

    z_s = by_response(student(**batch.inputs).logits[..., :entries])
    with torch.no_grad():
        z_t = by_response(teacher(**batch.inputs).logits[..., :entries])
    weights, options = None, config.objective.options
    if options["weighting"] == "given":
        scores = exact_scores(config, examples)
        weights = [
            reference.validity_weights(scores[one, "student"], scores[one, "teacher"], config.judge.rule)
            for one in examples
        ]
    authors = [one.from_teacher for one in examples]
    loss = reference.vcrd(
        z_s, z_t, authors, weights, options["alpha"], options["lambda_teacher"], options["lambda_student"]
    )
    loss.backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()} | {"loss": loss.item()}


def main(arguments: Sequence[str]) -> None:
    cases, results = arguments
    configs = [load_config(recipe, overrides) for recipe, overrides in json.loads(cases)]
    rollout(configs[0])
    found = [engine_gradients(config) for config in configs]
    if distributed.rank() == 0:
        torch.save(found, results)
    distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[1:])
