"""What kdkernels found on this machine and what it will use."""

from __future__ import annotations

import torch

from .compute import gemm
from .engine import plan
from .kernels import registry


def info() -> dict:
    """Backends found, which one each device gets (float32 logits), and why not where one cannot run.

    ``{"backends": {name: "ok" | reason}, "devices": {device: name}, "cpu_isa": "avx512" | "avx2" | "portable" | None,
    "cpu_products": {"float32": "native: why", "bfloat16": "torch: why", ...}, "memory_budget": {device: default}}``.

    Products: who multiplies matrices of each dtype, csrc/gemm.h (native) or torch, which may have to widen them first.
    Where ``KDKERNELS_BACKEND`` or ``KDKERNELS_CPU_ISA`` forces what cannot run, its place has the reason.
    """
    fp32 = torch.float32
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    home = {
        name: registry.DEVICE[name] if registry.DEVICE.get(name) in devices else "cpu" for name in registry.BACKENDS
    }
    chosen = {}
    for device in devices:
        try:
            chosen[device] = registry.name_of(registry.choose(device, fp32, fp32)[0])
        except RuntimeError as error:
            chosen[device] = str(error)
    native, _ = registry.load("native")
    try:
        isa = native.isa() if native else None
    except RuntimeError as error:  # KDKERNELS_CPU_ISA names one that is not there
        isa = str(error).splitlines()[0]
    traits = gemm.traits_of(native) if chosen["cpu"] == "native" else frozenset()
    return {
        "backends": {name: registry.able(name, home[name], fp32, fp32)[1] or "ok" for name in registry.BACKENDS},
        "devices": chosen,
        "cpu_isa": isa,
        "cpu_products": {
            str(dtype).removeprefix("torch."): f"{who.name}: {why}"
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for who, why in [gemm.who_multiplies(traits, dtype)]
        },
        "memory_budget": plan.info(),
    }
