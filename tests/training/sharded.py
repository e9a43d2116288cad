"""Heads read from sharded weights, on two processes with tokens of their own: run by test_sharded.py as a program under
torch.distributed.run, with a file for the results.

Each case is a small transformers model under a wrapper. Loss and gradients of some steps are compared with those of
the same model alone, with full logits in fp64 on the tokens of both processes.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from tempfile import TemporaryDirectory
from typing import NamedTuple

from kdkernels.training import deepspeed_strategy  # before anything else of DeepSpeed: it says on what

import deepspeed  # isort: skip
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleOutput,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

import kdkernels as kd
from kdkernels import reference

ROWS, LENGTH, HIDDEN, WORDS, ENTRIES = 4, 8, 16, 61, 59  # an odd number of rows, of which two are padding
SPLITS = {  # how many tokens each response has: the first two are of the first process
    "even": (5, 4, 5, 4),
    "uneven": (6, 1, 6, 6),
    "one without": (4, 6, 0, 0),
}


def causal_lm(tied: bool = False, bias: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = dict(vocab_size=WORDS, hidden_size=HIDDEN, intermediate_size=24, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, tie_word_embeddings=tied))
    if bias:
        model.lm_head.bias = nn.Parameter(torch.randn(WORDS))
    return model


def with_lora() -> nn.Module:
    """LoRA on the output layer and on a projection, both matrices trained and not zero."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    model = get_peft_model(causal_lm(), LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head", "q_proj"])).base_model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.model


def batch(split: str, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids [B, L], the teacher's logits [B, L, V] and mask [B, L] of both processes."""
    generator = torch.Generator().manual_seed(4 + step)
    ids = torch.randint(0, ENTRIES, (ROWS, LENGTH), generator=generator)
    logits = torch.randn(ROWS, LENGTH, ENTRIES, generator=generator) * 2
    return ids, logits, torch.arange(LENGTH) < torch.tensor(SPLITS[split])[:, None]


class Step(nn.Module):
    """Student and loss in one module: what is wrapped."""

    def __init__(self, model: nn.Module, through_logits: bool = False):
        super().__init__()
        self.model, self.through_logits = model, through_logits

    def hidden(self, ids: Tensor) -> Tensor:
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state

    def forward(self, ids: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
        if self.through_logits:  # what a user would write without a kd.Head
            return exact(self.model(input_ids=ids, use_cache=False).logits, logits, mask)
        return divergence(kd.Head.from_model(self.model, self.hidden(ids), vocab_size=ENTRIES), logits, mask)


def divergence(head: kd.Head, logits: Tensor, mask: Tensor) -> Tensor:
    """The mean over the responses, 0 without any."""
    return kd.GKD(beta=0.3)(head, kd.Logits(logits), mask).loss


def exact(z: Tensor, logits: Tensor, mask: Tensor) -> Tensor:
    """The same from full logits [B, L, V] in fp64."""
    rows = [i for i, n in enumerate(mask.sum(1).tolist()) if n]
    if not rows:
        return z.sum() * 0.0
    return reference.gkd(*([x[i][mask[i], :ENTRIES].double() for i in rows] for x in (z, logits)), 0.3)


@dataclass
class Case:
    """One wrapper, the model inside it, and the tokens that it is given."""

    wrap: Callable[[Step], Callable]
    model: Callable[[], nn.Module] = causal_lm
    split: str = "even"
    steps: int = 1  # micro-batches whose gradients add up
    together: bool = False  # both processes have all tokens, as a tensor-parallel group has
    outside: bool = False  # the head is read outside the wrapped forward
    in_bf16: bool = False  # compared with the error of the model's own logits in the same wrapper
    times: float = 1.0  # what the wrapper was told to multiply the mean gradient with


def reference_of(case: Case) -> dict[str, Tensor]:
    """Loss and gradients of one process that has all tokens: the mean of what each process's responses give."""
    model, loss = case.model().double(), 0.0
    for step in range(case.steps):
        ids, logits, mask = batch(case.split, step)
        parts = [slice(0, 4)] if case.together else [slice(0, 2), slice(2, 4)]
        for here in parts:
            loss = loss + exact(model(input_ids=ids[here]).logits, logits[here], mask[here]) / len(parts)
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad * case.times for name, p in model.named_parameters() if p.requires_grad
    }


def found(case: Case, through_logits: bool = False) -> dict[str, Tensor]:
    """The same from both processes under the wrapper."""
    module = Step(case.model(), through_logits)
    wrapped, total = case.wrap(module), 0.0
    for step in range(case.steps):
        here = slice(0, 4) if case.together else slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
        ids, logits, mask = (x[here] for x in batch(case.split, step))
        if case.outside:
            hidden = wrapped.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[-1]
            loss = divergence(kd.Head.from_model(wrapped.model, hidden, vocab_size=ENTRIES), logits, mask)
        else:
            if hasattr(wrapped, "set_requires_gradient_sync"):
                wrapped.set_requires_gradient_sync(step == case.steps - 1)
            loss = wrapped(ids, logits, mask)
        wrapped.backward(loss) if hasattr(wrapped, "backward") else loss.backward()
        total = total + loss.detach().double() / 2
    dist.all_reduce(total)
    out = {"loss": total}
    for name, p in module.model.named_parameters():
        if not p.requires_grad:
            continue
        gradient = safe_get_full_grad(p) if hasattr(p, "ds_id") else p.grad
        out[name] = (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).detach().double().clone()
    return out


# ---- the wrappers ----


def fsdp2(
    own: bool = False, tail: bool = False, mesh: tuple[int, int] | None = None, inner: bool = False,
    divide: float | None = None, bf16: bool = False, reshard: bool | None = None,
) -> Callable[[Step], Callable]:  # fmt: skip
    """own: lm_head is a unit of its own; tail: one with the last norm, as accelerate has it; inner: the model, not
    the step, is the root.
    """

    def wrap(step: Step) -> Callable:
        options = {"mesh": dist.init_device_mesh("cpu", mesh, mesh_dim_names=("copies", "shards"))} if mesh else {}
        if bf16:
            options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if own:
            fully_shard(step.model.lm_head, **options)
        if tail:
            tied = [step.model.model.embed_tokens] if step.model.config.tie_word_embeddings else []
            fully_shard([step.model.model.norm, *tied, step.model.lm_head], reshard_after_forward=False, **options)
        if inner:  # only the model's own modules are in the units that a head sees
            fully_shard(step.model, reshard_after_forward=reshard, **options)
            return step
        fully_shard(step.model.model.layers[0], **options)
        fully_shard(step, reshard_after_forward=reshard, **options)
        if divide is not None:
            for module in step.modules():
                if hasattr(module, "set_gradient_divide_factor"):
                    module.set_gradient_divide_factor(divide)
                    module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        return step

    return wrap


def zero3(step: Step) -> Callable:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},  # else small weights stay whole
    }
    engine, *_ = deepspeed.initialize(model=step, optimizer=torch.optim.AdamW(step.parameters()), config=config)
    assert step.model.lm_head.weight.numel() == 0, "the weights are in pieces"
    return engine


def tensor_parallel(sequence: bool = False, fsdp: tuple[int, int] | None = None) -> Callable[[Step], Callable]:
    """sequence: the layer before gives each process a part of the positions; fsdp: the sizes of a mesh of both."""

    def wrap(step: Step) -> Callable:
        mesh = dist.init_device_mesh("cpu", fsdp or (1, 2), mesh_dim_names=("data", "tensor"))
        plan = {"lm_head": ColwiseParallel(output_layouts=Replicate())}
        if sequence:
            plan["model.norm"] = PrepareModuleOutput(output_layouts=Replicate(), desired_output_layouts=Shard(1))
            plan["lm_head"] = ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())
        parallelize_module(step.model, mesh["tensor"], plan)
        if fsdp:
            fully_shard(step, mesh=mesh["data"])
        return step

    return wrap


def planned_by_transformers(step: Step) -> Callable:
    """The model's own plan, tp_plan="auto": its weights are read from files."""
    with TemporaryDirectory() as folder:
        folders = [folder]
        dist.broadcast_object_list(folders)
        step.model.save_pretrained(folders[0])  # by the first process
        dist.barrier()
        step.model = type(step.model).from_pretrained(folders[0], tp_plan="auto", dtype=torch.float32)
        dist.barrier()
    assert isinstance(step.model.lm_head.weight, DTensor)
    return step


def without_bias() -> nn.Module:
    return causal_lm(bias=False)


def tied() -> nn.Module:
    return causal_lm(tied=True, bias=False)


CASES = {
    "root": Case(fsdp2(), split="one without", steps=2),
    "own unit, accumulated": Case(fsdp2(own=True), steps=2),
    "own unit, uneven": Case(fsdp2(own=True), split="uneven"),
    "own unit, one without tokens": Case(fsdp2(own=True), split="one without"),
    "tail": Case(fsdp2(tail=True), steps=2),
    "tied": Case(fsdp2(), tied),
    "tied tail": Case(fsdp2(tail=True), tied),
    "copies": Case(fsdp2(own=True, mesh=(2, 1)), steps=2),
    "own unit, sums": Case(fsdp2(own=True, divide=1.0), times=2.0),
    "outside, resharded": Case(fsdp2(inner=True, reshard=True), outside=True),
    "outside, gathered": Case(fsdp2(inner=True), outside=True),
    "outside, own unit": Case(fsdp2(inner=True, own=True), outside=True, split="one without"),
    "root in bf16": Case(fsdp2(bf16=True), in_bf16=True),
    "own unit in bf16": Case(fsdp2(own=True, bf16=True), in_bf16=True),
    "own unit, LoRA": Case(fsdp2(own=True), with_lora),
    "tensor parallel": Case(tensor_parallel(), together=True, split="uneven", steps=2),
    "tensor parallel, sequence too": Case(tensor_parallel(sequence=True), together=True),
    "tensor parallel, FSDP2 of one": Case(tensor_parallel(fsdp=(1, 2)), together=True),
    "tensor parallel of one, FSDP2": Case(tensor_parallel(fsdp=(2, 1)), split="one without"),
    "tensor parallel, transformers": Case(planned_by_transformers, without_bias, together=True),
    "tensor parallel, transformers, tied": Case(planned_by_transformers, tied, together=True),
    "ZeRO-3, uneven": Case(zero3, split="uneven"),
    "ZeRO-3, tied, one without tokens": Case(zero3, tied, split="one without"),
}


class Error(NamedTuple):
    """Of a loss or a gradient: the relative errors of ours and of eager PyTorch, and the size of what is right."""

    ours: float
    eager: float
    size: float


def errors(case: Case) -> dict[str, Error]:
    """name -> how far it is from fp64; the loss is among them."""
    expected, ours = reference_of(case), found(case)
    eager = found(case, through_logits=True) if case.in_bf16 else expected
    out = {}
    for name, right in expected.items():
        size = right.norm().item()
        out[name] = Error(*((each[name] - right).norm().item() / size for each in (ours, eager)), size)
    return out


# ---- what is refused ----


def head_of(step: Step) -> kd.Head:
    return kd.Head.from_model(step.model, torch.zeros(2, HIDDEN))


def frozen_trunk() -> None:
    """The gradient of a weight that is still gathered after the forward would stay in what is thrown away."""
    step = fsdp2(inner=True)(Step(causal_lm()))
    step.model.requires_grad_(False)
    step.model.lm_head.requires_grad_(True)
    ids = batch("even", 0)[0]
    hidden = step.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
    assert not isinstance(step.model.lm_head.weight, DTensor)
    kd.Head.from_model(step.model, hidden)


def of_both() -> None:
    """A weight that tensor parallelism and FSDP2 have both cut."""
    mesh = dist.init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
    step = Step(causal_lm())
    parallelize_module(step.model, mesh["tensor"], {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    fully_shard(step.model, mesh=mesh["data"])
    head_of(step)


def planned(style: ParallelStyle, words: int = WORDS) -> None:
    step = Step(causal_lm())
    step.model.resize_token_embeddings(words)
    parallelize_module(step.model, dist.init_device_mesh("cpu", (2,)), {"lm_head": style})
    head_of(step)


def cut(placement: Placement) -> Tensor:
    return nn.Parameter(distribute_tensor(torch.zeros(WORDS, HIDDEN), dist.init_device_mesh("cpu", (2,)), [placement]))


def unknown() -> None:
    """Nothing of FSDP2 or of a plan in sight: the step, not the model, is what fully_shard was called with."""
    step = Step(causal_lm())
    fully_shard(step)
    head_of(step)


@cache
def zero_step() -> Step:
    step = Step(causal_lm())
    zero3(step)
    return step


def outlived_zero3() -> None:
    """A head that was read while ZeRO-3 had the weight, and used when it had no more."""
    layer = zero_step().model.lm_head
    with deepspeed.zero.GatheredParameters([layer.weight, layer.bias]):
        head = head_of(zero_step())
    kd.entropy(head)


def outlived_fsdp2() -> None:
    """The same where FSDP2 gathers anew for each forward."""
    step = fsdp2(inner=True, reshard=True)(Step(causal_lm()))
    heads = []
    step.model.register_forward_hook(
        lambda *_: heads.append(kd.Head(torch.zeros(2, HIDDEN), step.model.lm_head.weight)), prepend=True
    )
    step.model(input_ids=batch("even", 0)[0])
    kd.entropy(heads[0])


REFUSED = {
    "bare": lambda: kd.Head(torch.zeros(2, HIDDEN), cut(Shard(0))),
    "bare bias": lambda: kd.Head(torch.zeros(2, HIDDEN), torch.zeros(WORDS, HIDDEN), cut(Shard(0))[:, 0]),
    "hidden": lambda: kd.Head(cut(Shard(0)), torch.zeros(WORDS, HIDDEN)),
    "full tensor": lambda: kd.Head(torch.zeros(2, HIDDEN), cut(Shard(0)).full_tensor()),
    "full tensor, cast": lambda: kd.Head(
        torch.zeros(2, HIDDEN).bfloat16(), cut(Shard(1)).full_tensor().bfloat16()[:ENTRIES]
    ),
    "full bias": lambda: kd.Head(
        torch.zeros(2, HIDDEN), torch.zeros(WORDS, HIDDEN), cut(Shard(0)).full_tensor().sum(1)
    ),
    "unknown": unknown,
    "frozen trunk": frozen_trunk,
    "shard alone": lambda: kd.Head(torch.zeros(2, HIDDEN), cut(Shard(0)).to_local()),
    "columns": lambda: planned(RowwiseParallel()),
    "no row": lambda: planned(ColwiseParallel(), words=1),
    "FSDP2 and plan": of_both,
    "ZeRO-3 outside": lambda: head_of(zero_step()),
    "ZeRO-3 outlived": outlived_zero3,
    "FSDP2 outlived": outlived_fsdp2,
}


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(results: str) -> None:
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # a hang is an error
    deepspeed_strategy.join()
    compared = {name: errors(case) for name, case in CASES.items()}
    refused = {name: refusal(call) for name, call in REFUSED.items()}
    compared = {case: {name: tuple(error) for name, error in each.items()} for case, each in compared.items()}
    torch.save((compared, refused), f"{results}.{dist.get_rank()}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    main(sys.argv[1])
