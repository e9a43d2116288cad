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

from kdkernels.engine import predict

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


def predicted(cell: dict, ours: peers.Ours) -> None:
    """Beside a JSD that was measured what the model of this GPU says (engine/predict.py), if it knows the GPU."""
    name = "H100" if DRY else torch.cuda.get_device_name()
    known = next((part for part in predict.MULTIPROCESSORS if part in name), None)
    if known is None or cell["loss"] != "JSD(0.9)" or not cell["trained"]:
        return
    logits = 4 if ours.logits is None else ours.logits.itemsize
    shape = (cell["tokens"], *cell["hidden"], cell["vocabulary"], logits)
    call = predict.Call(predict.known(known), *shape, budget=ours.memory_budget)
    figures = {"predicted_ms": call.seconds() * 1e3, "measured_ms": cell["full_s"] * 1e3}
    figures |= {"predicted_ratio": call.seconds() / call.bare(), "measured_ratio": cell["ratio"]}
    record("prediction", case=cell["case"], implementation=cell["implementation"], rows=list(call.rows), **figures)


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
            implementation = peers.IMPLEMENTATIONS.get(cell.implementation)
            if isinstance(implementation, peers.Ours):
                predicted(cell.extra_info, implementation)


if __name__ == "__main__":
    chosen = CASES[sys.argv[1]]
    for each in dict.fromkeys(map(tiny, chosen)) if DRY else chosen:
        with attempt(each.name):
            measure(each)
