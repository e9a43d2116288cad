"""Opt-in tuning of the Triton row kernels: which block and how many warps are the fastest on the GPU at hand.

    from kdkernels.kernels.triton.tune import tune
    print(tune(vocabulary=151936, dtype=torch.float32))

Without it the sizes in backend.py are used, the same on every machine. A sum over the vocabulary is computed block by
block, so other sizes change its rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from triton.testing import do_bench

from ...divergences import JSD
from ..interface import Coefficients
from . import backend

SIZES = tuple((block, warps) for block in (1024, 2048, 4096, 8192) for warps in (4, 8, 16))
_SWEEPS = {"statistics": "_STATISTICS", "divergence": "_DIVERGENCE", "gradient": "_GRADIENT"}


def tune(
    vocabulary: int, dtype: torch.dtype = torch.float32, rows: int = 1024, device: str | torch.device = "cuda"
) -> dict[str, tuple[int, int]]:
    """Times each sweep of a JSD over random logits [rows, vocabulary] and has this process use the fastest sizes.

    -> sweep: (entries per block, warps), for this process. Takes some seconds, most of them compiling.
    """
    best = {}
    for sweep, run in _sweeps(vocabulary, dtype, rows, device).items():
        times = {}
        for sizes in SIZES:
            setattr(backend, _SWEEPS[sweep], sizes)
            times[sizes] = do_bench(run, return_mode="median")
        best[sweep] = min(times, key=times.get)
        setattr(backend, _SWEEPS[sweep], best[sweep])
    return best


def _sweeps(vocabulary: int, dtype: torch.dtype, rows: int, device) -> dict[str, Callable[[], object]]:
    def logits() -> Tensor:
        return (3 * torch.randn(rows, vocabulary, device=device)).to(dtype)

    def statistics():
        return backend.BACKEND.statistics(x, 1.0, None, 1.0, 1, None)

    x, divergence = logits(), JSD(0.9)
    student, teacher = statistics(), backend.BACKEND.statistics(logits(), 1.0, None, 1.0, 1, None)
    sums = backend.BACKEND.divergence(student, teacher, divergence, 1.0)[1]
    coefficients = Coefficients(
        torch.ones(3, rows, device=device), student.top_indices, torch.ones_like(student.top_values)
    )
    return {  # the last one writes over the logits of the others
        "statistics": statistics,
        "divergence": lambda: backend.BACKEND.divergence(student, teacher, divergence, 1.0),
        "gradient": lambda: backend.BACKEND.gradient_(student, teacher, divergence, 1.0, sums, coefficients, x),
    }
