"""The seconds of a step on one GPU, by phase: products at the rate that large ones reach, bytes at that of the memory
(engine/gpu.py has both, as shares of the data sheet's).

    pass          flops / rate + 2 written / bandwidth: every tensor is written once and read once
    rollout       R tokens, each the longer of reading weights and KV cache, and of 2 B weights operations; one that
                  several steps share counts in parts; what another engine than the student takes is left out
    loss          engine/predict.py, of a JSD
    optimizer     80 n bytes: AdamW's nine operations over weights, gradients and moments; an offloaded one is left out

Lower bounds: launches, waiting for the other processes and what they send each other come on top. `generate` of
transformers launches each layer's kernels anew for every token, which takes several times as long for small models.

Axes: R response tokens, B responses of a process's step, n trained weights of a process.
"""

from kdkernels.training.plan.activations import Pass
from kdkernels.training.plan.memory import Load

OPTIMIZER_BYTES = 80  # a weight


def seconds(load: Load, student: Pass, teacher: Pass | None) -> dict[str, float]:
    """Of each phase of a step at the recipe's longest lengths; the GPU of `load` is known."""
    rollout, times = load.config.rollout, load.micro_batches
    writes = rollout.student_fraction > 0 and rollout.engine == "transformers"
    out = {"rollout": rollout.student_fraction * _rollout(load) / rollout.updates} if writes else {}
    if teacher is not None:
        out["teacher"] = times * _pass(load, teacher)
    out |= {"student": times * _pass(load, student), "loss": times * load.loss.seconds()}
    if not load.config.deepspeed.offload_optimizer:
        out["optimizer"] = OPTIMIZER_BYTES * load.own / load.gpu.bandwidth
    return out


def _pass(load: Load, one: Pass) -> float:
    return (one.flops + one.backward_flops) / load.gpu.flops + 2 * one.written / load.gpu.bandwidth


def _rollout(load: Load) -> float:
    count, new = load.at_once, load.config.rollout.max_new_tokens
    weights = sum(one.numel() for one in load.student.parameters())
    cached = count * (load.prompt + new / 2) * load.cached  # on average
    moved = (weights * load.width + cached) / load.gpu.bandwidth
    computed = 2 * count * weights / load.gpu.flops
    return _pass(load, load.prompts_pass) + new * max(moved, computed)
