"""The Triton backend, for CUDA tensors: float32, bfloat16 and float16 logits, fp32 arithmetic. See sweep.py.

Block sizes and numbers of warps are fixed, so that results do not depend on what a tuner found to be fastest. With
TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly.
"""

from __future__ import annotations

import functools
from ctypes import c_float

import torch
import triton
from torch import Tensor

from ..torch_ops import OperatorBackend, Operators
from . import pairs, scale, statistics
from .launch import Launch

# Entries per block and warps of each sweep. With 8 entries a thread has two 16-byte loads of fp32 in flight and needs
# 32 to 64 registers (docs/triton-resources.md), so that 4 to 8 programs share a multiprocessor and 1000 rows still fill
# a large GPU. Statistics have 16 entries a thread, because it updates its running maximum once for all of them.
_STATISTICS = (4096, 8)
_DIVERGENCE = (2048, 8)
_GRADIENT = (2048, 8)
_GROUP = 128  # entries that share a maximum: one load of a warp, and about sqrt(V / k) at V = 151936 and k = 10
_MAXIMA_PER_WARP = 1024  # so that warps are few: candidates are a chain of reductions, and those across warps are slow
_SCATTER_WARPS = 4
_LAUNCH_ROWS = 4096  # per launch, which bounds the memory of group maxima; this fills the largest GPUs six times

_statistics = Launch(statistics.statistics_kernel)
_candidates = Launch(statistics.candidates_kernel)
_divergence = Launch(pairs.divergence_kernel)
_scatter = Launch(pairs.scatter_kernel)
_gradient = Launch(pairs.gradient_kernel)


# ---- the functions (torch_ops.py) ------------------------------------------------------------------------------------


def row_statistics(
    logits: Tensor, scale: float, softcap: float, temperature: float,
    stats: Tensor, top_values: Tensor, top_indices: Tensor, gather_ids: Tensor | None, gathered: Tensor | None,
) -> None:  # fmt: skip
    (count, vocabulary), topk = logits.shape, top_values.shape[1]
    if count > _LAUNCH_ROWS:
        for first in range(0, count, _LAUNCH_ROWS):
            rows, outputs = slice(first, first + _LAUNCH_ROWS), (stats, top_values, top_indices, gather_ids, gathered)
            part = (None if each is None else each[rows] for each in outputs)
            row_statistics(logits[rows], scale, softcap, temperature, *part)
        return
    if not 1 <= topk <= vocabulary:
        raise ValueError(f"topk: expected 1 to {vocabulary} (the vocabulary), got {topk}")
    groups, padded, candidate_warps = _groups(vocabulary)
    block, warps = _block(_STATISTICS, vocabulary, _GROUP)
    vector, softcapped = 16 // max(2, logits.itemsize), softcap != 0
    tempered, inverse = _inverse(temperature)
    n_ids = 0 if gather_ids is None else gather_ids.shape[1]
    maxima = stats.new_empty((count, groups))
    common = logits, _stride("logits", logits), vocabulary, *_transform(scale, softcap)
    _statistics(
        count, warps, *common, *inverse, stats, maxima, groups, block, vector, _GROUP, tempered, softcapped
    )  # fmt: skip
    _candidates(
        count, candidate_warps, *common, maxima, groups, top_values, top_indices, topk, gather_ids, gathered, n_ids,
        padded, _GROUP, _ids_block(n_ids), softcapped,
    )  # fmt: skip


def row_divergence(
    student: Tensor, s_scale: float, s_softcap: float, s_stats: Tensor,
    teacher: Tensor, t_scale: float, t_softcap: float, t_stats: Tensor,
    a: float, b: float, mix: float, skew: float, temperature: float, sums: Tensor,
) -> None:  # fmt: skip
    count, vocabulary = student.shape
    block, warps = _block(_DIVERGENCE, vocabulary)
    mixture, weights, tempered, inverse = _mixture(a, b, mix, skew, temperature)
    _divergence(
        count, warps, *_model(student, s_scale, s_softcap, s_stats), *_model(teacher, t_scale, t_softcap, t_stats),
        vocabulary, float(a), *weights, *inverse, sums, block, mixture, tempered, s_softcap != 0, t_softcap != 0,
    )  # fmt: skip


def row_gradient_(
    student: Tensor, s_scale: float, s_softcap: float, s_stats: Tensor,
    teacher: Tensor | None, t_scale: float, t_softcap: float, t_stats: Tensor | None,
    a: float, b: float, mix: float, skew: float, temperature: float, sums: Tensor | None,
    coefficients: Tensor, ids: Tensor, scatter: Tensor, out_dtype: torch.dtype,
) -> None:  # fmt: skip
    (count, vocabulary), n_ids = student.shape, ids.shape[1]
    if out_dtype.itemsize > student.itemsize:
        raise ValueError(f"out_dtype: expected none wider than the logits' {student.dtype}, got {out_dtype}")
    if teacher is None:  # the kernels ask for its arguments, but do not read them
        other = _model(student, 1.0, 0.0, s_stats)
        mixture, weights, tempered, inverse = "none", (0.0, 0.0, 1.0), False, (1.0, 0.0)
    else:
        other = _model(teacher, t_scale, t_softcap, t_stats)
        mixture, weights, tempered, inverse = _mixture(a, b, mix, skew, temperature)
    models = *_model(student, s_scale, s_softcap, s_stats), *other
    common = *models, vocabulary, *weights, float(skew), *inverse, sums, coefficients, count, ids
    choices = _ids_block(n_ids), mixture, tempered, s_softcap != 0, t_softcap != 0
    at_ids = scatter  # of no ids nothing is written or read
    if n_ids:
        at_ids = torch.empty_like(scatter)
        _scatter(count, _SCATTER_WARPS, *common, scatter, at_ids, n_ids, *choices)
    block, warps = _block(_GRADIENT, vocabulary)
    out = student.view(out_dtype)
    _gradient(count, warps, *common, at_ids, n_ids, out, _stride("student", out), block, *choices)


# ---- arguments that the kernels share --------------------------------------------------------------------------------
# What follows from sizes and numbers alone is kept, because computing it takes as long as a launch.

_kept = functools.lru_cache(maxsize=256)


@_kept
def _block(default: tuple[int, int], vocabulary: int, least: int = 128) -> tuple[int, int]:
    """Entries per block and warps: the default, or for a small vocabulary one block and its share of the warps."""
    block = max(least, min(default[0], triton.next_power_of_2(vocabulary)))
    return block, max(1, default[1] * block // default[0])


@_kept
def _groups(vocabulary: int) -> tuple[int, int, int]:
    """Groups that share a maximum, this number rounded up, and the warps that find candidates among them."""
    groups = triton.cdiv(vocabulary, _GROUP)
    padded = triton.next_power_of_2(groups)
    return groups, padded, max(1, min(8, padded // _MAXIMA_PER_WARP))


@_kept
def _ids_block(count: int) -> int:
    """The number of ids per row, rounded up: a kernel is compiled for every size."""
    return max(256, triton.next_power_of_2(count))


def _stride(name: str, matrix: Tensor) -> int:
    """The stride from row to row, in elements; a narrow gradient over wide logits has another one."""
    strides = matrix.stride()
    if len(strides) != 2 or strides[1] != 1:
        raise ValueError(f"{name}: expected a matrix with contiguous rows, got strides {strides}")
    return strides[0]


def _model(logits: Tensor, scale: float, softcap: float, stats: Tensor) -> tuple:
    """Of the student or the teacher: logits, their stride, scale, softcap, statistics."""
    return logits, _stride("logits", logits), *_transform(scale, softcap), stats


def _transform(scale: float, softcap: float) -> tuple[float | None, float]:
    """``scale`` is None where there is nothing to multiply: a kernel without the multiplication is compiled for it."""
    return None if scale == 1 and not softcap else float(scale), float(softcap)


@_kept
def _mixture(a: float, b: float, mix: float, skew: float, temperature: float) -> tuple[str, tuple, bool, tuple]:
    """Which mixture it is; b and both weights of the mixture; what _inverse returns.

    The weights are each rounded to fp32: as 1 - mix, computed in fp32, the smaller one might be 0. Those of a JSD are
    rounded so that their sum is 1.
    """
    interior = "jsd" if skew == 0 and a * b > 0 else "interior"
    mixture = {0.0: "student", 1.0: "teacher"}.get(mix, interior)
    weights = _sum_to_one(mix) if mixture == "jsd" else (float(mix), 1.0 - mix)
    return mixture, (float(b), *weights), *_inverse(temperature)


def _sum_to_one(mix: float) -> tuple[float, float]:
    """fp32 weights close to mix and 1 - mix whose rounded sum is 1.

    The smaller one may be off by 2^-25, to which a JSD is insensitive, because it is stationary in its weights. Where
    2^-25 is much of it, the exact sum of the weights is off instead.
    """
    small = c_float(min(mix, 1 - mix)).value
    large = c_float(1 - small).value
    small = 1 - large if small > 1 / 64 else small
    return (small, large) if mix < 0.5 else (large, small)


@_kept
def _inverse(temperature: float) -> tuple[bool, tuple[float, float]]:
    """Whether T is another one than 1, and 1 / T as the sum of two fp32 numbers."""
    inverse = c_float(1 / temperature).value
    return temperature != 1, (inverse, 1 / temperature - inverse)


class Triton(OperatorBackend):
    name = "triton"

    def workspace(self, rows: int, vocabulary: int) -> int:
        return 4 * min(rows, _LAUNCH_ROWS) * (triton.cdiv(vocabulary, _GROUP) + 256)  # group maxima; gradients at ids

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        scale.scale_(gradient, factor)


BACKEND = Triton(Operators(row_statistics, row_divergence, row_gradient_))
