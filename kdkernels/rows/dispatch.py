"""The one place where a backend is chosen."""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

import torch

from .. import gemm, plan

logger = logging.getLogger("kdkernels")

_BACKENDS = ("eager", "native", "triton")
_DEVICE = {"native": "cpu", "triton": "cuda"}  # eager runs on any
_DESERVED = {"cpu": "native", "cuda": "triton"}  # what a device should run on; eager is the slower way out, and says so
_warned: set[str] = set()


def _load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(f"{__package__}.{name}"), ""
    except (ImportError, OSError) as error:
        return None, f"{type(error).__name__}: {error}"


def _able(name: str, device: str, dtype: torch.dtype, operand: torch.dtype) -> tuple[ModuleType | None, str]:
    """Backend ``name`` if it can run these dtypes of logits and operands on ``device``, else the reason."""
    if name not in _BACKENDS:
        return None, f"expected one of {', '.join(_BACKENDS)}"
    interpreted = name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if name in _DEVICE and device != _DEVICE[name] and not interpreted:
        return None, f"it runs on {_DEVICE[name]}, not on {device}"
    module, error = _load(name)
    if module is None:
        return None, f"it does not load ({error})"
    for name_of_it, each in (("logits", dtype), ("gradients", operand)):  # a gradient has the operands' dtype
        if not module.supports(each):
            return None, f"it does not compute with {each} {name_of_it}"
    return module, ""


def _choose(device: str, dtype: torch.dtype, operand: torch.dtype) -> tuple[ModuleType, str]:
    """The backend, and why it is not the one the device deserves (empty where it is, or where it was forced)."""
    name = os.environ.get("KDKERNELS_BACKEND")
    if name:
        module, reason = _able(name, device, dtype, operand)
        if module is None:
            raise RuntimeError(f"KDKERNELS_BACKEND={name}: {reason}")
        return module, ""
    name = _DESERVED.get(device)
    if name is None:
        return _load("eager")[0], f"{device} has no backend of its own yet"
    module, reason = _able(name, device, dtype, operand)
    return (_load("eager")[0], f"{name}: {reason}") if module is None else (module, "")


def backend_for(device: torch.device, dtype: torch.dtype, operand: torch.dtype | None = None) -> ModuleType:
    """The backend for logits of ``dtype`` over operands of ``operand`` (default: the same) on ``device``.

    ``KDKERNELS_BACKEND`` forces one. Otherwise the device's own, or eager with one warning that names the reason.

    Raises:
        RuntimeError: the forced backend does not exist or cannot run.
    """
    module, reason = _choose(device.type, dtype, operand or dtype)
    if reason and reason not in _warned:
        _warned.add(reason)
        logger.warning("kdkernels uses its slow eager backend on %s: %s", device, reason)
    return module


def info() -> dict:
    """Backends found, which one each device gets (float32 logits), and why not where one cannot run.

    ``{"backends": {name: "ok" | reason}, "devices": {device: name}, "cpu_isa": "avx512" | "avx2" | "portable" | None,
    "cpu_products": {"float32": "native: why", "bfloat16": "torch: why", ...}, "memory_budget": {device: default}}``.

    Products: who multiplies matrices of each dtype, csrc/gemm.h (native) or torch, which may have to widen them first.
    Where ``KDKERNELS_BACKEND`` or ``KDKERNELS_CPU_ISA`` forces what cannot run, its place has the reason.
    """
    fp32 = torch.float32
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    home = {name: _DEVICE[name] if _DEVICE.get(name) in devices else "cpu" for name in _BACKENDS}
    chosen = {}
    for device in devices:
        try:
            chosen[device] = _choose(device, fp32, fp32)[0].__name__.rpartition(".")[2]
        except RuntimeError as error:
            chosen[device] = str(error)
    native, _ = _load("native")
    try:
        isa = native.isa() if native else None
    except RuntimeError as error:  # KDKERNELS_CPU_ISA names one that is not there
        isa = str(error).splitlines()[0]
    traits = gemm.traits_of(native) if chosen["cpu"] == "native" else frozenset()
    return {
        "backends": {name: _able(name, home[name], fp32, fp32)[1] or "ok" for name in _BACKENDS},
        "devices": chosen,
        "cpu_isa": isa,
        "cpu_products": {
            str(dtype).removeprefix("torch."): f"{who.name}: {why}"
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
            for who, why in [gemm.who_multiplies(traits, dtype)]
        },
        "memory_budget": plan.info(),
    }
