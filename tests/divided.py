"""Calls whose vocabulary a process group divides, in as many processes as asked for: run by test_divided.py.

    python divided.py RANK RANKS FILE

Axes: B responses, L length, V vocabulary, H hidden.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))

import torch
from batches import fixed
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from truth import Batch

import kdkernels as kd
from kdkernels.engine import plan
from kdkernels.objectives import DivergenceTerm, EntropyTerm, Objective
from kdkernels.sources.adapted import AdaptedHead

VOCABULARY, PADDING = 61, 3
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
ALL = F64, F32, BF16


class Jeffreys(Objective):
    """Two divergences and an entropy at each token."""

    terms = {
        "forward": DivergenceTerm(kd.ForwardKL()),
        "reverse": DivergenceTerm(kd.ReverseKL()),
        "entropy": EntropyTerm(),
    }

    def coefficients(self, tokens):
        return dict.fromkeys(self.terms, 1 / tokens.length.to(tokens.entropy.dtype))


# ---- what a rank has ---


def borders(ranks: int) -> list[int]:
    """Of the 64 rows of weight: no two shards alike, and the padding in the last."""
    rows = VOCABULARY + PADDING
    return {1: [0, rows], 2: [0, 37, rows], 8: [0, 5, 18, 20, 29, 41, 49, 56, rows]}[ranks]


def shard(head: kd.Head, rank: int, ranks: int, group) -> kd.Head:
    """A rank's part, as leaves of its own."""
    here, tensors = slice(*borders(ranks)[rank : rank + 2]), {}
    for name, tensor in zip(head.names, head.tensors, strict=True):
        if tensor is not None:
            part = tensor.detach()[here] if name in ("weight", "outer", "bias") else tensor.detach()
            tensors[name] = part.clone().requires_grad_(tensor.requires_grad)
    return replace(head, **tensors, vocab_size=VOCABULARY, group=group)


def adapted(head: kd.Head, seed: int) -> AdaptedHead:
    """The head with a low-rank product."""
    generator = torch.Generator().manual_seed(seed)
    inner, outer = (
        torch.randn(*shape, 3, generator=generator).to(head.dtype).requires_grad_(head.weight.requires_grad)
        for shape in (head.shape, head.weight.shape[:1])
    )
    return AdaptedHead(head.hidden, head.weight, head.bias, vocab_size=VOCABULARY, inner=inner, outer=outer)


def whole_gradients(found: list[list[Tensor]]) -> list[Tensor]:
    """Of hidden, weight and bias, from those of all ranks; hidden's has to be the same on all."""
    (d_hidden, *others), *rest = found
    assert all(torch.equal(d_hidden, each[0]) for each in rest), "hidden's gradient differs between ranks"
    return [d_hidden, *(torch.cat([each[i + 1] for each in found]) for i in range(len(others)))]


def topk_teacher(head: kd.Head, k: int = 5, renormalize: bool = False, sampled: bool = False) -> kd.TopK:
    z = (head.hidden.double() @ head.weight.double().t())[..., :VOCABULARY]
    top = z.log_softmax(-1).topk(k)
    indices, log_probs = top.indices, top.values.clone()
    indices[0, 3] = torch.tensor([0, 36, 37, 60, 59])[:k]  # at the borders of two ranks, not the largest
    log_probs[0, 3] = z[0, 3].log_softmax(-1)[indices[0, 3]]
    indices[1, 2] = torch.tensor([40, 41, 42, 43, 44])[:k]  # all of one rank
    log_probs[1, 2] = z[1, 2].log_softmax(-1)[indices[1, 2]]
    log_probs[2, 5, 3:] = -torch.inf  # not listed
    return kd.TopK(indices, log_probs, renormalize, sampled)


# ---- calls ---

OBJECTIVES = {
    "gkd": kd.GKD,
    "gkd, tempered": lambda: kd.GKD(0.5, temperature=0.7),
    "tsd-kd": lambda: kd.TSDKD(k=7, opener=0.5),
    "vcrd": lambda: kd.VCRD(weighting="likelihood_ratio"),
    "distillm-2": kd.DistiLLM2,
    "sft": kd.SFT,
    "jeffreys": Jeffreys,
}
FULL = {"bias": True, "softcap": 5.0, "scale": 1.5}  # of both heads
# name -> objective, options of the heads, the teacher, more
CASES = {
    "gkd": ("gkd", {}, "whole", {"dtypes": ALL}),
    "gkd, full heads": ("gkd, tempered", FULL, "divided", {"dtypes": ALL}),
    "gkd, logits": ("gkd", {}, "logits", {}),
    "gkd, frozen head": ("gkd", {}, "whole", {"frozen": ("weight",)}),
    "gkd, frozen trunk": ("gkd", {"bias": True}, "whole", {"frozen": ("hidden",)}),
    "gkd, adapters": ("gkd", {"bias": True}, "whole", {"adapters": True, "rows": ((4, 3), (5, 2)), "dtypes": ALL}),
    "gkd, pieces": ("gkd", {}, "divided", {"rows": ((4, 3), (5, 2))}),
    "gkd, budget": ("gkd", {}, "whole", {"budget": 3000}),
    "tsd-kd": ("tsd-kd", {"softcap": 5.0}, "divided", {"dtypes": ALL}),
    "tsd-kd, pieces": ("tsd-kd", {}, "whole", {"rows": ((4, 3), (5, 2))}),  # responses longer than a chunk
    "vcrd": ("vcrd", {}, "divided", {"dtypes": ALL}),
    "distillm-2": ("distillm-2", {}, "whole", {}),
    "sft": ("sft", {"bias": True}, "none", {}),
    "jeffreys": ("jeffreys", {"scale": 0.5}, "whole", {"dtypes": ALL}),
    "topk": ("gkd", {"bias": True}, "topk", {"dtypes": ALL}),
    "topk, full heads": ("gkd", FULL, "topk", {"rows": ((4, 3), (5, 2))}),
    "topk, renormalised": ("gkd, tempered", {}, "topk, renormalised", {}),
    "topk, sampled": ("gkd", {"bias": True}, "topk, sampled", {"dtypes": ALL}),
    "topk, sampled, full heads": ("gkd", FULL, "topk, sampled", {"rows": ((4, 3), (5, 2))}),
    "topk, two divergences": ("jeffreys", {}, "topk", {}),
    "fp16": ("gkd", {"bias": True}, "whole", {"dtypes": (F16,)}),
    "fp16, topk": ("gkd", {}, "topk", {"dtypes": (F16,)}),
}
RUNS = [(name, dtype) for name, (*_, more) in CASES.items() for dtype in more.get("dtypes", (F64, F32))]


@lru_cache
def batch_of(name: str, dtype: torch.dtype) -> Batch:
    _, heads, _, more = CASES[name]
    batch = fixed(dtype, vocabulary=VOCABULARY, padding_s=PADDING, padding_t=PADDING, weights=True, **heads)
    if "adapters" in more:
        batch = replace(batch, student=adapted(batch.student, 7), teacher=adapted(batch.teacher, 8))
    for each in more.get("frozen", ()):
        getattr(batch.student, each).requires_grad_(False)
    return batch


def teacher_of(kind: str, head: kd.Head, rank: int, ranks: int, group) -> kd.Source | None:
    if kind.startswith("topk"):
        return topk_teacher(head, renormalize="renormalised" in kind, sampled="sampled" in kind)
    if kind == "logits":
        z = torch.nn.functional.linear(head.hidden, head.weight)
        z[..., 30:] = -torch.inf  # all that rank 1 has, and more
        return kd.Logits(z, vocab_size=VOCABULARY)
    return (
        {"none": None, "whole": head}[kind] if kind != "divided" or group is None else shard(head, rank, ranks, group)
    )


def call(name: str, dtype: torch.dtype, rank: int = 0, ranks: int = 1, group=None) -> dict:
    """Loss, metrics and gradients, of one process without a group."""
    objective, _, kind, more = CASES[name]
    batch, objective = batch_of(name, dtype), OBJECTIVES[objective]()
    student = batch.student if group is None else shard(batch.student, rank, ranks, group)
    teacher = teacher_of("whole" if kind == "divided" and group is None else kind, batch.teacher, rank, ranks, group)
    options = {"weights": batch.weights, "logits_dtype": F32 if dtype.itemsize == 2 else None}
    if objective.needs_target:
        options["target"] = batch.target
    if objective.by_author:
        options["from_teacher"] = torch.tensor([True, False, False, True, True])

    def loss(budget=None):
        return objective(student, teacher, batch.mask, memory_budget=budget, **options)

    if group is not None and "rows" in more:
        with mock.patch.object(plan, "chunk_rows", return_value=more["rows"][rank % 2]):
            out = loss()
    else:
        out = loss(smallest(loss, group) + more["budget"] if "budget" in more else None)
    wanted = [t for t in student.tensors if t is not None and t.requires_grad]
    gradients = torch.autograd.grad(out.loss * 1024, wanted)
    names = [n for n, t in zip(student.names, student.tensors, strict=True) if t is not None and t.requires_grad]
    return {
        "loss": out.loss.detach(),
        "metrics": out.metrics,
        "gradients": dict(zip(names, gradients, strict=True)),
    }


def smallest(loss, group) -> int:
    """Bytes for one token at a time on the rank that needs most."""
    try:
        loss(1)
    except ValueError as error:
        found = re.search(r"at least (\d+) bytes", str(error))
    least = torch.tensor([int(found[1])])
    if group is not None:
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MAX, group=group)
    return int(least)


def per_token(rank: int = 0, ranks: int = 1, group=None) -> dict:
    """The functions, and gradients of a sum of them; statistics."""
    batch = batch_of("gkd, full heads", F32)
    student = batch.student if group is None else shard(batch.student, rank, ranks, group)
    teacher = batch.teacher if group is None else shard(batch.teacher, rank, ranks, group)
    rows = {"rows": batch.mask}
    values = {
        "divergence": kd.divergence(student, teacher, kd.JSD(0.9), 0.7, **rows),
        "topk": kd.divergence(student, topk_teacher(batch.teacher), kd.ReverseKL(), **rows),
        "entropy": kd.entropy(student, **rows),
        "cross_entropy": kd.cross_entropy(student, batch.target, **rows),
        "plackett_luce": kd.plackett_luce(student, batch.teacher, 5, **rows),
    }
    total = sum((i + 1) * each.sum() for i, each in enumerate(values.values()))
    gradients = dict(zip(student.names, torch.autograd.grad(total, student.tensors), strict=True))
    statistics = kd.statistics(student, teacher, topk=40, target=batch.target, collision=9)  # more than a rank has
    known = vars(statistics) | {f"teacher's {name}": each for name, each in vars(statistics.teacher).items()}
    known = {name: each for name, each in known.items() if isinstance(each, Tensor)}
    return {"values": {n: v.detach() for n, v in values.items()}, "gradients": gradients, "statistics": known}


def recomputed(rank: int, group) -> list[tuple[Tensor, ...]]:
    """Gradients of hidden and weight: plain, of a second backward, and under checkpointing."""
    batch = batch_of("gkd", F32)
    student = shard(batch.student, rank, 2, group)

    def loss(hidden):
        return kd.GKD()(replace(student, hidden=hidden), batch.teacher, batch.mask).loss

    wanted, first = (student.hidden, student.weight), loss(student.hidden)
    found = [torch.autograd.grad(first, wanted, retain_graph=True), torch.autograd.grad(first, wanted)]
    return [*found, torch.autograd.grad(checkpoint(loss, student.hidden, use_reentrant=False), wanted)]


def nothing(rank: int, group) -> list[Tensor]:
    """A call without tokens."""
    batch = batch_of("gkd", F32)
    student = shard(batch.student, rank, 2, group)
    loss = kd.GKD()(student, batch.teacher, torch.zeros_like(batch.mask)).loss
    return [loss.detach(), *torch.autograd.grad(loss, (student.hidden, student.weight))]


# ---- what must not be ---


def errors(rank: int, group, other) -> dict[str, str]:
    """The errors of calls that cannot be; ``other`` is another group of the same ranks."""
    batch = batch_of("gkd", F32)
    student, teacher, mask = shard(batch.student, rank, 2, group), batch.teacher, batch.mask
    divided = shard(teacher, rank, 2, group)
    one_less = mask.clone()
    one_less[0, 2] = False
    swapped = mask[[2, 1, 0, 3, 4]] if rank else mask
    moved = replace(student, hidden=student.hidden * (1 + rank))
    few = replace(student, weight=student.weight.detach()[:30])
    gkd = kd.GKD()
    calls = {
        "tokens": lambda: gkd(student, teacher, one_less if rank else mask),
        "no tokens on one": lambda: gkd(student, teacher, mask & (rank == 0)),
        "lengths": lambda: kd.TSDKD(k=3)(student, teacher, swapped),
        "terms": lambda: kd.GKD(0.5 + rank / 4)(student, teacher, mask),
        "denominator": lambda: gkd(student, teacher, mask, denominator=torch.tensor(5 + rank)),
        "options": lambda: kd.TSDKD(k=3, opener=0.5 + rank / 4)(student, teacher, mask),
        "kind of teacher": lambda: gkd(student, topk_teacher(teacher) if rank else teacher, mask),
        "vocab_size": lambda: gkd(replace(student, vocab_size=60 + rank), teacher, mask),
        "memory_budget": lambda: gkd(student, teacher, mask, memory_budget=10**8 + rank),
        "hidden": lambda: gkd(moved, teacher, mask),
        "target": lambda: kd.SFT()(student, None, mask, target=(batch.target + rank) % VOCABULARY),
        "frozen": lambda: gkd(replace(student, weight=student.weight.detach()) if rank else student, teacher, mask),
        "per token": lambda: kd.entropy(student, rows=one_less if rank else mask),
        "too few rows": lambda: gkd(few, teacher, mask),
        "no entries": lambda: gkd(replace(student, vocab_size=37), teacher, mask),
        "too small a budget": lambda: gkd(student, teacher, mask, memory_budget=10),
        "other borders": lambda: gkd(student, replace(divided, weight=teacher.weight[:40] if rank else
                                                      teacher.weight[40:]), mask),
        "more entries than a rank has": lambda: gkd(student, topk_of(teacher, 24), mask),
        "another group": lambda: gkd(student, replace(divided, group=other), mask),
        "divided teacher alone": lambda: gkd(batch.student, divided, mask),
        "k": lambda: kd.TSDKD(k=VOCABULARY + 1)(student, teacher, mask),
        "no vocab_size": lambda: replace(student, vocab_size=None),
        "no group": lambda: replace(student, group="world"),
    }  # fmt: skip
    return {name: raised(each) for name, each in calls.items()}


def topk_of(head: kd.Head, k: int) -> kd.TopK:
    top = (head.hidden @ head.weight.t())[..., :VOCABULARY].log_softmax(-1).topk(k)
    return kd.TopK(top.indices, top.values)


def raised(function) -> str:
    try:
        function()
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(rank: int, ranks: int, results: str) -> None:
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{results}.store", rank=rank, world_size=ranks)
    group, other = distributed.group.WORLD, distributed.new_group(range(ranks))
    alone = [distributed.new_group([each]) for each in range(ranks)][rank]
    found = {(name, dtype): call(name, dtype, rank, ranks, group) for name, dtype in RUNS}
    found["alone"] = call("gkd", F32, 0, 1, alone)
    found["per token"] = per_token(rank, ranks, group)
    found["recomputed"], found["nothing"] = recomputed(rank, group), nothing(rank, group)
    found["errors"] = errors(rank, group, other)
    torch.save(found, f"{results}.{rank}")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
