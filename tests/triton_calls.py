"""Every call of the public API, noted and compiled by Triton's JIT for a GPU that need not be there.

    python tests/triton_calls.py [every]

under any Python with torch and triton, another Triton than the pinned one too. By default every two options of a
function meet in some call, and every property of a kernel's arguments (type, constant, alignment) is in something that
is compiled; with ``every`` three options meet and all that is noted is compiled (minutes). Prints what was compiled as
a line of JSON; status 1 if anything does not compile.

What a GPU launches does not depend on what kernels compute (nothing is read back), so CPU tensors of zeros will do for
their results.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import random
import re
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
os.environ["KDKERNELS_BACKEND"] = "triton"
sys.path.insert(0, str(Path(__file__).parents[1]))  # kdkernels, installed or not

import torch
import triton

import kdkernels as kd
from kdkernels import functional
from kdkernels.kernels import registry
from kdkernels.kernels.triton import ahead as triton_ahead
from kdkernels.kernels.triton import backend
from kdkernels.objectives import vcrd
from kdkernels.objectives.base import Objective

CAPABILITY = 90
B, L, H = 2, 3, 8
DIVERGENCES = [kd.ForwardKL(), kd.ReverseKL(), kd.JSD(0.9), kd.SkewKL(0.1)]
DIVERGENCES += [kd.SkewReverseKL(0.1, detach) for detach in (False, True)]
WRITTEN = ("stats_ptr", "values_ptr", "indices_ptr", "gathered_ptr", "sums_ptr", "at_ids_ptr")

# ---- options and their values ----------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STUDENT = {
    "student": [(form, dtype) for form in ("head", "logits") for dtype in DTYPES],
    "vocabulary": [1, 33, 5003, 16400],  # one entry, less than a block, whole ones and a part, rows at 16 bytes
    "padding": [0, 5],
    "softcap": [None, 30.0],
    "scale": [1, 0.25],
    "logits_dtype": [None, torch.float32],
    "memory_budget": [None, 1],  # the least that the error for 1 byte names: a row a chunk
}
TEACHER = {"teacher": ["alike", "head", "logits", "entries", "bucket"], "teacher_softcap": [None, 30.0]}
FUNCTION = STUDENT | {"rows": [None, "mask"]}
OBJECTIVE = (
    STUDENT
    | {"target": [None, "ids"], "weights": [None, "ones"], "mask": ["all", "some"]}
    | {"reduction": [*kd.GKD.reductions], "denominator": [None, 3]}
)
DISTILLS = OBJECTIVE | TEACHER | {"teacher_mask": [None, "all"]}
CALLS = {
    "cross_entropy": FUNCTION | {"target": ["ids"], "ignore_index": [-100]},
    "entropy": FUNCTION,
    "divergence": FUNCTION | TEACHER | {"divergence": DIVERGENCES, "temperature": [1, 2.0]},
    "plackett_luce": FUNCTION | TEACHER | {"k": [1, 10, 16]},
    "statistics": FUNCTION
    | TEACHER
    | {"teacher": [None, *TEACHER["teacher"]], "topk": [0, 1, 16], "target": [None, "ids"], "collision": [0, 1, 128]},
    "SFT": OBJECTIVE | {"teacher": [None], "teacher_mask": [None], "from_teacher": [None], "target": ["ids"]},
    "GKD": DISTILLS | {"beta": [0.0, 0.5, 1.0], "temperature": [1, 2.0], "from_teacher": [None]},
    "TSDKD": DISTILLS
    | {"beta": [0.0, 0.9], "k": [1, 10, 15], "opener": [0.1, kd.AdaptiveOpener()], "indirect_weight": [0.1, 0.0]}
    | {"direct_weight": [1.0, 0.0], "entropy_weight": [1.0, 0.0], "temperature": [1.0, 2.0]}
    | {"tau": [1.0], "entropy_ratio": [0.1], "from_teacher": [None]},
    "VCRD": DISTILLS
    | {"alpha": [0.1, 1.0], "weighting": [*vcrd.WEIGHTINGS], "reduction": [*kd.VCRD.reductions]}
    | {"lambda_teacher": [1.0], "lambda_student": [1.0], "from_teacher": ["both"]},
    "DistiLLM2": DISTILLS
    | {"alpha_teacher": [0.1], "alpha_student": [0.1, 1.0], "detach_mixture": [False, True], "from_teacher": ["both"]},
}
OF_SOURCES = ("vocabulary", "padding", "softcap", "scale", "teacher_softcap")  # say what student and teacher are


def arguments_of(function) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - {"self"}


def check_complete() -> None:
    """A public function or objective, or an argument of one, that is not here, is an error."""
    functions = set(functional.__all__) - {"TokenStatistics"}
    public = {name: getattr(kd, name) for name in kd.__all__}
    objectives = {name for name, each in public.items() if isinstance(each, type) and issubclass(each, Objective)}
    assert functions | objectives == set(CALLS), functions ^ objectives ^ set(CALLS)
    for name, options in CALLS.items():
        made = getattr(kd, name)
        asked = arguments_of(made) if name in functions else arguments_of(made.__init__) | arguments_of(made.forward)
        assert asked == set(options) - set(OF_SOURCES), (name, asked ^ (set(options) - set(OF_SOURCES)))


# ---- a call ----------------------------------------------------------------------------------------------------------


def source(form: str, dtype: torch.dtype, options: dict, softcap: float | None):
    entries = options["vocabulary"] + options["padding"]
    size = options["vocabulary"] if options["padding"] else None
    if form == "head":
        hidden, weight = torch.zeros(B, L, H, dtype=dtype), torch.zeros(entries, H, dtype=dtype)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        return kd.Head(*leaves, softcap=softcap, scale=options["scale"], vocab_size=size)
    if form == "logits":
        return kd.Logits(torch.zeros(B, L, entries, dtype=dtype, requires_grad=True), size)
    count = min(3, options["vocabulary"])
    ids = torch.arange(count).expand(B, L, count)
    return kd.TopK(ids, torch.full(ids.shape, 0.2).log(), renormalize=form == "entries")


GIVEN = {
    "ids": torch.zeros(B, L, dtype=torch.int64),
    "mask": torch.tensor([[True, True, True], [True, False, True]]),
    "ones": torch.ones(B, L),
    "all": torch.ones(B, L, dtype=torch.bool),
    "some": torch.tensor([[False, True, True], [False, True, True]]),
    "both": torch.tensor([True, False]),
}


def call(name: str, options: dict) -> None:
    """Forward and backward."""
    form, dtype = options["student"]
    sources = [source(form, dtype, options, options["softcap"])]
    if "teacher" in options:
        asked = options["teacher"]
        teacher = asked and source(form if asked == "alike" else asked, dtype, options, options.get("teacher_softcap"))
        sources.append(teacher)
    rest = {k: v for k, v in options.items() if k not in ("student", "teacher", *OF_SOURCES)}
    rest = {k: GIVEN.get(v, v) if isinstance(v, str) else v for k, v in rest.items()}
    if name in functional.__all__:
        out = getattr(kd, name)(*sources, **rest)
        if name != "statistics":
            out.sum().backward()
        return
    own = arguments_of(getattr(kd, name).__init__)
    objective = getattr(kd, name)(**{k: v for k, v in rest.items() if k in own})
    objective(*sources, **{k: v for k, v in rest.items() if k not in own}).loss.backward()


REFUSALS = ("teacher:", "k:", "topk:", "collision:", "temperature:", "teacher_mask:", "weights:", "logits_dtype:")


def accepted(name: str, options: dict) -> bool:
    """Makes the call; False where the API refuses this choice by the name of an argument."""
    try:
        call(name, options)
        return True
    except (TypeError, ValueError) as error:
        least = re.match(r"memory_budget: expected at least (\d+) bytes", str(error))
        if least:
            return accepted(name, options | {"memory_budget": int(least[1])})
        if not str(error).startswith(REFUSALS):
            raise
        return False


def meetings(choice: dict, count: int) -> set[frozenset]:
    """Which ``count`` options have which values together in it."""
    return {frozenset(each) for each in combinations(((k, repr(v)) for k, v in choice.items()), count)}


def make_calls(name: str, count: int) -> tuple[int, int, int]:
    """Calls in which any ``count`` options of a function meet with all their values, but for what the API refuses.

    -> how many were made, how many meetings they cover, and how many none of 20 fillings of the other options got
    accepted.
    """
    options, pick, met, made, impossible = CALLS[name], random.Random(0), set(), 0, 0
    for some in combinations(options, count):
        for values in product(*(options[option] for option in some)):
            wanted = dict(zip(some, values, strict=True))
            if meetings(wanted, count) <= met:
                continue
            for _ in range(20):
                choice = {k: pick.choice(v) for k, v in options.items()} | wanted
                if accepted(name, choice):
                    met |= meetings(choice, count)
                    made += 1
                    break
            else:
                impossible += 1
    return made, len(met), impossible


# ---- what is compiled ------------------------------------------------------------------------------------------------


def launch_and_zero(self: backend.Launch, programs: int, warps: int, *arguments) -> None:
    """Of kernels that do not run the results would be what lay in memory."""
    launch(self, programs, warps, *arguments)
    for name, argument in zip(self.kernel.arg_names, arguments, strict=True):
        if name in WRITTEN and argument is not None:
            argument.zero_()


launch = backend.Launch.__call__


def properties(one: triton_ahead.Specialisation) -> dict:
    """Type, constant and alignment of each argument."""
    data = json.loads(one.data)
    constants = zip(data["constant_keys"], data["constant_vals"], strict=True)
    aligned = zip(data["attrs_keys"], data["attrs_vals"], strict=True)
    return data["signature"] | {str(k): v for k, v in constants} | {f"{k} aligned": v for k, v in aligned}


def cover(found: list[triton_ahead.Specialisation]) -> list[triton_ahead.Specialisation]:
    """Of each kernel so many that every property is among them."""
    met, chosen = set(), []
    for one in found:
        here = {(one.kernel, key, repr(value)) for key, value in properties(one).items()}
        if here - met:
            met |= here
            chosen.append(one)
    return chosen


def main(every: bool) -> int:
    check_complete()
    logging.disable()  # the least memory is slow, and says so
    if every:
        STUDENT["vocabulary"].append(151936)
    backend.Launch.__call__ = launch_and_zero
    registry.BACKENDS["triton"] = registry.BACKENDS["triton"]._replace(device="cpu")
    made = {}

    def all_calls() -> None:
        for name in CALLS:
            made[name] = make_calls(name, 3 if every else 2)

    with triton_ahead.stand_in(CAPABILITY):
        found = list(triton_ahead.noted(all_calls))
    chosen = found if every else cover(found)
    done = triton_ahead.compiled(chosen)
    failed = {one: each.error for one, each in done.items() if each.error}
    for one, error in list(failed.items())[:5]:
        print(f"{one.kernel}: {error}\n{one.data}", file=sys.stderr)
    report = {
        "triton": triton.__version__, "calls": made, "noted": Counter(one.kernel for one in found),
        "compiled": Counter(one.kernel for one in chosen), "failed": Counter(one.kernel for one in failed),
        "bytes": sum(len(each.cubin) for each in done.values()),
    }  # fmt: skip
    print(json.dumps(report))
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:] == ["every"]))
