"""The Triton backend, for CUDA tensors: float32, bfloat16 and float16 logits, fp32 arithmetic. See sweep.py.

Block sizes and numbers of warps are fixed, so that results do not depend on what a tuner found to be fastest. With
TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly.
"""

from __future__ import annotations

from ctypes import c_float

import torch
import triton
from torch import Tensor

from ..._ops import add_op_namespace_prefix
from ..torch_ops import OperatorBackend, Operators
from . import pairs, scale, statistics

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


# ---- the operators (torch_ops.py) ------------------------------------------------------------------------------------


def row_statistics(
    logits: Tensor, scale: float, softcap: float, temperature: float,
    stats: Tensor, top_values: Tensor, top_indices: Tensor, gather_ids: Tensor | None, gathered: Tensor | None,
) -> None:  # fmt: skip
    (count, vocabulary), topk = logits.shape, top_values.shape[1]
    if not 1 <= topk <= vocabulary:
        raise ValueError(f"topk: expected 1 to {vocabulary} (the vocabulary), got {topk}")
    groups = triton.cdiv(vocabulary, _GROUP)
    padded = triton.next_power_of_2(groups)
    block, warps = _block(_STATISTICS, vocabulary, least=_GROUP)
    maxima = stats.new_empty((min(count, _LAUNCH_ROWS), groups))
    for first in range(0, count, _LAUNCH_ROWS):
        rows = slice(first, first + _LAUNCH_ROWS)
        x = logits[rows]
        common = {"x_ptr": x, "x_stride": _stride("logits", x), "vocabulary": vocabulary, "maxima_ptr": maxima}
        common |= {**_transform(scale, softcap), "SOFTCAP": softcap != 0, "groups": groups, "GROUP": _GROUP}
        _launch(
            statistics.statistics_kernel, len(x), warps, **common, **_inverse(temperature),
            stats_ptr=stats[rows], BLOCK=block, VECTOR=16 // max(2, x.itemsize),
        )  # fmt: skip
        ids = None if gather_ids is None else gather_ids[rows]
        _launch(
            statistics.candidates_kernel, len(x), max(1, min(8, padded // _MAXIMA_PER_WARP)), **common,
            values_ptr=top_values[rows], indices_ptr=top_indices[rows], k=topk, GROUPS=padded,
            ids_ptr=ids, gathered_ptr=None if gathered is None else gathered[rows], **_sizes(ids),
        )  # fmt: skip


def row_divergence(
    student: Tensor, s_scale: float, s_softcap: float, s_stats: Tensor,
    teacher: Tensor, t_scale: float, t_softcap: float, t_stats: Tensor,
    a: float, b: float, mix: float, skew: float, temperature: float, sums: Tensor,
) -> None:  # fmt: skip
    count, vocabulary = student.shape
    block, warps = _block(_DIVERGENCE, vocabulary)
    _launch(
        pairs.divergence_kernel, count, warps, vocabulary=vocabulary,
        **_model("s", student, s_scale, s_softcap, s_stats), **_model("t", teacher, t_scale, t_softcap, t_stats),
        a=a, **_mixture(a, b, mix, skew), **_inverse(temperature), sums_ptr=sums, BLOCK=block,
    )  # fmt: skip


def row_gradient_(
    student: Tensor, s_scale: float, s_softcap: float, s_stats: Tensor,
    teacher: Tensor | None, t_scale: float, t_softcap: float, t_stats: Tensor | None,
    a: float, b: float, mix: float, skew: float, temperature: float, sums: Tensor | None,
    coefficients: Tensor, ids: Tensor, scatter: Tensor, out_dtype: torch.dtype,
) -> None:  # fmt: skip
    count, vocabulary = student.shape
    if out_dtype.itemsize > student.itemsize:
        raise ValueError(f"out_dtype: expected none wider than the logits' {student.dtype}, got {out_dtype}")
    out = student.view(out_dtype)[:, :vocabulary]
    common = {"vocabulary": vocabulary, **_model("s", student, s_scale, s_softcap, s_stats)}
    if teacher is None:  # the kernels ask for its arguments, but do not read them
        common |= {**_model("t", student, 1.0, 0.0, s_stats), **_inverse(1.0)}
        common |= {"b": 0.0, "mix": 0.0, "rest": 1.0, "skew": 0.0, "MIXTURE": pairs.NONE}
    else:
        common |= {**_model("t", teacher, t_scale, t_softcap, t_stats), **_inverse(temperature)}
        common |= {**_mixture(a, b, mix, skew), "skew": skew}
    common |= {"sums_ptr": sums, "dense_ptr": coefficients, "dense_stride": count, "ids_ptr": ids, **_sizes(ids)}
    at_ids = torch.empty_like(scatter)
    if ids.shape[1]:
        _launch(pairs.scatter_kernel, count, _SCATTER_WARPS, **common, scatter_ptr=scatter, at_ids_ptr=at_ids)
    block, warps = _block(_GRADIENT, vocabulary)
    place = {"out_ptr": out, "out_stride": _stride("student", out)}
    _launch(pairs.gradient_kernel, count, warps, **common, at_ids_ptr=at_ids, **place, BLOCK=block)


def _block(default: tuple[int, int], vocabulary: int, least: int = 128) -> tuple[int, int]:
    """Entries per block and warps: the default, or for a small vocabulary one block and its share of the warps."""
    block = max(least, min(default[0], triton.next_power_of_2(vocabulary)))
    return block, max(1, default[1] * block // default[0])


def _stride(name: str, matrix: Tensor) -> int:
    """The stride from row to row, in elements; a narrow gradient over wide logits has another one."""
    if matrix.dim() != 2 or matrix.stride(1) != 1:
        raise ValueError(f"{name}: expected a matrix with contiguous rows, got strides {matrix.stride()}")
    return matrix.stride(0)


# ---- arguments that the kernels share --------------------------------------------------------------------------------


def _model(key: str, logits: Tensor, scale: float, softcap: float, stats: Tensor) -> dict:
    """Of the student (``key`` s) or the teacher (t)."""
    arguments = {f"{key}_ptr": logits, f"{key}_stride": _stride("logits", logits), f"{key}_stats_ptr": stats}
    arguments |= {f"{key}_{name}": value for name, value in _transform(scale, softcap).items()}
    return arguments | {f"{key.upper()}_SOFTCAP": softcap != 0}


def _transform(scale: float, softcap: float) -> dict:
    """``scale`` is None where there is nothing to multiply: a kernel without the multiplication is compiled for it."""
    return {"scale": None if scale == 1 and not softcap else scale, "softcap": softcap}


def _mixture(a: float, b: float, mix: float, skew: float) -> dict:
    """Which mixture it is, and both of its weights, each rounded to fp32: as 1 - mix, computed in fp32, the smaller one
    might be 0. Those of a JSD are rounded so that their sum is 1."""
    interior = pairs.JSD if skew == 0 and a * b > 0 else pairs.INTERIOR
    mixture = {0.0: pairs.STUDENT, 1.0: pairs.TEACHER}.get(mix, interior)
    weights = _sum_to_one(mix) if mixture == pairs.JSD else (mix, 1 - mix)
    return {"b": b, "mix": weights[0], "rest": weights[1], "MIXTURE": mixture}


def _sum_to_one(mix: float) -> tuple[float, float]:
    """fp32 weights close to mix and 1 - mix whose rounded sum is 1.

    The smaller one may be off by 2^-25, to which a JSD is insensitive, because it is stationary in its weights. Where
    2^-25 is much of it, the exact sum of the weights is off instead.
    """
    small = c_float(min(mix, 1 - mix)).value
    large = c_float(1 - small).value
    small = 1 - large if small > 1 / 64 else small
    return (small, large) if mix < 0.5 else (large, small)


def _inverse(temperature: float) -> dict:
    """1 / T as the sum of two fp32 numbers."""
    inverse = c_float(1 / temperature).value
    return {"inverse": inverse, "inverse_rest": 1 / temperature - inverse, "TEMPERED": temperature != 1}


def _sizes(ids: Tensor | None) -> dict:
    """The number of ids per row, and that number rounded up: a kernel is compiled for every size of ``IDS``."""
    count = 0 if ids is None else ids.shape[1]
    return {"n_ids": count, "IDS": max(256, triton.next_power_of_2(count))}


def _launch(kernel, programs: int, warps: int, **arguments) -> None:
    """Launches one program per row on the device of the logits. Multiply-adds are fused where the kernel says so."""
    if programs == 0:
        return
    for name, value in arguments.items():
        # only arguments with a stride, which are rows of logits, may have gaps between their rows
        if isinstance(value, Tensor) and not value.is_contiguous() and f"{name[:-4]}_stride" not in arguments:
            raise ValueError(f"{name.removesuffix('_ptr')}: expected a contiguous tensor, got strides {value.stride()}")
    # by position: with names Triton's JIT takes a third longer
    positional = [arguments[name] for name in kernel.arg_names]
    with torch.cuda.device_of(positional[0]):
        kernel[(programs,)](*positional, num_warps=warps, enable_fp_fusion=False)


def _register() -> Operators:
    written = {
        row_statistics: ("stats", "top_values", "top_indices", "gathered"),
        row_divergence: ("sums",),
        row_gradient_: ("student",),
    }
    for function, mutated in written.items():
        name = add_op_namespace_prefix(f"triton_{function.__name__}")
        torch.library.define(name, torch.library.infer_schema(function, mutates_args=mutated))
        # torch.library.custom_op would take 30 microseconds more per call
        torch.library.impl(name, ("cuda", "cpu"))(function)
    return Operators.registered("triton_")


class Triton(OperatorBackend):
    name = "triton"

    def workspace(self, rows: int, vocabulary: int) -> int:
        return 4 * min(rows, _LAUNCH_ROWS) * (triton.cdiv(vocabulary, _GROUP) + 256)  # group maxima; gradients at ids

    def scale_(self, gradient: Tensor, factor: Tensor) -> None:
        scale.scale_(gradient, factor)


BACKEND = Triton(_register())
