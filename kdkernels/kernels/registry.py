"""The one place where a backend is chosen."""

from __future__ import annotations

import importlib
import logging
import os
from types import ModuleType

import torch

logger = logging.getLogger("kdkernels")

BACKENDS = {"eager": ".eager", "native": ".native", "triton": ".triton.backend"}
DEVICE = {"native": "cpu", "triton": "cuda"}  # eager runs on any
_DESERVED = {"cpu": "native", "cuda": "triton"}  # what a device should run on; eager is the slower way out, and says so
_warned: set[str] = set()


def load(name: str) -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module(BACKENDS[name], __package__), ""
    except (ImportError, OSError) as error:
        return None, f"{type(error).__name__}: {error}"


def name_of(module: ModuleType) -> str:
    """What a backend is called."""
    return next(name for name, path in BACKENDS.items() if module.__name__ == __package__ + path)


def able(name: str, device: str, dtype: torch.dtype, operand: torch.dtype) -> tuple[ModuleType | None, str]:
    """Backend ``name`` if it can run these dtypes of logits and operands on ``device``, else the reason."""
    if name not in BACKENDS:
        return None, f"expected one of {', '.join(BACKENDS)}"
    interpreted = name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if name in DEVICE and device != DEVICE[name] and not interpreted:
        return None, f"it runs on {DEVICE[name]}, not on {device}"
    module, error = load(name)
    if module is None:
        return None, f"it does not load ({error})"
    for name_of_it, each in (("logits", dtype), ("gradients", operand)):  # a gradient has the operands' dtype
        if not module.supports(each):
            return None, f"it does not compute with {each} {name_of_it}"
    return module, ""


def choose(device: str, dtype: torch.dtype, operand: torch.dtype) -> tuple[ModuleType, str]:
    """The backend, and why it is not the one the device deserves (empty where it is, or where it was forced)."""
    name = os.environ.get("KDKERNELS_BACKEND")
    if name:
        module, reason = able(name, device, dtype, operand)
        if module is None:
            raise RuntimeError(f"KDKERNELS_BACKEND={name}: {reason}")
        return module, ""
    name = _DESERVED.get(device)
    if name is None:
        return load("eager")[0], f"{device} has no backend of its own yet"
    module, reason = able(name, device, dtype, operand)
    return (load("eager")[0], f"{name}: {reason}") if module is None else (module, "")


def backend_for(device: torch.device, dtype: torch.dtype, operand: torch.dtype | None = None) -> ModuleType:
    """The backend for logits of ``dtype`` over operands of ``operand`` (default: the same) on ``device``.

    ``KDKERNELS_BACKEND`` forces one. Otherwise the device's own, or eager with one warning that names the reason.

    Raises:
        RuntimeError: the forced backend does not exist or cannot run.
    """
    module, reason = choose(device.type, dtype, operand or dtype)
    if reason and reason not in _warned:
        _warned.add(reason)
        logger.warning("kdkernels uses its slow eager backend on %s: %s", device, reason)
    return module
