"""Row kernels: everything that touches a chunk of logits, behind one interface with one backend per kind of device.

A backend is a module with

    supports(dtype) -> bool                          dtypes of logits and of their gradient
    workspace(rows, vocabulary) -> int               bytes it may allocate beside its outputs for so many rows
    statistics(logits, scale, softcap, temperature, topk, gather) -> Rows
    divergence(student, teacher, kind, temperature) -> (value [C], center [C])
    gradient_(student, teacher, kind, temperature, center, coefficients, out)      `out` lies over the student's logits
    scale_(gradient, factor)                         gradient *= factor [], which only the device knows (not native)

``eager`` adapts reference.py and runs anywhere; ``native`` is C++ for CPUs (csrc/), ``triton`` for GPUs; these two are
torch operators behind one set of adapters (torch_ops.py). They know rows and coefficients, no method names.
"""

from __future__ import annotations

from .interface import Coefficients, Rows, Summary
from .ranking import plackett_luce
from .registry import backend_for

__all__ = ["Coefficients", "Rows", "Summary", "backend_for", "plackett_luce"]
