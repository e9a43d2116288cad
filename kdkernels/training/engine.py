"""The DeepSpeed engine of a run: AdamW, its learning rate, precision, accumulation and clipping."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import deepspeed
import torch
from torch import nn

from kdkernels.errors import InputError
from kdkernels.training import distributed
from kdkernels.training.config import Config, OptimizerConfig

# Micro-batches whose gradients bfloat16 can sum: with 32 of them the sum's rounding is .5 %, as much as one product's;
# from 256 on, the sum's last place is as large as what is added.
MOST_IN_BFLOAT16 = 64
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# What DeepSpeed and ZeRO add to their optimizer's state that is no number, tensor or text: a loss scale that is 1 for
# float32 and bfloat16, the stage, and where each parameter lies in the flat groups. The recipe gives them again.
DERIVED = ("loss_scaler", "zero_stage", "param_slice_mappings")


def build_engine(config: Config, module: nn.Module):
    """The engine around `module`, whose trainable parameters it optimizes. Raises InputError if the batch cannot be
    shared by the processes.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.optimizer.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},  # biases and norms
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=config.optimizer.lr, betas=config.optimizer.betas)
    optimizer.skip = False
    optimizer.register_step_pre_hook(_drop_gradients)
    settings = {
        "train_batch_size": config.train.batch_size,
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation_steps(config),
        "gradient_clipping": config.optimizer.max_grad_norm,
        "bf16": {"enabled": config.run.dtype == "bfloat16"},
        "zero_optimization": {"stage": config.deepspeed.zero_stage},
    }
    if config.deepspeed.zero_stage > 0:  # without ZeRO, DeepSpeed adds up in the weights' own precision
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    distributed.limit_waiting(config.run.timeout_seconds)
    return engine


def update(engine, loss: float, apply: bool = True) -> tuple[float, str | None]:
    """The update after a step's last micro-batch, and the norm of its gradient before clipping.

    Where `loss` (the step's, of all processes) or the norm is not finite, the second value says so: weights and
    optimizer state then stay as they were, on all processes. apply=False leaves them in any case.
    """
    norm = None
    if not (engine.bfloat16_enabled() or engine.zero_optimization()):
        # a plain optimizer: DeepSpeed clips without keeping the norm. Its gradients are the sums over all processes
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).item()
    engine.basic_optimizer.skip = not (apply and math.isfinite(loss) and (norm is None or math.isfinite(norm)))
    engine.step()  # which drops gradients that are not finite itself, but for those of a plain optimizer
    norm = float(engine.get_global_grad_norm()) if norm is None else norm
    defects = {"loss": loss, "gradient norm": norm}
    return norm, next((f"the {name} is {value}" for name, value in defects.items() if not math.isfinite(value)), None)


def _drop_gradients(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Makes a step of AdamW one of no effect: what has no gradient keeps its value and its moments. DeepSpeed's own
    work around the step goes on as ever.
    """
    if optimizer.skip:
        optimizer.zero_grad(set_to_none=True)


def nonfinite(engine) -> str | None:
    """The name of a weight, buffer or optimizer state of the student that is not finite on some process; all processes
    call this together. (The objective's buffers may say NaN for what it has not seen yet.)
    """
    groups, states = engine.basic_optimizer.param_groups, engine.basic_optimizer.state.values()
    own = first_nonfinite(
        itertools.chain(
            engine.module.student.state_dict().items(),
            (("the optimizer's weights", weight) for group in groups for weight in group["params"]),
            (
                (f"the optimizer's {name}", one)
                for state in states
                for name, one in state.items()
                if torch.is_tensor(one)
            ),
        )
    )
    return next((name for name in distributed.gathered(own) if name is not None), None)


def first_nonfinite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first of the named `tensors` that holds a NaN or an infinity."""
    for name, tensor in tensors:
        # the largest magnitude is NaN if any value is, and needs no memory
        measurable = tensor.is_floating_point() and tensor.numel() > 0
        if measurable and not torch.linalg.vector_norm(tensor.detach(), ord=math.inf).isfinite():
            return name
    return None


def accumulation_steps(config: Config) -> int:
    """Micro-batches per process and step. Raises InputError if the batch is no multiple of what the processes take at
    once, or if there are too many to add up.
    """
    at_once = config.train.micro_batch_size * distributed.world_size()
    if config.train.batch_size % at_once:
        raise InputError(
            f"[train] batch_size: expected a multiple of {at_once} (micro_batch_size {config.train.micro_batch_size} x "
            f"{distributed.world_size()} processes), got {config.train.batch_size}"
        )
    steps = config.train.batch_size // at_once
    in_bfloat16 = config.run.dtype == "bfloat16" and config.deepspeed.zero_stage == 0
    if in_bfloat16 and steps > MOST_IN_BFLOAT16:
        raise InputError(
            f"[deepspeed] zero_stage: expected 1 or 2 for bfloat16 with {steps} micro-batches a step: without ZeRO, "
            f"DeepSpeed adds their gradients up in bfloat16, where sums of more than {MOST_IN_BFLOAT16} lose what is "
            "added; or raise [train] micro_batch_size"
        )
    return steps


def set_rate(engine, config: Config, step: int) -> float:
    """Gives the optimizer the learning rate of `step` (1, 2, ...), whatever became of those before it; that rate."""
    lr = config.optimizer.lr * rate(config.optimizer, step - 1, config.train.steps)
    for group in engine.basic_optimizer.param_groups:
        group["lr"] = lr
    return lr


def rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step 0 ... steps-1 as a share of the peak: a linear rise, then constant or half a cosine
    towards 0.
    """
    warmup = math.ceil(config.warmup_ratio * steps)
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant" or step >= steps:
        return 1.0 if config.schedule == "constant" else 0.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def engine_state(engine) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what all processes have alike, what this one has of its own) of the engine's state after a whole step: plain
    containers of tensors, numbers and text.

    Not by DeepSpeed's own save_checkpoint: its files can only be read by unpickling whatever is in them.
    """
    optimizer = {name: value for name, value in engine.optimizer.state_dict().items() if name not in DERIVED}
    shared = {
        "module": engine.module.state_dict(),
        "counters": {name: getattr(engine, name) for name in COUNTERS},
    }
    return (shared, {"optimizer": optimizer}) if engine.zero_optimization() else (shared | {"optimizer": optimizer}, {})


def load_engine_state(engine, shared: dict[str, Any], own: dict[str, Any]) -> None:
    """Puts the engine back to what `engine_state` gave. Raises whatever torch and DeepSpeed do for a state of another
    engine.
    """
    engine.module.load_state_dict(shared["module"])
    if engine.zero_optimization():
        shares = [None] * distributed.world_size()  # each process reads its own share only
        shares[distributed.rank()] = own["optimizer"]
        engine.optimizer.load_state_dict(shares, load_from_fp32_weights=True)
    else:
        engine.optimizer.load_state_dict(shared["optimizer"])
    for name in COUNTERS:
        setattr(engine, name, shared["counters"][name])
