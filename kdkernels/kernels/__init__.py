"""Row kernels: everything that touches a chunk of logits, behind one interface with one backend per kind of device.

``Backend`` (interface.py) is that interface, registry.py lists the backends and chooses. ``eager`` adapts reference.py
and runs anywhere; ``native`` is C++ for CPUs (csrc/), ``triton`` for GPUs; these two are torch operators behind one set
of adapters (torch_ops.py).
"""

from __future__ import annotations

from .interface import Backend, Coefficients, Request, Rows, Summary, finished, merged
from .ranking import plackett_luce
from .registry import backend_for

__all__ = [
    "Backend",
    "Coefficients",
    "Request",
    "Rows",
    "Summary",
    "backend_for",
    "finished",
    "merged",
    "plackett_luce",
]
