"""The one place where a backend is chosen."""

from __future__ import annotations

import importlib
import logging
import os
from typing import NamedTuple

import torch

from .interface import Backend, Request

logger = logging.getLogger("kdkernels")


class Entry(NamedTuple):
    """Where a backend is found and on which devices it runs: what is known of it before it is loaded."""

    module: str  # has the backend as BACKEND; a name that begins with a dot is one of this package
    device: str | None  # the type of device; None: any


BACKENDS = {  # in order of preference
    "native": Entry(f"{__package__}.native", "cpu"),
    "triton": Entry(f"{__package__}.triton.backend", "cuda"),
    "eager": Entry(f"{__package__}.eager", None),
}
_logged: set[str] = set()


class Choice(NamedTuple):
    backend: Backend
    why: str
    slow: bool  # whether a faster backend of this device was passed over, or there is none


def load(name: str) -> tuple[Backend | None, str]:
    """The backend and an empty string, or None and the reason why it does not load."""
    try:
        return importlib.import_module(BACKENDS[name].module, __package__).BACKEND, ""
    except (ImportError, OSError) as error:
        return None, f"{type(error).__name__}: {error}"


def able(name: str, request: Request) -> tuple[Backend | None, str]:
    """Backend ``name`` and an empty string if it can compute this, else None and the reason."""
    if name not in BACKENDS:
        return None, f"expected one of {', '.join(sorted(BACKENDS))}"
    device = BACKENDS[name].device
    interpreted = name == "triton" and request.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device not in (None, request.device) and not interpreted:
        return None, f"it runs on {device}, not on {request.device}"
    backend, error = load(name)
    if backend is None:
        return None, f"it does not load ({error})"
    refusal = backend.refusal(request)
    return (None, refusal) if refusal else (backend, "")


def choose(request: Request) -> Choice:
    """The backend that KDKERNELS_BACKEND names, otherwise the first of this device that can compute this.

    Raises:
        RuntimeError: the named backend does not exist or cannot compute this; where none is named, no backend can.
    """
    name = os.environ.get("KDKERNELS_BACKEND")
    if name:
        backend, reason = able(name, request)
        if backend is None:
            raise RuntimeError(f"KDKERNELS_BACKEND={name}: {reason}")
        return Choice(backend, f"KDKERNELS_BACKEND={name}", False)
    passed = []
    for name, entry in BACKENDS.items():
        if entry.device not in (None, request.device):
            continue
        backend, reason = able(name, request)
        if backend is None:
            passed.append(f"{name}: {reason}")
        elif passed:
            return Choice(backend, "; ".join(passed), True)
        elif entry.device is None:
            return Choice(backend, f"{request.device} has no backend of its own yet", True)
        else:
            return Choice(backend, f"it is the first choice on {request.device}", False)
    raise RuntimeError(f"no backend computes this on {request.device}: {'; '.join(passed)}")


def backend_for(device: torch.device, dtype: torch.dtype, operand: torch.dtype | None = None) -> Backend:
    """The backend for logits of ``dtype`` over operands of ``operand`` (default: the same) on ``device``.

    ``KDKERNELS_BACKEND`` names one. Otherwise it is the device's own, or eager with one warning that names the reason.

    Raises:
        RuntimeError: the named backend does not exist or cannot run.
    """
    backend, why, slow = choose(Request(device.type, dtype, operand or dtype))
    if why not in _logged:
        _logged.add(why)
        level, what = (logging.WARNING, "slow ") if slow else (logging.INFO, "")
        logger.log(level, "kdkernels uses its %s%s backend on %s: %s", what, backend.name, device, why)
    return backend
