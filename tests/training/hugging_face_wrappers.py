"""A transformers model under everything that wraps one for training, two processes with half the batch each, one step
of SGD: run by test_wrappers.py as a program under torch.distributed.run, with which cases ("few" or "more") and a file
for the results.

The losses are those of kd.through and of kd.Distillation; the tokens are spread unevenly, or all in one process.
"""

import gc
import os
import sys
from contextlib import nullcontext
from functools import partial

from kdkernels.training import deepspeed_strategy  # before anything else of DeepSpeed: it says on what
from kdkernels.training.processes import distributed

import deepspeed  # isort: skip
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2ForCausalLM

import kdkernels as kd
from kdkernels.wrappers import ddp_around

ENTRIES, LENGTH = 40, 7
# responses of the two processes, two each: first position that predicts, tokens
SPREADS = {"uneven": ([(1, 5), (2, 1)], [(0, 6), (3, 2)]), "all in one": ([(1, 5), (2, 4)], [(0, 0), (0, 0)])}
DDP = {
    "DDP": {},
    "DDP unused": {"find_unused_parameters": True},
    "DDP static graph": {"static_graph": True},
    "DDP no_sync": {},
    "DDP of compiled": {},
}
FSDP = ("FSDP2", "FSDP2 by layers", "FSDP1")
ZERO = tuple(f"ZeRO-{stage}" for stage in range(4))
WRAPPERS = (*DDP, *FSDP, *ZERO, "accelerate")
WAYS = ("through", "Distillation", "wrapped student")
CASES = [(wrapper, way, spread) for wrapper in WRAPPERS for way in WAYS for spread in SPREADS]
CHECKPOINTED = [(wrapper, "checkpointed", "uneven") for wrapper in ("DDP", "FSDP2 by layers")]
OFTEN = ("DDP static graph", "FSDP2 by layers", "ZeRO-2", "ZeRO-3", "accelerate")
FEW = [case for case in CASES if case[0] in OFTEN and (case[1] == "Distillation") == (case[2] == "all in one")]
FEW += CHECKPOINTED
OBJECTIVE = kd.GKD(beta=0.5)


def model(seed: int, entries: int = ENTRIES, tied: bool = False) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=entries,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        tie_word_embeddings=tied,
    )
    return Qwen2ForCausalLM(config)


def student(spread: str) -> Qwen2ForCausalLM:
    """Its lm_head is its embedding too where the tokens are uneven."""
    return model(1, tied=spread == "uneven")


def batch(spread: str) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The models' inputs and the labels of all four rows, the same everywhere."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, ENTRIES - 3, (4, LENGTH), generator=generator)
    labels = torch.full_like(ids, -100)
    first_process, second_process = SPREADS[spread]
    for row, (first, count) in enumerate(first_process + second_process):
        labels[row, first + 1 : first + 1 + count] = ids[row, first + 1 : first + 1 + count]
    attention = torch.ones_like(ids)
    attention[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": attention}, labels


def wrapped(wrapper: str, module: nn.Module):
    """(the wrapped module, whatever steps its optimizer)"""
    if wrapper in ZERO:
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(wrapper[-1]), "stage3_param_persistence_threshold": 0},
        }
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        return engine, engine.step
    if wrapper == "FSDP1":
        module = FullyShardedDataParallel(module, device_id=torch.device("cpu"), use_orig_params=True)
    elif wrapper in FSDP:
        if "layers" in wrapper:
            for layer in getattr(module, "student", module).model.layers:
                fully_shard(layer)
        fully_shard(module)
    elif "compiled" in wrapper:
        module = DistributedDataParallel(torch.compile(module, backend="eager"))
    elif wrapper in DDP:
        module = DistributedDataParallel(module, **DDP[wrapper])
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    if wrapper == "accelerate":
        from accelerate import Accelerator

        module, optimizer = Accelerator(cpu=True).prepare(module, optimizer)
    return module, optimizer.step


def weights(wrapper: str, module) -> dict[str, torch.Tensor]:
    """Copies of the whole weights, by the names that the plain model has for them."""
    found = {}
    if wrapper == "FSDP1":
        with FullyShardedDataParallel.summon_full_params(module):
            found = {name: p.detach().clone() for name, p in module.named_parameters()}
    for name, p in () if found else module.named_parameters():
        with deepspeed.zero.GatheredParameters([p]) if wrapper == "ZeRO-3" else nullcontext():
            found[name] = (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
    for prefix in ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "student."):
        found = {name.replace(prefix, ""): weight for name, weight in found.items()}
    return found


def by_through(wrapper, teacher, inputs, labels):
    def loss(teacher, labels, **inputs):
        scored = kd.Head.of(wrapper, **inputs, vocab_size=ENTRIES)
        return OBJECTIVE(scored, teacher, kd.Layout.from_labels(labels))

    return kd.through(wrapper, loss, teacher, labels, **inputs)


def by_checkpointed(wrapper, teacher, inputs, labels):
    """The backward computes hidden states and head once more."""

    def loss(ids, attention):
        hidden = kd.hidden_states(wrapper, input_ids=ids, attention_mask=attention)
        return OBJECTIVE(kd.Head.from_model(wrapper, hidden, ENTRIES), teacher, kd.Layout.from_labels(labels))

    return kd.through(wrapper, partial(checkpoint, loss, use_reentrant=False), *inputs.values())


def by_distillation(wrapper, teacher, inputs, labels):
    return wrapper(teacher=teacher, labels=labels, **inputs)


def by_wrapped_student(wrapper, teacher, inputs, labels):
    return kd.Distillation(wrapper, OBJECTIVE, ENTRIES)(teacher=teacher, labels=labels, **inputs)


def around_it(wrapper, teacher, inputs, labels):
    """As nobody should: nothing sees that the forward of DDP does not run."""
    inner = wrapper.module
    hidden = inner.model(**inputs).last_hidden_state
    return OBJECTIVE(kd.Head(hidden, inner.lm_head.weight), teacher, kd.Layout.from_labels(labels))


CALLS = {
    "through": by_through,
    "checkpointed": by_checkpointed,
    "Distillation": by_distillation,
    "wrapped student": by_wrapped_student,
    "around": around_it,
}


def update(wrapper: str, way: str, spread: str) -> dict:
    """The loss of both processes, what one step took from each weight of the model."""
    rank = distributed.rank()
    inputs, labels = batch(spread)
    share = sum(count > 0 for _, count in SPREADS[spread][rank]) / sum(
        count > 0 for responses in SPREADS[spread] for _, count in responses
    )
    here = slice(2 * rank, 2 * rank + 2)
    inputs, labels = {name: value[here] for name, value in inputs.items()}, labels[here]
    teacher_model = model(3, ENTRIES + 8).requires_grad_(False)
    teacher = kd.Head.of(teacher_model, **inputs, vocab_size=ENTRIES + 5)
    module = student(spread)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    module, step = wrapped(wrapper, kd.Distillation(module, OBJECTIVE, ENTRIES) if way == "Distillation" else module)
    times = 2 if wrapper == "DDP no_sync" else 1
    for last in (False, True)[-times:]:
        with nullcontext() if last or times == 1 else module.no_sync():
            out = CALLS[way](module, teacher, inputs, labels)
            loss = out.loss * share * 2 / times  # wrappers take the mean over two processes
            module.backward(loss) if wrapper in ZERO else loss.backward()
    step()
    after = weights(wrapper, module)
    total = out.loss.detach() * share
    torch.distributed.all_reduce(total)
    return {"loss": total, "update": {name: before[name] - after[name] for name in before}}


def refused(wrapper: str) -> list[str]:
    """What is said where the hidden states of a model that was taken out of its wrapper are asked for."""
    inputs, _ = batch("uneven")
    module, _ = wrapped(wrapper, model(1))
    calls = [lambda: kd.hidden_states(module, **inputs)]
    if wrapper not in FSDP:
        inner = module.module
        hidden = inner.model(**inputs).last_hidden_state
        calls += [lambda: kd.hidden_states(inner, **inputs), lambda: kd.Head.from_model(inner, hidden)]
    return [error_of(call) for call in calls]


def allowed() -> dict[str, str]:
    """What is said where a model belongs to a DDP, and nothing is amiss."""
    inputs, _ = batch("uneven")
    both = nn.ModuleList([model(1), model(3).requires_grad_(False)])
    keep = DistributedDataParallel(both)
    again, ddps = model(1), []
    gc.disable()
    for _ in range(2):  # the first is garbage, in a cycle, when the second is made
        ddps = [DistributedDataParallel(again)]
        ddps[0].itself = ddps
        ddp_around(again)
    calls = {
        "frozen part": lambda: kd.hidden_states(both[1], **inputs),
        "second DDP": lambda: kd.through(ddps[0], lambda: kd.hidden_states(again, **inputs)),
    }
    said = {name: error_of(call) for name, call in calls.items()}
    ddps = None
    said["no DDP any more"] = error_of(lambda: kd.hidden_states(again, **inputs))
    gc.enable()
    assert keep.module is both
    return said


def rounded() -> list[float]:
    """Of FSDP2 in bf16: what weights and a denominator make of the loss, beside what they should."""
    inputs, labels = batch("uneven")
    module = kd.Distillation(model(1), kd.SFT(), ENTRIES)
    fully_shard(module, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    weights, count = torch.full(labels.shape, 1.002), torch.tensor(257.0)
    given = ({}, {"weights": weights}, {"denominator": 1}, {"denominator": count})
    plain, weighted, total, divided = (module(labels=labels, **inputs, **each).loss.item() for each in given)
    return [weighted / plain / 1.002, divided / total * 257]


def error_of(call) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


def main(which: str, results: str) -> None:
    distributed.start()
    deepspeed_strategy.join()
    if which == "few":
        found = {case: update(*case) for case in [*FEW, ("DDP", "around", "uneven")]}
        found["refused"] = {wrapper: refused(wrapper) for wrapper in ("DDP", "accelerate", "FSDP2", "FSDP1")}
        found["allowed"], found["rounded"] = allowed(), rounded()
    else:
        found = {case: update(*case) for case in CASES if case not in FEW}
    torch.save(found, f"{results}.{distributed.rank()}")
    distributed.barrier()


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    main(*sys.argv[1:])
