"""Row kernels: everything that reads or writes a chunk of logits.

``Backend`` (interface.py) is what the rest of kdkernels calls; registry.py lists the backends and chooses one.

- ``eager``: plain PyTorch after reference.py, for any device.
- ``native``: C++ for CPUs (csrc/).
- ``triton``: Triton for GPUs.

The last two are torch operators, which torch_ops.py calls. divided.py puts any of them over a vocabulary that the ranks
of a process group divide.
"""

from __future__ import annotations

from .divided import Divided, Shards, gathered
from .interface import Backend, Coefficients, Request, Rows, Summary, finished, merged
from .ranking import plackett_luce
from .registry import backend_for

__all__ = [
    "Backend",
    "Coefficients",
    "Divided",
    "Request",
    "Rows",
    "Shards",
    "Summary",
    "backend_for",
    "finished",
    "gathered",
    "merged",
    "plackett_luce",
]
