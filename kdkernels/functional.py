"""Per-token functions: values [...], differentiable under any later weighting; the backward recomputes the logits.

All take ``memory_budget`` (bytes of logits and workspace) and ``logits_dtype``, keyword-only. ``[...]`` are the
leading dimensions of ``student.hidden``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunked import Call, Program, Tokens, evaluate, run
from .divergences import Divergence
from .heads import Head, autocast_dtype, shared_vocabulary
from .layout import Layout

__all__ = ["TokenStatistics", "cross_entropy", "divergence", "entropy", "plackett_luce", "statistics"]


class _PerToken(Program):
    """One term, weighted by whatever gradient comes in."""

    def __init__(self, term: str, kind: Divergence | None = None, temperature: float = 1.0, topk: int = 0):
        self.term, self.divergence, self.temperature, self.topk = term, kind, temperature, topk
        self.plackett_luce = term == "plackett_luce"

    def coefficients(self, tokens: Tokens) -> dict[str, Tensor]:
        return {} if tokens.weight is None else {self.term: tokens.weight}


def check_head(name: str, head: object) -> None:
    if not isinstance(head, Head):
        raise TypeError(f"{name}: expected kd.Head, got {type(head).__name__}")


def check_ids(
    name: str, ids: Tensor, shape: torch.Size, vocabulary: int, device: torch.device, valid: Tensor | None = None
):
    """Token ids of the given shape and device; in range on CPUs, where looking costs nothing."""
    if not isinstance(ids, Tensor) or ids.dtype != torch.int64:
        raise TypeError(f"{name}: expected an int64 tensor, got {getattr(ids, 'dtype', type(ids).__name__)}")
    if ids.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(ids.shape)}")
    if ids.device != device:
        raise ValueError(f"{name}: expected device {device}, got {ids.device}")
    looked_at = ids if valid is None else ids[valid]
    if (
        ids.device.type == "cpu"
        and looked_at.numel()
        and not 0 <= int(looked_at.min()) <= int(looked_at.max()) < vocabulary
    ):
        raise ValueError(
            f"{name}: expected ids in [0, {vocabulary}), got {int(looked_at.min())} to {int(looked_at.max())}"
        )


def check_teacher(student: Head, teacher: object, same_positions: bool = True) -> None:
    """A teacher that fits the student: device, dtype and, unless a mask maps them, leading dimensions."""
    check_head("teacher", teacher)
    if teacher.hidden.device != student.hidden.device:
        raise ValueError(
            f"teacher: expected device {student.hidden.device} (the student's), got {teacher.hidden.device}"
        )
    if teacher.hidden.dtype != student.hidden.dtype and autocast_dtype(student.hidden.device) is None:
        raise TypeError(f"teacher: expected dtype {student.hidden.dtype} (the student's), got {teacher.hidden.dtype}")
    if same_positions and teacher.hidden.shape[:-1] != student.hidden.shape[:-1]:
        raise ValueError(
            f"teacher: expected hidden of shape {[*student.hidden.shape[:-1], 'H']}, got {list(teacher.hidden.shape)}"
        )


def _everything(student: Head, index: Tensor | None = None) -> Layout:
    """All positions (or those of ``index``) as one response."""
    total = student.hidden.shape[:-1].numel()
    index = torch.arange(total, device=student.hidden.device) if index is None else index
    return Layout(index, (len(index),) if len(index) else (), (1, total))


def _per_token(
    program: _PerToken, student: Head, teacher: Head | None, target: Tensor | None = None, **options
) -> Tensor:
    layout = _everything(student)
    call = Call(program, student, teacher, layout, teacher_index=layout.index, target=target, **options)
    return evaluate(call, per_token=program.term)[0].view(student.hidden.shape[:-1])


def cross_entropy(
    student: Head, target: Tensor, ignore_index: int = -100, *, memory_budget=None, logits_dtype=None
) -> Tensor:
    """-log q(target) in nats; target [...] int64 -> [...] fp32. 0 where target == ignore_index.

    Raises:
        TypeError, ValueError: target is not int64, has another shape or device than hidden, or an id outside the
        vocabulary.
    """
    check_head("student", student)
    keep = target != ignore_index
    check_ids("target", target, student.hidden.shape[:-1], student.vocabulary, student.hidden.device, keep)
    layout = _everything(student, keep.flatten().nonzero()[:, 0])
    call = Call(
        _PerToken("cross_entropy"),
        student,
        None,
        layout,
        target=target.flatten()[layout.index],
        memory_budget=memory_budget,
        logits_dtype=logits_dtype,
    )
    values = evaluate(call, per_token="cross_entropy")[0]
    return values.new_zeros(keep.numel()).index_copy(0, layout.index, values).view(keep.shape)


def entropy(student: Head, *, memory_budget=None, logits_dtype=None) -> Tensor:
    """H(q) = -sum_v q_v log q_v in nats -> [...] fp32."""
    check_head("student", student)
    program = _PerToken("entropy")
    return _per_token(program, student, None, memory_budget=memory_budget, logits_dtype=logits_dtype)


def divergence(
    student: Head, teacher: Head, kind: Divergence, temperature: float = 1.0, *, memory_budget=None, logits_dtype=None
) -> Tensor:
    """D(p, q) of teacher p and student q at ``temperature`` (no T^2 factor), in nats -> [...] fp32.

    ``kind``: kd.ForwardKL(), kd.ReverseKL(), kd.JSD(beta), kd.SkewKL(alpha) or kd.SkewReverseKL(alpha).

    Raises:
        TypeError, ValueError: heads that do not fit each other, a temperature that is not positive.
    """
    check_head("student", student)
    check_teacher(student, teacher)
    if not isinstance(kind, Divergence):
        raise TypeError(f"kind: expected a divergence such as kd.JSD(0.9), got {kind!r}")
    check_positive("temperature", temperature)
    program = _PerToken("divergence", kind, temperature)
    return _per_token(program, student, teacher, memory_budget=memory_budget, logits_dtype=logits_dtype)


def plackett_luce(student: Head, teacher: Head, k: int = 10, *, memory_budget=None, logits_dtype=None) -> Tensor:
    """NLL of the teacher's order of the student's k most likely words (TSD-KD eq. 4) -> [...] fp32.

    sum_{j=1..k} [ logsumexp(z_s[pi(j..k)]) - z_s[pi(j)] ], pi the teacher's descending order of them.

    Raises:
        TypeError, ValueError: heads that do not fit each other, k outside [1, vocabulary].
    """
    check_head("student", student)
    check_teacher(student, teacher)
    check_candidates(k)
    program = _PerToken("plackett_luce", topk=k)
    return _per_token(program, student, teacher, memory_budget=memory_budget, logits_dtype=logits_dtype)


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")


def check_candidates(k: int) -> None:
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k: expected an int of at least 1 candidate, got {k!r}")


@dataclass(frozen=True)
class TokenStatistics:
    """Per-token statistics, [...] each: nats, fp32; ids int64. Fields not asked for are None."""

    lse: Tensor  # log-sum-exp of the logits
    entropy: Tensor
    argmax: Tensor
    topk_indices: Tensor | None = None  # [..., K] by descending probability, ties to the smaller id
    topk_log_probs: Tensor | None = None  # [..., K]
    target_log_prob: Tensor | None = None
    teacher: TokenStatistics | None = None


def statistics(
    student: Head,
    teacher: Head | None = None,
    topk: int = 0,
    target: Tensor | None = None,
    *,
    memory_budget=None,
    logits_dtype=None,
) -> TokenStatistics:
    """Entropy, log-sum-exp, argmax, topk words and log q(target) of every token; no gradients.

    With a teacher, its statistics of the same positions under ``.teacher``.

    Raises:
        TypeError, ValueError: heads or target that do not fit, topk outside [0, vocabulary].
    """
    check_head("student", student)
    if teacher is not None:
        check_teacher(student, teacher)
    words = shared_vocabulary(student, teacher)
    if not isinstance(topk, int) or not 0 <= topk <= words:
        raise ValueError(f"topk: expected an int in [0, {words}], got {topk!r}")
    shape = student.hidden.shape[:-1]
    if target is not None:
        check_ids("target", target, shape, student.vocabulary, student.hidden.device)
        target = target.flatten()
    program = Program()
    program.topk = topk
    layout = _everything(student)
    options = {"memory_budget": memory_budget, "logits_dtype": logits_dtype}
    with torch.no_grad():
        call = Call(
            program, student.autocast(), teacher and teacher.autocast(), layout, layout.index, target, **options
        )
        result = run(call)
    if result is None:
        raise ValueError(f"student: expected at least one token, got hidden of shape {list(student.hidden.shape)}")
    return _statistics(result.tokens, shape)


def _statistics(tokens: Tokens, shape: torch.Size) -> TokenStatistics:
    def shaped(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.view((*shape, *t.shape[1:]))

    return TokenStatistics(
        lse=shaped(tokens.lse),
        entropy=shaped(tokens.entropy),
        argmax=shaped(tokens.argmax),
        topk_indices=shaped(tokens.top_indices),
        topk_log_probs=shaped(tokens.top_log_probs),
        target_log_prob=None if tokens.cross_entropy is None else -shaped(tokens.cross_entropy),
        teacher=None if tokens.teacher is None else _statistics(tokens.teacher, shape),
    )
