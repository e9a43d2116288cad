"""What kdkernels found on this machine and what it will use."""

from __future__ import annotations

import torch

from .compute import gemm
from .engine import plan
from .kernels import Request, registry


def info() -> dict:
    """Backends found, which one each device gets (float32 logits), and why not where one cannot run.

    ``{"backends": {name: "ok" | reason}, "devices": {device: name}, "cpu_isa": "avx512" | "avx2" | "portable" | None,
    "cpu_products": {"float32": "native: why", "bfloat16": "torch: why", ...}, "memory_budget": {device: default}}``.

    Products: who multiplies matrices of each dtype, csrc/gemm.h (native) or torch, which may have to widen them first.
    Where ``KDKERNELS_BACKEND`` or ``KDKERNELS_CPU_ISA`` forces what cannot run, its place has the reason.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    fp32 = {device: Request(device, torch.float32, torch.float32) for device in devices}
    chosen, able = {}, {}
    for device, request in fp32.items():
        try:
            chosen[device] = registry.choose(request).backend.name
        except RuntimeError as error:
            chosen[device] = str(error)
    for name, entry in sorted(registry.BACKENDS.items()):
        able[name] = registry.able(name, fp32.get(entry.device, fp32["cpu"]))[1] or "ok"
    native, _ = registry.load("native")
    try:
        isa = native.isa() if native else None
    except RuntimeError as error:  # KDKERNELS_CPU_ISA names one that is not there
        isa = str(error).splitlines()[0]
    traits = native.traits() if chosen["cpu"] == "native" else frozenset()
    return {
        "backends": able,
        "devices": chosen,
        "cpu_isa": isa,
        "cpu_products": {
            str(dtype).removeprefix("torch."): f"{who.name}: {why}"
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for who, why in [gemm.who_multiplies(traits, dtype)]
        },
        "memory_budget": plan.info(),
    }
