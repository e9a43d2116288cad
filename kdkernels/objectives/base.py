"""What all objectives share: checking the inputs, running the chunk loop, reporting.

Axes: B rows of the batch, L positions, N response tokens, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checks import check_positive
from ..engine.autograd import evaluate, needed
from ..engine.operators import check_range
from ..engine.spec import Call, Program
from ..engine.terms import Term, Terms
from ..engine.tokens import Tokens
from ..functional import check_ids, check_limits
from ..layout import SHIFT, Layout
from ..sources import Source, check_student, check_teacher
from ..trainers import check_divided

OWN_METRICS = {"loss", "nonfinite_tokens"}  # which no term's may replace
AUTHORS = ("teacher", "student")  # groups of tokens, by who wrote their response


class Output(NamedTuple):
    """A differentiable loss, the count of this batch, and detached scalar metrics (none without tokens).

    count: the responses, tokens or prompts of this batch, whichever the objective's ``reduction`` counts, and of "sum"
    1. The loss is a mean over that many, or over as many as a ``denominator`` says: then the loss, its metric and those
    of the terms are this batch's part of a larger mean, and what batches and processes have adds up to it.

    A tuple, because DDP and DeepSpeed look for a forward's tensors in tuples, lists and dicts only: a loss they do not
    find is one whose backward they do not prepare for.
    """

    loss: Tensor
    count: Tensor
    metrics: dict[str, Tensor]


class Uncompiled(nn.Module):
    """A module that torch.compile leaves as it is, with one graph break before it."""

    def __call__(self, *arguments, **options):
        call = super().__call__
        if torch.compiler.is_compiling():  # a decorator would load the compiler (3 s) at import
            call = torch.compiler.disable(call)
        return call(*arguments, **options)


class Objective(Program, Uncompiled):
    """A loss over the response tokens of a batch, made of the loss L_r of each response r with len_r tokens.

        reduction     loss
        "responses"   sum_r L_r / responses
        "tokens"      sum_r len_r L_r / tokens: where L_r is a mean over tokens, the mean over all tokens of the batch
        "prompts"     sum_r len_r L_r / prompts, of an objective that tells authors apart
        "sum"         sum_r len_r L_r

    ``Output.count`` is the number of responses, tokens or prompts of a batch. A call's ``denominator`` takes its place
    (and that of "sum", which is 1): the number in all batches of an optimizer step, accumulation and processes
    included, so that these batches' losses add up to the loss of the step. Hugging Face's ``num_items_in_batch`` counts
    tokens: it belongs to "tokens". Where a wrapper averages the gradients of P processes (DDP), multiply the loss by P.

    A subclass has ``terms`` by name (an attribute or a property), and ``coefficients`` says what each counts in L_r at
    each token, whatever the reduction; the gradients of all terms are written together. What a term contributes to the
    loss is among the metrics under its name. A term of the group "teacher" or "student" counts in responses that this
    model wrote.

    Args:
        reduction: how the responses' losses become the loss; by default the class's attribute.
    """

    needs_weights: bool = False
    reduction: str = "responses"
    reductions: tuple[str, ...] = ("responses", "tokens", "sum")  # that it may have

    def __init__(self, reduction: str | None = None):
        super().__init__()
        if reduction is not None:
            self.reduction = reduction
        self._check_reduction()

    def __getattr__(self, name: str):
        """What is missing. Where a property (``terms``) raised that error itself, it is asked again, so that the error
        names what is missing there: nn.Module would say that there is no such property."""
        of_class = getattr(type(self), name, None)
        return of_class.fget(self) if isinstance(of_class, property) else super().__getattr__(name)

    def forward(
        self,
        student: Source,
        teacher: Source | None,
        mask: Tensor | Layout,
        *,
        target: Tensor | None = None,
        weights: Tensor | None = None,
        from_teacher: Tensor | None = None,
        teacher_mask: Tensor | Layout | None = None,
        denominator: float | Tensor | None = None,
        memory_budget: int | None = None,
        logits_dtype: torch.dtype | None = None,
    ) -> Output:
        """The loss of a batch, with gradients for whatever of the student's hidden, weight and bias requires them.

        Args:
            student, teacher: kd.Head over hidden states [B, L, H] (the hidden sizes may differ) or kd.Logits [B, L, V];
                the teacher may be kd.TopK where the objective needs no more. No gradient reaches the teacher.
            mask: [B, L] bool, True where hidden[b, t] *predicts* a response token (the last prompt position is True,
                the position of the final token False), one response per row (without gaps, where the objective selects
                within responses), or a ``kd.Layout``, which may have several. Nothing shifts internally. Positions
                outside are never multiplied by an lm_head. Without any True the loss is 0 and every gradient zero.
            target: [B, L] int64 or int32, the token that position t predicts (``kd.Layout.targets`` makes it of Hugging
                Face labels). By default the tokens of a layout made from labels, where the objective needs them; where
                it does not, a target adds the metric ``cross_entropy``.
            weights: [B, L] factor on every term of a token, a constant; the denominators stay counts.
            from_teacher: [B] bool, rows whose response the teacher wrote. Required where terms have a group, an error
                elsewhere. On the CPU it costs no sync.
            teacher_mask: the teacher's positions where they differ from the student's, equally many per response.
            denominator: a number above 0, or a tensor [] of one, to divide by instead of this batch's own count (see
                ``objectives.Objective``). On GPUs, where looking would cost a sync, the loss of a wrong one is NaN.
            memory_budget: bytes for logits and workspace (default 384 MiB on CPUs, on GPUs by their speed:
                ``kd.info()["memory_budget"]``).
            logits_dtype: default: that of the operands on CPUs, float32 on GPUs.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        given = student, teacher, mask, target, weights, from_teacher, teacher_mask, denominator
        call, count = self._call(*given, memory_budget, logits_dtype)
        loss, result = evaluate(call)
        metrics = {}
        if result is not None:
            own = loss.detach().clone()  # the caller's may be scaled in place
            metrics = {"loss": own, **self.metrics(result.tokens), "nonfinite_tokens": result.nonfinite()}
            for name, value in result.terms.items():
                metrics[name] = value.to(loss.dtype)
        return Output(loss, torch.full((), count, device=student.device), metrics)

    def _call(
        self,
        student: Source,
        teacher: Source | None,
        mask: Tensor | Layout,
        target: Tensor | None,
        weights: Tensor | None,
        from_teacher: Tensor | None,
        teacher_mask: Tensor | Layout | None,
        denominator: float | Tensor | None,
        memory_budget: int | None,
        logits_dtype: torch.dtype | None,
    ) -> tuple[Call, int]:
        """What ``forward`` was given, checked and over the tokens of the layout, and the batch's own count."""
        check_student(student)
        check_limits(memory_budget, logits_dtype)
        if any(needed(student)):
            check_divided(self.reduction, denominator)
        terms = self.current_terms()
        layout = _layout("mask", mask, student, whole=self.selects)
        self._check_arguments(terms, student, teacher, layout, target, weights, from_teacher, teacher_mask)
        count = self.count(layout, from_teacher)
        teacher_layout = _teacher_layout(layout, teacher, teacher_mask)
        groups = ()
        if from_teacher is not None:
            layout, teacher_layout, groups = _grouped(layout, teacher_layout, from_teacher)
        layout, teacher_layout = layout.to(student.device), teacher_layout.to(student.device)
        call = Call(
            program=self,
            terms=terms,
            selects=self.selects,
            student=student,
            teacher=teacher,
            layout=layout,
            teacher_index=teacher_layout.index,
            target=_targets(target, terms, layout, student),
            weight=_weights(weights, layout, student),
            groups=groups,
            scale=_scale(denominator, count, student.device),
            by_length=self.reduction != "responses",
            memory_budget=memory_budget,
            logits_dtype=logits_dtype,
        )
        return call, count

    def _check_arguments(
        self,
        terms: Terms,
        student: Source,
        teacher: Source | None,
        layout: Layout,
        target: Tensor | None,
        weights: Tensor | None,
        from_teacher: Tensor | None,
        teacher_mask: Tensor | Layout | None,
    ) -> None:
        """What is missing or superfluous."""
        name, needs = type(self).__name__, terms.needs
        if not terms.by_name:
            raise TypeError(f"terms: {name} has none; expected at least one")
        for metric in OWN_METRICS & terms.by_name.keys():
            raise ValueError(f"terms: expected other names than those of metrics, got {metric!r}")
        if needs.teacher:
            check_teacher(student, teacher, same_positions=teacher_mask is None)
        elif teacher is not None:
            raise TypeError(f"teacher: {name} has none; expected None, got {type(teacher).__name__}")
        elif teacher_mask is not None:
            raise TypeError(f"teacher_mask: {name} has no teacher; expected None")
        if _by_author(terms.by_name):
            _check_from_teacher(name, from_teacher, layout.shape[0])
        elif from_teacher is not None:
            raise TypeError(f"from_teacher: {name} treats all responses alike; expected None")
        if self.needs_weights and weights is None:
            raise TypeError(f"weights: {name} needs a weight for each token, got None")
        if needs.target and target is None and layout.token is None:
            raise TypeError(
                f"target: {name} needs the token each position predicts, or a mask that is a Layout made from labels, "
                "got None"
            )

    @property
    def needs_teacher(self) -> bool:
        return self.needs.teacher

    @property
    def needs_target(self) -> bool:
        return self.needs.target

    @property
    def by_author(self) -> bool:
        """Whether some terms count in responses of one author only: then ``from_teacher`` is required."""
        return _by_author(self.terms)

    def count(self, layout: Layout, from_teacher: Tensor | None = None) -> int:
        """What the loss is divided by without a ``denominator``, known before the forward pass: responses, tokens or
        prompts of ``layout``, 1 for "sum".

        A prompt has at most one response by each author: prompts are the responses of the busier one.

        Raises:
            ValueError: ``reduction`` is none of ``reductions``, or "prompts" where ``from_teacher`` is None.
        """
        return max(self.counts(layout, from_teacher))

    def counts(self, layout: Layout, from_teacher: Tensor | None = None) -> tuple[int, int]:
        """``count`` in two parts that add up over batches, of which the larger one counts: for "prompts" the responses
        of either author, else all of it and 0. So several batches, among which the two responses of a prompt may be
        spread, have together the count of one batch of all of them.

        Raises:
            ValueError: as ``count``.
        """
        self._check_reduction()
        if self.reduction == "prompts":
            if from_teacher is None:
                raise ValueError("reduction: expected another where nobody says who wrote a response, got 'prompts'")
            by_teacher = sum(layout.written_by(from_teacher))
            return by_teacher, layout.responses - by_teacher
        return {"responses": layout.responses, "tokens": len(layout), "sum": 1}[self.reduction], 0

    def _check_reduction(self) -> None:
        if self.reduction not in self.reductions:
            raise ValueError(f"reduction: expected one of {', '.join(self.reductions)}, got {self.reduction!r}")

    def metric_reduction(self, metric: str) -> str:
        """How the values that ``metric`` has for several batches become that of all of them.

        Returns:
            "count": their mean, each with the share that its batch has in what the loss is a mean over (the loss and
            its terms; with a ``denominator``, and for "sum", these add up); "tokens": their mean, each with its batch's
            share of the tokens; "sum": their sum.
        """
        if metric == "nonfinite_tokens":
            return "sum"
        if metric == "loss" or metric in self.terms:
            return "sum" if self.reduction == "sum" else "count"
        return "tokens"

    def metrics(self, tokens: Tokens) -> dict[str, Tensor]:
        """Means over the tokens; a subclass adds its own, and says in ``metric_reduction`` which are none."""
        out = {"student_entropy": tokens.entropy.mean()}
        if tokens.teacher is not None:
            out["teacher_entropy"] = tokens.teacher.entropy.mean()
            out["argmax_agreement"] = (tokens.argmax == tokens.teacher.argmax).float().mean()
        if tokens.cross_entropy is not None:
            out["cross_entropy"] = tokens.cross_entropy.mean()
        return out


def weighted(coefficient: Tensor, tokens: Tokens) -> Tensor:
    """A coefficient times the caller's per-token weight, where there is one."""
    return coefficient if tokens.weight is None else coefficient * tokens.weight


def _layout(name: str, mask: Tensor | Layout, source: Source, whole: bool = False) -> Layout:
    """The layout of a mask. ``whole``: the objective selects within responses, so it matters what is one response."""
    if isinstance(mask, Layout):
        layout = mask
        if whole and not layout.parted:
            raise ValueError(
                f"{name}: expected a layout that knows where texts end, because the objective selects within "
                "responses, got one of labels that have a sequence's first token too, which may be several texts that "
                "touch: kd.Layout.from_labels(labels, position_ids=position_ids)"
            )
    else:
        layout = Layout.from_mask(mask.cpu() if isinstance(mask, Tensor) else mask)
        if whole:
            _check_whole(name, layout)
    if layout.shape != source.shape:
        raise ValueError(
            f"{name}: expected shape {list(source.shape)} (the leading dimensions of the model), got "
            f"{list(layout.shape)}"
        )
    return layout


def _check_whole(name: str, layout: Layout) -> None:
    """Refuses the layout, on the CPU, of a mask with gaps: it does not say whether these part responses."""
    gaps = (layout.index.diff() != 1) & (layout.response.diff() == 0)
    if gaps.any():
        b, t = divmod(int(layout.index[gaps.nonzero()[0, 0]]), layout.shape[1])
        raise ValueError(
            f"{name}: expected one response in a sequence, because the objective selects within responses, got a gap "
            f"behind [{b}, {t}]; packed texts and turns: kd.Layout.from_labels(labels, position_ids=position_ids) or "
            "from_segments(ids); one response with tokens that are not scored: kd.Layout.from_segments(mask.long())"
        )


def _scale(denominator: object, count: int, device: torch.device) -> float | Tensor:
    """One over what the loss is divided by; of a tensor on a GPU a tensor, NaN where nothing can be divided by it."""
    if denominator is None:
        return 1.0 / max(1, count)
    if isinstance(denominator, Tensor):
        if denominator.dim() or denominator.requires_grad or denominator.dtype.is_complex:
            raise ValueError(
                "denominator: expected a number, or a tensor [] of one that requires no gradient, got "
                f"{denominator.dtype} {list(denominator.shape)}{' with gradient' * denominator.requires_grad}"
            )
        if denominator.dtype.is_floating_point and denominator.dtype.itemsize < 4:
            raise ValueError(
                f"denominator: expected a number that was not rounded, got {denominator.dtype}, which has not every "
                "count; where a wrapper casts what it is given, pass an int, a float or a tensor of an integer"
            )
        if denominator.device.type == "cpu":
            denominator = denominator.item()
        elif denominator.device != device or denominator.dtype == torch.bool:
            raise ValueError(
                f"denominator: expected a number, or a tensor of one on {device} (the student's) or the CPU, got "
                f"{denominator.dtype} on {denominator.device}"
            )
        else:
            n = denominator.double()
            return torch.where((n > 0) & n.isfinite(), 1.0 / n, torch.nan)
    check_positive("denominator", denominator)
    return 1.0 / denominator


def _by_author(terms: Mapping[str, Term]) -> bool:
    """Whether some terms have a group, which is an author."""
    groups = {name: term.group for name, term in terms.items() if term.group is not None}
    for name, group in groups.items():
        if group not in AUTHORS:
            raise ValueError(f"{name}: expected a term of the group {' or '.join(AUTHORS)}, got {group!r}")
    return bool(groups)


def _grouped(layout: Layout, teacher_layout: Layout, from_teacher: Tensor) -> tuple[Layout, Layout, tuple]:
    """Layouts of the teacher's responses before the student's, and ``Call.groups``."""
    written = layout.written_by(from_teacher)
    order = sorted(range(layout.responses), key=lambda i: not written[i])
    taken = layout.take(order)
    teacher_layout = taken if teacher_layout is layout else teacher_layout.take(order)
    by_teacher = sum(taken.lengths[: sum(written)])
    groups = tuple(zip(AUTHORS, (by_teacher, len(taken) - by_teacher), strict=True))
    return taken, teacher_layout, groups


def _check_from_teacher(objective: str, from_teacher: object, rows: int) -> None:
    if not isinstance(from_teacher, Tensor) or from_teacher.dtype != torch.bool:
        got = getattr(from_teacher, "dtype", type(from_teacher).__name__)
        raise TypeError(f"from_teacher: {objective} needs a bool tensor that says who wrote each response, got {got}")
    if from_teacher.shape != (rows,):
        raise ValueError(f"from_teacher: expected shape [{rows}] (the rows of mask), got {list(from_teacher.shape)}")


def _targets(target: Tensor | None, terms: Terms, layout: Layout, student: Source) -> Tensor | None:
    """[N] the token that each position predicts, where somebody says so: the caller or, if a term asks, the layout."""
    if target is not None:
        target = layout.at(check_ids("target", target, student.shape, student.device))
    elif terms.needs.target:
        target = layout.token
    if target is not None:
        check_range("target", target, student.vocabulary, hint=SHIFT)
    return target


def _weights(weights: object, layout: Layout, student: Source) -> Tensor | None:
    """[N] the caller's weight of each token."""
    if weights is None:
        return None
    if not isinstance(weights, Tensor) or not weights.is_floating_point():
        got = getattr(weights, "dtype", type(weights).__name__)
        raise TypeError(f"weights: expected a floating-point tensor, got {got}")
    if weights.requires_grad:
        raise ValueError("weights: expected a tensor that requires no gradient (it would get none); detach it")
    if weights.shape != student.shape:
        raise ValueError(f"weights: expected shape {list(student.shape)}, got {list(weights.shape)}")
    if weights.device != student.device:
        raise ValueError(f"weights: expected device {student.device}, got {weights.device}")
    return weights.flatten()[layout.index]


def _teacher_layout(layout: Layout, teacher: Source | None, teacher_mask: Tensor | Layout | None) -> Layout:
    if teacher is None or teacher_mask is None:
        return layout
    other = _layout("teacher_mask", teacher_mask, teacher)
    if other.shape[0] != layout.shape[0]:
        raise ValueError(f"teacher_mask: expected {layout.shape[0]} sequences as in mask, got {other.shape[0]}")
    sequences, other_sequences = layout.sequence.tolist(), other.sequence.tolist()
    if other.lengths != layout.lengths or other_sequences != sequences:
        raise ValueError(
            f"teacher_mask: expected as many tokens per response as in mask, {list(layout.lengths)} in sequences "
            f"{sequences}, got {list(other.lengths)} in sequences {other_sequences}"
        )
    return other
