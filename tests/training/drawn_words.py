"""Teachers known at words that they drew, through kd.Distillation under DDP and FSDP2: a program under
torch.distributed.run, for two processes with two micro-batches each, whose responses have unequal lengths.

Prints for each case how far the averaged gradients are from full logits in fp64 (relative, the worst parameter), and
how far plain PyTorch on full logits in the case's own dtype is.
"""

import copy
import json

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import kdkernels as kd
from kdkernels import reference

ENTRIES, K, LENGTH, MICRO_BATCHES = 64, 12, 9, 4


def causal_lm(dtype: torch.dtype) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = dict(vocab_size=ENTRIES, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, initializer_range=0.2)).to(dtype)


def batches() -> list[tuple[torch.Tensor, torch.Tensor, kd.TopK]]:
    """Ids, labels and the teacher of each micro-batch."""
    generator, found = torch.Generator().manual_seed(1), []
    for number in range(MICRO_BATCHES):
        ids = torch.randint(0, ENTRIES, (2, LENGTH), generator=generator)
        labels = ids.clone()
        labels[:, :3] = -100
        labels[1, 5 + number :] = -100
        logits = 3 * torch.randn(2, LENGTH, ENTRIES, generator=generator)
        found.append((ids, labels, kd.TopK.sample(kd.Logits(logits), K, generator=generator)))
    return found


def wrapped(model: LlamaForCausalLM, kind: str) -> torch.nn.Module:
    module = kd.Distillation(model, kd.GKD(beta=0.5), vocab_size=ENTRIES)
    if kind == "ddp":
        return DistributedDataParallel(module)
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(module)


def gradients(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    found = {name: each.grad for name, each in model.named_parameters()}
    return {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).double() for name, each in found.items()
    }


def of_full_logits(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    for ids, labels, teacher in batches():
        layout = kd.Layout.from_labels(labels)
        z = model(input_ids=ids).logits.flatten(0, 1)[layout.index].double()
        drawn, log_p = (one.flatten(0, 1)[layout.index] for one in (teacher.indices, teacher.log_probs))
        values = reference.sampled_divergence(z, drawn, log_p.double(), kd.JSD(0.5))
        ((layout.sums(values) / torch.tensor(layout.lengths)).mean() / MICRO_BATCHES).backward()
    return gradients(model)


def worst(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert min(each.norm() for each in exact.values()) > 0
    return max(float((found[name] - exact[name]).norm() / exact[name].norm()) for name in exact)


def case(dtype: torch.dtype, kind: str) -> tuple[float, float]:
    model = causal_lm(dtype)
    exact, plain = of_full_logits(copy.deepcopy(model).double()), of_full_logits(copy.deepcopy(model))
    module = wrapped(model, kind)
    own = slice(dist.get_rank(), None, 2)
    for ids, labels, teacher in batches()[own]:
        (module(input_ids=ids, labels=labels, teacher=teacher).loss / (MICRO_BATCHES // 2)).backward()
    return worst(gradients(model), exact), worst(plain, exact)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    cases = [(dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in ("ddp", "fsdp2")]
    told = {f"{dtype} {kind}": case(dtype, kind) for dtype, kind in cases}
    if dist.get_rank() == 0:
        print("errors " + json.dumps(told), flush=True)
    dist.destroy_process_group()
