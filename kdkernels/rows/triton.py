"""Row kernels in Triton for CUDA tensors (triton_kernels.py): float32, bfloat16 and float16 logits, fp32 arithmetic.

Block sizes and warps are fixed, so that results do not depend on what a tuner found that day. With TRITON_INTERPRET=1
the kernels run on CPU tensors, slowly.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..divergences import Divergence
from . import triton_kernels as kernels
from .interface import Coefficients, Rows

# Words per block and warps of each sweep. 8 words a thread: two 16-byte loads of fp32 in flight, 32 to 64 registers
# (docs/triton-resources.md), so that 4 to 8 programs share a multiprocessor and 1000 rows still fill a large GPU.
_STATISTICS = (2048, 8)
_DIVERGENCE = (2048, 8)
_GRADIENT = (2048, 8)
_GROUP = 128  # words that share a maximum: one load of a warp; about sqrt(V / k) at V = 151936, k = 10
_MAXIMA_PER_WARP = 1024  # few warps: choosing candidates is a chain of reductions, and those across warps are slow
_SCATTER_WARPS = 4
_LAUNCH_ROWS = 4096  # bounds the group maxima; six waves of programs on the largest GPUs


def supports(dtype: torch.dtype) -> bool:
    return dtype in (torch.float32, torch.bfloat16, torch.float16)


def workspace(vocabulary: int) -> int:
    return 4 * _LAUNCH_ROWS * (triton.cdiv(vocabulary, _GROUP) + 256)  # group maxima; gradients at ids


def statistics(
    logits: Tensor, scale: float, softcap: float | None, temperature: float, topk: int, gather: Tensor | None
) -> Rows:
    count, vocabulary = logits.shape
    if not 1 <= topk <= vocabulary:
        raise ValueError(f"topk: expected 1 to {vocabulary} (the vocabulary), got {topk}")
    stats = logits.new_empty((count, 4), dtype=torch.float32)
    values = logits.new_empty((count, topk), dtype=torch.float32)
    indices = logits.new_empty((count, topk), dtype=torch.int64)
    gathered = None if gather is None else stats.new_empty(gather.shape)
    rows = Rows(logits, scale, softcap, stats, values, indices, gathered)
    for first in range(0, count, _LAUNCH_ROWS):
        step = slice(first, first + _LAUNCH_ROWS)
        _statistics(rows[step], temperature, None if gather is None else gather[step].contiguous())
    return rows


def _statistics(rows: Rows, temperature: float, gather: Tensor | None) -> None:
    (count, vocabulary), topk = rows.logits.shape, rows.top_values.shape[1]
    groups = triton.cdiv(vocabulary, _GROUP)
    maxima = rows.stats.new_empty((count, groups))
    block, warps = _block(_STATISTICS, vocabulary, least=_GROUP)
    x = {"x_ptr": rows.logits, "x_stride": _stride("logits", rows.logits), "vocabulary": vocabulary}
    x |= {"scale": rows.scale, "softcap": rows.softcap or 0.0, "SOFTCAP": rows.softcap is not None}
    x |= {"maxima_ptr": maxima, "groups": groups, "GROUP": _GROUP}
    _launch(
        kernels.statistics_kernel, count, warps, **x,
        inv_temperature=1 / temperature, stats_ptr=rows.stats, GROUPS=block // _GROUP, TEMPERED=temperature != 1,
    )  # fmt: skip
    padded = triton.next_power_of_2(groups)
    _launch(
        kernels.candidates_kernel, count, max(1, min(8, padded // _MAXIMA_PER_WARP)), **x,
        values_ptr=rows.top_values, indices_ptr=rows.top_indices, k=topk, ids_ptr=gather, gathered_ptr=rows.gathered,
        n_ids=0 if gather is None else gather.shape[1], GROUPS=padded, IDS=_padded(gather),
    )  # fmt: skip


def divergence(student: Rows, teacher: Rows, kind: Divergence, temperature: float) -> tuple[Tensor, Tensor]:
    count, vocabulary = student.logits.shape
    value, center = student.stats.new_empty((2, count))
    block, warps = _block(_DIVERGENCE, vocabulary)
    _launch(
        kernels.divergence_kernel, count, warps, **_sides(student, teacher), **_scalars(kind), a=kind.a,
        inv_temperature=1 / temperature, value_ptr=value, center_ptr=center, BLOCK=block,
    )  # fmt: skip
    return value, center


def gradient_(
    student: Rows,
    teacher: Rows | None,
    kind: Divergence | None,
    temperature: float,
    center: Tensor | None,
    coefficients: Coefficients,
    out: Tensor,
) -> None:
    count, vocabulary = student.logits.shape
    dense, ids, scatter = coefficients.dense, coefficients.ids.contiguous(), coefficients.scatter.contiguous()
    row = {**_sides(student, teacher if kind else None), **_scalars(kind), "inv_temperature": 1 / temperature}
    row |= {"TEMPERED": kind is not None and temperature != 1, "center_ptr": center, "dense_ptr": dense}
    row |= {"dense_stride": _stride("dense", dense), "ids_ptr": ids, "n_ids": ids.shape[1], "IDS": _padded(ids)}
    at_ids = torch.empty_like(scatter)
    if ids.shape[1]:
        _launch(kernels.scatter_kernel, count, _SCATTER_WARPS, **row, scatter_ptr=scatter, at_ids_ptr=at_ids)
    block, warps = _block(_GRADIENT, vocabulary)
    stride = _stride("out", out)
    _launch(
        kernels.gradient_kernel, count, warps, **row, at_ids_ptr=at_ids, out_ptr=out, out_stride=stride, BLOCK=block
    )


def _block(default: tuple[int, int], vocabulary: int, least: int = 128) -> tuple[int, int]:
    """Words per block and warps: the default, or a smaller block that the vocabulary fits in and its share of warps."""
    block = max(least, min(default[0], triton.next_power_of_2(vocabulary)))
    return block, max(1, default[1] * block // default[0])


def _padded(ids: Tensor | None) -> int:
    """Ids per row, rounded up: every size is a kernel of its own."""
    return 256 if ids is None else max(256, triton.next_power_of_2(ids.shape[1]))


def _stride(name: str, matrix: Tensor) -> int:
    """From row to row, in elements. The row after row is how narrow gradients find their place over wide logits."""
    if matrix.dim() != 2 or matrix.stride(1) != 1:
        raise ValueError(f"{name}: expected a matrix with contiguous rows, got strides {matrix.stride()}")
    return matrix.stride(0)


def _sides(student: Rows, teacher: Rows | None) -> dict:
    sides = {"vocabulary": student.logits.shape[1]}
    for key, rows in (("s", student), ("t", teacher or student)):  # without a teacher nothing reads its side
        sides |= {
            f"{key}_ptr": rows.logits,
            f"{key}_stride": _stride("logits", rows.logits),
            f"{key}_scale": rows.scale,
        }
        sides |= {f"{key}_softcap": rows.softcap or 0.0, f"{key}_stats_ptr": rows.stats}
        sides |= {f"{key.upper()}_SOFTCAP": rows.softcap is not None}
    return sides


def _scalars(kind: Divergence | None) -> dict:
    if kind is None:
        return {"b": 0.0, "mix": 0.0, "skew": 0.0, "MIXTURE": kernels.NONE}
    interior = kernels.INTERIOR if kind.skew else kernels.JSD
    mixture = {0.0: kernels.STUDENT, 1.0: kernels.TEACHER}.get(kind.mix, interior)
    return {"b": kind.b, "mix": kind.mix, "skew": kind.skew, "MIXTURE": mixture}


def _launch(kernel, programs: int, warps: int, **arguments) -> None:
    """One program per row, on the device of the logits, without fused multiply-adds but where the kernels say so."""
    if programs == 0:
        return
    device = next(value for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device_of(device):
        kernel[(programs,)](**arguments, num_warps=warps, enable_fp_fusion=False)
