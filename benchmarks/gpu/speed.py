"""Steps 3 and 5: losses against the bare GEMMs, in turns, their gradients checked first (../measure.py).

speed.py targets     what has a target (summary.py), then other budgets, losses and numbers of tokens
speed.py peers       everybody else, and kdkernels within the memory of each
"""

from __future__ import annotations

import sys
import time
from dataclasses import replace

import peers
import torch
from cases import DENSE, LIGER, QWEN, ROOM, THREE, TINY, Case, Models
from findings import DEVICE, DRY, attempt, left, record
from measure import CaseRun

BF16 = ", bf16 logits"
BOTH = ("kdkernels", "kdkernels" + BF16)
PAIR = ("JSD(0.9)", "TSD-KD")
# of the figures that other projects publish
LLAMA = Models("Llama 3 8B / 8B", 4096, 4096, 128256)


def in_mib(mib: int, suffix: str = "") -> str:
    """The name of kdkernels with this memory budget."""
    name = f"kdkernels in {mib} MiB{suffix}"
    peers.IMPLEMENTATIONS[name] = peers.Ours(name, torch.bfloat16 if suffix else None, mib * 2**20)
    return name


BUDGETS = tuple(in_mib(mib, suffix) for mib in (4096, 1024, 384, 2048, 8192) for suffix in ("", BF16))


def case(models: Models, tokens: int, losses, implementations, seconds: float = 3.0, **options) -> Case:
    return Case(models, tokens, losses, implementations, response=512, seconds=seconds, **options)


CASES = {
    "targets": [
        case(QWEN, 16384, PAIR, BOTH, seconds=6.0),
        case(LLAMA, 8192, PAIR[:1], (*BOTH, *BUDGETS[:2])),
        case(LLAMA, 1024, PAIR[:1], BOTH),
        case(QWEN, 16384, PAIR, BUDGETS[:4]),
        case(QWEN, 16384, ("VCRD", "cross-entropy"), BOTH),
        *(case(QWEN, tokens, PAIR, BOTH) for tokens in (4096, 1024)),
        case(QWEN, 16384, PAIR, BOTH, trained=False),
        case(QWEN, 16384, PAIR, BUDGETS[4:]),
    ],
    "peers": [
        case(QWEN, 8192, PAIR[:1], (*BOTH, *LIGER, "torch.compile", "TRL GKD", *ROOM)),
        case(QWEN, 1024, PAIR[:1], (*BOTH, *LIGER, *DENSE, "TRL GKD", *ROOM)),
        case(QWEN, 8192, ("cross-entropy",), (*BOTH, "cut-cross-entropy", "torch linear_cross_entropy")),
        case(LLAMA, 8192, PAIR[:1], (*BOTH, *LIGER)),
        case(QWEN, 8192, THREE, ("checkpointed chunks",)),
    ],
}


def tiny(case: Case) -> Case:
    """For the dry run: two budgets are as good as ten, and nothing is imported."""
    known = [name for name in case.implementations if name in peers.IMPLEMENTATIONS]
    known = [name for name in known if peers.IMPLEMENTATIONS[name].module is None and name not in BUDGETS[2:]]
    return replace(case, models=TINY, tokens=64, response=32, seconds=0, implementations=tuple(known))


def measure(case: Case) -> None:
    """A finding for each implementation of each loss."""
    if left() < 0:
        record("refused", case=case.name, loss="", implementation="", reason="no time left")
        return
    deadline = time.monotonic() + left()
    for cell in CaseRun(case, DEVICE, deadline).measure().values():
        if cell.reason:
            named = {"loss": cell.loss, "implementation": cell.implementation, "reason": cell.reason}
            record("refused", case=case.name, **named)
            if cell.reason.startswith("wrong") and cell.implementation.startswith("kdkernels"):
                record("check", name=f"{cell.implementation}, {cell.loss}, {case.name}", failed=cell.reason)
        else:
            record("cell", **cell.extra_info)


if __name__ == "__main__":
    chosen = CASES[sys.argv[1]]
    for each in dict.fromkeys(map(tiny, chosen)) if DRY else chosen:
        with attempt(each.name):
            measure(each)
