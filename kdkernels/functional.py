"""Per-token functions. Their values are differentiable under any later weighting; the backward recomputes the logits.

All take these keyword arguments:

    rows            the positions to compute; the values of all others are 0. Distinct int64 or int32 positions [n] over
                    the flattened leading dimensions, a bool mask [...] (on a GPU it costs a sync), or a kd.Layout
    memory_budget   bytes of logits and workspace
    logits_dtype    of the logits that a head multiplies

Axes: [...] the leading dimensions of the student's hidden states or logits, n positions, K entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_count, check_temperature
from .divergences import Divergence
from .engine import operators
from .engine.autograd import needed
from .layout import Layout
from .sources import (
    Source,
    check_complete,
    check_student,
    check_teacher,
    packed,
    shared_vocabulary,
)
from .tensors import check_integral

__all__ = ["TokenStatistics", "cross_entropy", "divergence", "entropy", "plackett_luce", "statistics"]


# ---- checks ----------------------------------------------------------------------------------------------------------


def check_ids(name: str, ids: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """The token ids in int64, after their type, shape and device are checked. On CPUs their range is checked where they
    are used."""
    check_integral(name, ids)
    if ids.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"{name}: expected device {device}, got {ids.device}")
    return ids.long()


def _check_shift(target: Tensor, rows: Tensor | Layout | None, device: torch.device) -> Tensor:
    """The target, which ``Layout.at`` refuses where ``rows`` is a layout made from labels that differ."""
    if not isinstance(rows, Layout) or rows.token is None or rows.shape != target.shape:  # _check_rows refuses the last
        return target
    layout = rows.to(device)
    return target.flatten().index_copy(0, layout.index, layout.at(target)).view(target.shape)


def check_limits(memory_budget: int | None, logits_dtype: torch.dtype | None) -> None:
    if memory_budget is not None and (isinstance(memory_budget, bool) or not isinstance(memory_budget, int)):
        raise TypeError(f"memory_budget: expected an int (bytes) or None, got {memory_budget!r}")
    if logits_dtype is not None and not isinstance(logits_dtype, torch.dtype):
        raise TypeError(f"logits_dtype: expected a torch.dtype or None, got {logits_dtype!r}")


def _check_rows(rows: Tensor | Layout | None, student: Source) -> Tensor | None:
    if rows is None:
        return None
    if isinstance(rows, Layout):
        if rows.shape != student.shape:
            raise ValueError(f"rows: expected a layout of shape {list(student.shape)}, got {list(rows.shape)}")
        return rows.index.to(student.device, non_blocking=student.device.type != "cpu")
    if not isinstance(rows, Tensor) or rows.dtype not in (torch.int64, torch.int32, torch.bool):
        got = getattr(rows, "dtype", type(rows).__name__)
        raise TypeError(f"rows: expected int64 or int32 positions, a bool mask or a kd.Layout, got {got}")
    rows = rows if rows.dtype == torch.bool else rows.long()
    expected = student.shape if rows.dtype == torch.bool else (rows.numel(),)
    if rows.shape != expected:
        raise ValueError(f"rows: expected shape {list(expected)}, got {list(rows.shape)}")
    if rows.device.type == "cpu" and student.device.type != "cpu":  # searching a mask on the CPU costs no sync
        index = rows.flatten().nonzero()[:, 0] if rows.dtype == torch.bool else rows
        return index.to(student.device, non_blocking=True)
    if rows.device != student.device:
        raise ValueError(f"rows: expected device {student.device} (the student's) or the CPU, got {rows.device}")
    return rows


# ---- differentiable --------------------------------------------------------------------------------------------------


def _term(
    name: str,
    student: Source,
    teacher: Source | None = None,
    *,
    divergence: Divergence | None = None,
    temperature: float = 1.0,
    topk: int = 0,
    target: Tensor | None = None,
    ignore_index: int | None = None,
    rows: Tensor | Layout | None,
    memory_budget: int | None,
    logits_dtype: torch.dtype | None,
) -> Tensor:
    """One term's value at every position."""
    check_limits(memory_budget, logits_dtype)
    rows = _check_rows(rows, student)
    student = student.autocast()
    tensors, *about_student = packed(student)
    teachers, *about_teacher = packed(teacher and teacher.autocast())
    return operators.token_values(
        tensors,
        *about_student,
        [t.detach() for t in teachers],
        *about_teacher,
        target,
        rows,
        name,
        [divergence.a, divergence.b, divergence.mix, divergence.detached] if divergence else [],
        float(temperature),
        topk,
        ignore_index,
        memory_budget,
        logits_dtype,
        list(needed(student))[: len(tensors)],
    )


def cross_entropy(
    student: Source,
    target: Tensor,
    ignore_index: int = -100,
    *,
    rows: Tensor | Layout | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """-log q(target), in nats.

    Nothing shifts internally, and nothing here can tell Hugging Face labels, which hold the token *at* a position, from
    a target. ``kd.Layout.targets(labels)`` shifts them, as does the ``target`` of ``layout =
    kd.Layout.from_labels(labels)``; with ``rows=layout`` a target that was not shifted is refused.

    Args:
        student: kd.Head, kd.Logits or another trainable source.
        target: [...] int64 or int32, the token that each position predicts.
        ignore_index: the target of positions whose value is 0. CPUs skip these; GPUs compute them, because finding them
            would cost a sync. ``rows=`` skips positions everywhere.
        rows, memory_budget, logits_dtype: see above.

    Returns:
        [...] fp32.

    Raises:
        TypeError: target is neither int64 nor int32.
        ValueError: target has another shape or device than the student. On CPUs also an id outside the vocabulary, or a
            token other than that of the labels ``rows`` was made from; on GPUs its value is NaN.
    """
    check_student(student)
    target = check_ids("target", target, student.shape, student.device)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    target = _check_shift(target, rows, student.device)
    options = {"rows": rows, "memory_budget": memory_budget, "logits_dtype": logits_dtype}
    return _term("cross_entropy", student, target=target, ignore_index=ignore_index, **options)


def entropy(
    student: Source,
    *,
    rows: Tensor | Layout | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """H(q) = -sum_v q_v log q_v, in nats.

    Args:
        student: kd.Head, kd.Logits or another trainable source.
        rows, memory_budget, logits_dtype: see above.

    Returns:
        [...] fp32.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    check_student(student)
    return _term("entropy", student, rows=rows, memory_budget=memory_budget, logits_dtype=logits_dtype)


def divergence(
    student: Source,
    teacher: Source,
    divergence: Divergence,
    temperature: float = 1.0,
    *,
    rows: Tensor | Layout | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """D(p, q) of teacher p and student q, in nats.

    Args:
        student: kd.Head, kd.Logits or another trainable source.
        teacher: any source. With a kd.TopK both distributions are coarsened to its entries and a bucket of all others,
            or the divergence is estimated from entries that it drew.
        divergence: kd.ForwardKL(), kd.ReverseKL(), kd.JSD(beta), kd.SkewKL(alpha) or kd.SkewReverseKL(alpha).
        temperature: divides both models' logits; there is no T^2 factor.
        rows, memory_budget, logits_dtype: see above.

    Returns:
        [...] fp32.

    Raises:
        TypeError, ValueError: student and teacher do not fit each other, or temperature is outside [0.001, 1000], or
            not 1 with a kd.TopK that keeps its bucket or was drawn, or divergence a reverse KL with one that was drawn.
    """
    check_student(student)
    check_teacher(student, teacher)
    if not isinstance(divergence, Divergence):
        raise TypeError(f"divergence: expected one such as kd.JSD(0.9), got {divergence!r}")
    check_temperature(temperature)
    options = {"rows": rows, "memory_budget": memory_budget, "logits_dtype": logits_dtype}
    return _term("divergence", student, teacher, divergence=divergence, temperature=temperature, **options)


def plackett_luce(
    student: Source,
    teacher: Source,
    k: int = 10,
    *,
    rows: Tensor | Layout | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> Tensor:
    """The negative log-likelihood of the teacher's order of the student's k most likely entries, in nats.

        sum_{j=1..k} [ logsumexp(z_s[pi(j..k)]) - z_s[pi(j)] ],  pi the teacher's descending order of these entries

    Args:
        student: kd.Head, kd.Logits or another trainable source.
        teacher: a source that knows all entries.
        k: how many entries are ranked.
        rows, memory_budget, logits_dtype: see above.

    Returns:
        [...] fp32.

    Raises:
        TypeError, ValueError: student and teacher do not fit each other, teacher is a kd.TopK, or k is outside
            [1, vocabulary].

    Source: "Explain in Your Own Words: Improving Reasoning via Token-Selective Dual Knowledge Distillation"
        (arXiv 2603.13260), eq. 4.
    """
    check_student(student)
    check_teacher(student, teacher)
    check_count("k", k, 1, shared_vocabulary(student, teacher))
    options = {"rows": rows, "memory_budget": memory_budget, "logits_dtype": logits_dtype}
    return _term("plackett_luce", student, teacher, topk=k, **options)


# ---- statistics ------------------------------------------------------------------------------------------------------

_LARGEST = 128  # as many probabilities as a collision may sum up


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of every token: [...] each, fp32 and in nats, ids int64. Fields that were not asked for are None."""

    lse: Tensor  # log-sum-exp of the logits
    entropy: Tensor
    argmax: Tensor  # id of the most likely entry
    topk_indices: Tensor | None = None  # [..., K] by descending probability, ties to the smaller id
    topk_log_probs: Tensor | None = None  # [..., K]
    target_log_prob: Tensor | None = None
    collision: Tensor | None = None  # sum of the squares of the largest probabilities
    teacher: TokenStatistics | None = None


def statistics(
    student: Source,
    teacher: Source | None = None,
    topk: int = 0,
    target: Tensor | None = None,
    *,
    collision: int = 0,
    rows: Tensor | Layout | None = None,
    memory_budget: int | None = None,
    logits_dtype: torch.dtype | None = None,
) -> TokenStatistics:
    """Entropy, log-sum-exp, argmax and, where asked for, more of every token. They have no gradients.

    Args:
        student: kd.Head, kd.Logits or another trainable source.
        teacher: a source that knows all entries. Its statistics, without topk entries, are in ``.teacher``.
        topk: how many of the student's most likely entries to give.
        target: [...] int64 or int32, tokens whose log-probability to give.
        collision: how many of the largest probabilities, at most 128, to square and sum up.
        rows, memory_budget, logits_dtype: see above.

    Returns:
        TokenStatistics.

    Raises:
        TypeError, ValueError: student, teacher or target do not fit, teacher is a kd.TopK, topk is outside
            [0, vocabulary] or collision outside [0, min(128, vocabulary)].
    """
    check_student(student)
    if teacher is not None:
        check_teacher(student, teacher)
        check_complete(teacher, "statistics are of all entries")
    vocabulary = shared_vocabulary(student, teacher)
    check_count("topk", topk, 0, vocabulary)
    check_count("collision", collision, 0, min(_LARGEST, vocabulary))
    if target is not None:
        target = check_ids("target", target, student.shape, student.device)
        target = _check_shift(target, rows, student.device)
    check_limits(memory_budget, logits_dtype)
    rows = _check_rows(rows, student)
    student, teacher = (source and source.autocast().detach() for source in (student, teacher))
    values = operators.token_statistics(
        *packed(student), *packed(teacher), target, rows, topk, collision, memory_budget, logits_dtype
    )
    names = operators.statistic_names(topk, target is not None, collision)
    if teacher is None:
        return _statistics(names, values)
    of_teacher = operators.statistic_names(0, target is not None, collision)
    return _statistics(names, values[: len(names)], _statistics(of_teacher, values[len(names) :]))


def _statistics(names: list[str], values: list[Tensor], teacher: TokenStatistics | None = None) -> TokenStatistics:
    found = dict(zip(names, values, strict=True))
    return TokenStatistics(
        lse=found["lse"],
        entropy=found["entropy"],
        argmax=found["argmax"],
        topk_indices=found.get("top_indices"),
        topk_log_probs=found.get("top_log_probs"),
        target_log_prob=-found["cross_entropy"] if "cross_entropy" in found else None,
        collision=found.get("collision"),
        teacher=teacher,
    )
