"""A teacher of which every process holds a part of each weight, gathered layer by layer while it scores."""

from collections.abc import Callable
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from kdkernels import through
from kdkernels.training import deepspeed_strategy
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config

T = TypeVar("T")


def sharded(model: PreTrainedModel, config: Config) -> Callable[[Callable[[], T]], T]:
    """Divides the weights of a frozen model among the processes (ZeRO-3 without an optimizer). A function that is given
    to what this returns runs inside the engine's forward, where each layer's weights are gathered for as long as they
    are used. All processes have to do so equally often.
    """
    settings = {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": deepspeed_strategy.STAY_WHOLE},
    }
    deepspeed_strategy.join()
    engine, *_ = deepspeed_strategy.deepspeed.initialize(model=model, config=settings)
    distributed.limit_waiting(config.run.timeout_seconds)

    def present(function: Callable[[], T]) -> T:
        found = []  # of any kind: what an engine's forward returns is searched for tensors
        through(engine, lambda: found.append(function()))
        return found[0]

    return present
