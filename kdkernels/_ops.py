"""The namespace of this package's torch operators.

kernel-builder and packaging/hub.py write another file in this place, with a namespace for each build: so several builds
can be loaded in one process. The C++ operators are in torch.ops.kdkernels always.
"""

import torch

ops = torch.ops.kdkernels


def add_op_namespace_prefix(name: str) -> str:
    """The qualified name of an operator."""
    return f"kdkernels::{name}"
