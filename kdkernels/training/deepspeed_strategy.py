"""The strategy of every run: a DeepSpeed engine with ZeRO 0 to 3, AdamW, precision, accumulation and clipping.

Nothing else of the trainer imports DeepSpeed.
"""

import itertools
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found no accelerator

import deepspeed
from deepspeed.runtime.zero import unwrap_model_for_generation
from deepspeed.utils import safe_get_local_fp32_param
from torch import Tensor, nn
from transformers import PreTrainedModel

from kdkernels.data import Batch
from kdkernels.distillation import Distillation
from kdkernels.errors import InputError
from kdkernels.objectives import Output
from kdkernels.sources import Source
from kdkernels.training.processes import distributed
from kdkernels.training.recipe.config import Config

# DeepSpeed would compile an all-reduce for CPU processes on its first use: a minute, a need for ninja, and a lock that
# blocks every later run where that compile was killed. gloo does the same.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
# Of every collective of ZeRO-3, whose torch names DeepSpeed has yet to change.
warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)

# Micro-batches whose gradients bfloat16 can sum: with 32 of them the sum's rounding is .5 %, as much as one product's;
# from 256 on, the sum's last place is as large as what is added.
MOST_IN_BFLOAT16 = 64
# ZeRO-3 leaves weights of at most so many entries whole, norms and biases: gathering them takes long and saves little.
STAY_WHOLE = 10**5
COUNTERS = ("global_steps", "global_samples", "skipped_steps")
# What DeepSpeed and ZeRO add to their optimizer's state that is no number, tensor or text: a loss scale that is 1 for
# float32 and bfloat16, the stage, and where each parameter lies in the flat groups. The recipe gives them again.
DERIVED = ("loss_scaler", "zero_stage", "param_slice_mappings")


class DeepSpeedStrategy:
    """An engine around `module`, whose trainable parameters it optimizes; a `Strategy`.

    Raises InputError if the batch cannot be shared by the processes.
    """

    def __init__(self, config: Config, module: Distillation):
        settings = {
            "train_batch_size": config.train.batch_size,
            "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
            "gradient_accumulation_steps": accumulation_steps(config),
            "gradient_clipping": config.optimizer.max_grad_norm,
            "bf16": {"enabled": config.run.dtype == "bfloat16"},
            "zero_optimization": {
                "stage": config.deepspeed.zero_stage,
                "stage3_param_persistence_threshold": STAY_WHOLE,
            },
        }
        if config.deepspeed.offload_optimizer:
            pinned = torch.cuda.is_available()
            settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": pinned}
            settings["zero_force_ds_cpu_optimizer"] = False  # which needs a compiler; PyTorch's fused AdamW does not
        if config.deepspeed.zero_stage > 0:  # without ZeRO, DeepSpeed adds up in the weights' own precision
            settings["data_types"] = {"grad_accum_dtype": "fp32"}
        join()
        self.engine, *_ = deepspeed.initialize(model=module, optimizer=_optimizer(config, module), config=settings)
        distributed.limit_waiting(config.run.timeout_seconds)
        self._entered = False  # whether `whole` is

    @property
    def module(self) -> Distillation:
        return self.engine.module

    @property
    def device(self) -> torch.device:
        return self.engine.device

    def forward(self, batch: Batch, teacher: Source | None, weights: Tensor | None) -> Output:
        fields = batch.fields(self.module.objective.by_author)
        return self.engine(teacher=teacher, weights=weights, **fields)

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed's own averaging is undone: over processes by the factor, over micro-batches by the option
        self.engine.backward(loss * distributed.world_size(), scale_wrt_gas=False)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # of DeepSpeed's counter of micro-batches

    def step(self, loss: float, lr: float, apply: bool = True) -> tuple[float, str | None]:
        engine, optimizer, norm = self.engine, self.engine.basic_optimizer, None
        for group in optimizer.param_groups:
            group["lr"] = lr
        if not (engine.bfloat16_enabled() or engine.zero_optimization()):
            # a plain optimizer: DeepSpeed clips without keeping the norm. Its gradients are the sums over all processes
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients).item()
        optimizer.skip = not (apply and math.isfinite(loss) and (norm is None or math.isfinite(norm)))
        engine.step()  # which drops gradients that are not finite itself, but for those of a plain optimizer
        if engine.zero_cpu_offload() and not self._in_parts:  # it keeps those, and would add the next step's to them
            engine.optimizer.averaged_gradients = dict.fromkeys(engine.optimizer.averaged_gradients)
        norm = float(engine.get_global_grad_norm()) if norm is None else norm
        defects = {"loss": loss, "gradient norm": norm}
        defect = next((f"the {name} is {value}" for name, value in defects.items() if not math.isfinite(value)), None)
        return norm, defect

    @contextmanager
    def whole(self) -> Iterator[None]:
        if not self._in_parts or self._entered:
            yield
            return
        error, self._entered = None, True
        with unwrap_model_for_generation(self.engine):  # which an error must not pass: its hooks would be lost
            try:
                yield
            except Exception as caught:
                error = caught
        self._entered = False
        if error is not None:
            raise error

    def weights(self, frozen: bool = True) -> dict[str, Tensor] | None:
        first, copies, named = distributed.rank() == 0, {}, self.module.student.state_dict(keep_vars=True)
        if not frozen:
            named = {name: tensor for name, tensor in named.items() if tensor.requires_grad}
        if not self._in_parts:
            return {name: tensor.detach() for name, tensor in named.items()} if first else None
        for tensor in named.values():  # those that are tied have several names and one copy
            if id(tensor) not in copies:
                with deepspeed.zero.GatheredParameters([tensor], enabled=isinstance(tensor, nn.Parameter)):
                    copies[id(tensor)] = tensor.detach().to("cpu", copy=True) if first else None
        return {name: copies[id(tensor)] for name, tensor in named.items()} if first else None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        optimizer = self.engine.basic_optimizer
        if self._in_parts:
            yield from self._parts()
        else:
            yield from self.module.student.state_dict().items()
            for group in optimizer.param_groups:
                yield from (("the optimizer's weights", weight) for weight in group["params"])
        for state in optimizer.state.values():
            yield from ((f"the optimizer's {name}", one) for name, one in state.items() if torch.is_tensor(one))

    @property
    def _in_parts(self) -> bool:
        """Whether each process holds a part of every weight: then the parameters themselves are empty."""
        return self.engine.zero_optimization_partition_weights()

    def _parts(self) -> Iterator[tuple[str, Tensor]]:
        """What this process holds of the weights, without what fills up the last part: nobody has written to that."""
        yield from self.module.student.named_buffers()
        for name, parameter in self.module.student.named_parameters():
            size = parameter.ds_tensor.numel()
            held = min(size, max(0, parameter.ds_numel - size * distributed.rank()))
            yield name, parameter.ds_tensor[:held]
            if parameter.requires_grad:
                yield "the optimizer's weights", safe_get_local_fp32_param(parameter)[:held]

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `Strategy.state`. Not by DeepSpeed's own save_checkpoint: its files can only be read by unpickling
        whatever is in them.
        """
        engine = self.engine
        optimizer = {name: value for name, value in engine.optimizer.state_dict().items() if name not in DERIVED}
        shared = {
            "module": self._shared(),
            "counters": {name: getattr(engine, name) for name in COUNTERS},
        }
        if engine.zero_optimization():
            return shared, {"optimizer": optimizer}
        return shared | {"optimizer": optimizer}, {}

    def load_state(self, shared: dict[str, Any], own: dict[str, Any]) -> None:
        engine = self.engine
        if names := shared["module"].keys() ^ self._shared().keys():
            raise KeyError(f"its weights are others, {min(names)} for instance")
        engine.module.load_state_dict(shared["module"], strict=False)
        if engine.zero_optimization():
            shares = [None] * distributed.world_size()  # each process reads its own share only
            shares[distributed.rank()] = dict(own["optimizer"])
            if self._in_parts:
                shares[distributed.rank()]["loss_scaler"] = engine.optimizer.loss_scaler
            engine.optimizer.load_state_dict(shares, load_from_fp32_weights=True)
        else:
            engine.optimizer.load_state_dict(shared["optimizer"])
        for name in COUNTERS:
            setattr(engine, name, shared["counters"][name])

    def _shared(self) -> dict[str, Tensor]:
        """Weights and buffers of the module that a checkpoint has once for all processes: no weights that are not
        trained, such as those below an adapter, and none that are in parts.
        """
        named = self.module.named_parameters(remove_duplicate=False)
        left_out = {name for name, parameter in named if self._in_parts or not parameter.requires_grad}
        return {name: tensor for name, tensor in self.module.state_dict().items() if name not in left_out}


def saved_weights(student: PreTrainedModel, shared: dict[str, Any], own: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """The weights that are trained and the buffers of `student` in what `DeepSpeedStrategy.state` gave: `own` is of all
    processes.

    ZeRO-3 keeps them as float32 vectors: one a process, of a part of each weight after the other, in the optimizer's
    order; the parts of a weight are equally long, what fills up the last one is dropped.
    """
    prefix = "student."
    found = {name.removeprefix(prefix): one for name, one in shared["module"].items() if name.startswith(prefix)}
    flat = [process.get("optimizer", {}).get("fp32_flat_groups") for process in own]
    if flat[0] is None:
        return found
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    vectors, start = [torch.cat([part.flatten() for part in parts]) for parts in flat], 0
    for parameter in itertools.chain(*_groups(student)):
        size = -(-parameter.numel() // len(vectors))
        whole = torch.cat([vector[start : start + size] for vector in vectors])[: parameter.numel()]
        found[names[id(parameter)]] = whole.view(parameter.shape)
        start += size
    return found


def join() -> None:
    """Tells DeepSpeed of the processes that `distributed.start` joined."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    deepspeed.init_distributed(verbose=False)


def accumulation_steps(config: Config, processes: int | None = None) -> int:
    """Micro-batches per process and step, on as many processes as there are, or as are given. Raises InputError if the
    batch is no multiple of what the processes take at once, or if there are too many to add up.
    """
    processes = processes or distributed.world_size()
    at_once = config.train.micro_batch_size * processes
    if config.train.batch_size % at_once:
        raise InputError(
            f"[train] batch_size: expected a multiple of {at_once} (micro_batch_size {config.train.micro_batch_size} x "
            f"{processes} processes), got {config.train.batch_size}"
        )
    steps = config.train.batch_size // at_once
    in_bfloat16 = config.run.dtype == "bfloat16" and config.deepspeed.zero_stage == 0
    if in_bfloat16 and steps > MOST_IN_BFLOAT16:
        raise InputError(
            f"[deepspeed] zero_stage: expected 1, 2 or 3 for bfloat16 with {steps} micro-batches a step: without ZeRO, "
            f"DeepSpeed adds their gradients up in bfloat16, where sums of more than {MOST_IN_BFLOAT16} lose what is "
            "added; or raise [train] micro_batch_size"
        )
    return steps


def _optimizer(config: Config, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW over the module's trainable parameters, which skips its next step where `skip` is set."""
    decay = (config.optimizer.weight_decay, 0.0)  # none on biases and norms
    groups = [
        {"params": group, "weight_decay": one} for group, one in zip(_groups(module), decay, strict=True) if group
    ]
    fused = True if config.deepspeed.offload_optimizer else None  # PyTorch's choice on GPUs; on CPUs 6 times faster
    optimizer = torch.optim.AdamW(groups, lr=config.optimizer.lr, betas=config.optimizer.betas, fused=fused)
    optimizer.skip = False
    optimizer.register_step_pre_hook(_set_gradients_aside)
    optimizer.register_step_post_hook(_put_gradients_back)
    return optimizer


def _groups(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The trainable parameters: matrices, and vectors."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]


def _set_gradients_aside(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Makes a step of AdamW one of no effect: what has no gradient keeps its value and its moments. DeepSpeed's own
    work around the step goes on as ever.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    optimizer.aside = [(parameter, parameter.grad) for parameter in parameters] if optimizer.skip else []
    for parameter, _ in optimizer.aside:
        parameter.grad = None


def _put_gradients_back(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """They are DeepSpeed's buffers, where the optimizer is offloaded."""
    for parameter, gradient in optimizer.aside:
        parameter.grad = gradient
    optimizer.aside = []
