"""The one place where a backend is chosen."""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

import torch

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


def _why_not(name: str, device: str, dtype: torch.dtype, operand: torch.dtype) -> str:
    """Empty when backend ``name`` can run these dtypes of logits and operands on ``device``, else the reason."""
    if name not in _BACKENDS:
        return f"expected one of {', '.join(_BACKENDS)}"
    interpreted = name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if name in _DEVICE and device != _DEVICE[name] and not interpreted:
        return f"it runs on {_DEVICE[name]}, not on {device}"
    module, error = _load(name)
    if module is None:
        return f"it does not load ({error})"
    for name_of_it, each in (("logits", dtype), ("gradients", operand)):  # a gradient has the operands' dtype
        if not module.supports(each):
            return f"it does not compute with {each} {name_of_it}"
    return ""


def backend_for(device: torch.device, dtype: torch.dtype, operand: torch.dtype | None = None) -> ModuleType:
    """The backend for logits of ``dtype`` over operands of ``operand`` (default: the same) on ``device``.

    ``KDKERNELS_BACKEND`` forces one. Otherwise the device's own, or eager with one warning that names the reason.

    Raises:
        RuntimeError: the forced backend does not exist or cannot run.
    """
    operand = operand or dtype
    forced = os.environ.get("KDKERNELS_BACKEND")
    if forced:
        reason = _why_not(forced, device.type, dtype, operand)
        if reason:
            raise RuntimeError(f"KDKERNELS_BACKEND={forced}: {reason}")
        return _load(forced)[0]
    wanted = _DESERVED.get(device.type)
    reason = _why_not(wanted, device.type, dtype, operand) if wanted else f"{device.type} has no backend of its own yet"
    if not reason:
        return _load(wanted)[0]
    if reason not in _warned:
        _warned.add(reason)
        logger.warning(
            "kdkernels uses its slow eager backend on %s: %s", device, f"{wanted}: {reason}" if wanted else reason
        )
    return _load("eager")[0]


def info() -> dict:
    """Backends found, which one each device gets (float32 logits), and why not where one cannot run.

    ``{"backends": {name: "ok" | reason}, "devices": {device: name}, "cpu_isa": "avx512" | "avx2" | "portable" | None}``
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    chosen = {d: backend_for(torch.device(d), torch.float32).__name__.rsplit(".", 1)[-1] for d in devices}
    native, _ = _load("native")
    home = {name: _DEVICE[name] if _DEVICE.get(name) in devices else "cpu" for name in _BACKENDS}
    return {
        "backends": {n: _why_not(n, home[n], torch.float32, torch.float32) or "ok" for n in _BACKENDS},
        "devices": chosen,
        "cpu_isa": native.isa() if native else None,
    }
