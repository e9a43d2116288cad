"""The DeepSpeed engine of a run: AdamW, its schedule, precision, accumulation and clipping."""

import math

import deepspeed
import torch
from torch import nn

from kdkernels.training import distributed
from kdkernels.training.config import Config, OptimizerConfig
from kdkernels.training.schema import InputError


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
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: rate(config.optimizer, step, config.train.steps)
    )
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
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=schedule, config=settings)
    return engine


def step_engine(engine) -> float | None:
    """Ends a micro-batch; a step's last one updates the weights. Returns the norm of its gradient before clipping."""
    norm = None
    if engine.is_gradient_accumulation_boundary() and not (engine.bfloat16_enabled() or engine.zero_optimization()):
        # a plain optimizer: DeepSpeed clips without keeping the norm
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    norm = engine.get_global_grad_norm() if norm is None else norm
    return None if norm is None else float(norm)


def accumulation_steps(config: Config) -> int:
    """Micro-batches per process and step. Raises InputError if the batch is no multiple of what the processes take at
    once.
    """
    at_once = config.train.micro_batch_size * distributed.world_size()
    if config.train.batch_size % at_once:
        raise InputError(
            f"[train] batch_size: expected a multiple of {at_once} (micro_batch_size {config.train.micro_batch_size} x "
            f"{distributed.world_size()} processes), got {config.train.batch_size}"
        )
    return config.train.batch_size // at_once


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
