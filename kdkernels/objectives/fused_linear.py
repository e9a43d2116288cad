"""An objective in the calling convention of fused linear losses: hidden states, weights and shifted labels.

Axes: B sequences, L positions, N = B L positions in one line, H hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_count
from ..layout import Layout
from ..sources import Head
from ..tensors import check_integral
from .base import Objective, Uncompiled


class FusedLinearDistillationLoss(Uncompiled):
    """A module that takes what ``LigerFusedLinearJSDLoss`` takes, by the same names and in the same order.

        loss = kd.FusedLinearDistillationLoss(kd.GKD(beta=0.5, reduction="tokens"))
        loss(student_hidden, student_weight, teacher_hidden, teacher_weight, shift_labels).backward()

    This is the number of ``LigerFusedLinearJSDLoss(weight_hard_loss=0, weight_soft_loss=1, beta=0.5)``: the mean over
    all tokens whose label is not ignored. In both, beta 0 is the forward KL, and no T^2 multiplies the loss.

    Heads with a soft-cap or a scale, stored teachers and metrics: call the objective itself.

    Args:
        objective: what is computed; its ``reduction`` says how responses become one loss.
        vocab_size: the real vocabulary, where weights have more rows.
        ignore_index: the label of a position that is not scored.

    Raises:
        TypeError: objective is none, or an option is no int.
        ValueError: vocab_size is less than 1.
    """

    def __init__(self, objective: Objective, vocab_size: int | None = None, ignore_index: int = -100):
        super().__init__()
        if not isinstance(objective, Objective):
            raise TypeError(f"objective: expected one such as kd.GKD(reduction='tokens'), got {objective!r}")
        if vocab_size is not None:
            check_count("vocab_size", vocab_size, 1)
        if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
            raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
        self.objective, self.vocab_size, self.ignore_index = objective, vocab_size, ignore_index

    def forward(
        self,
        student_input: Tensor,
        student_weight: Tensor,
        teacher_input: Tensor | None,
        teacher_weight: Tensor | None,
        true_labels: Tensor,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        from_teacher: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """The loss, with gradients for whatever of the student's tensors requires them.

        Args:
            student_input, teacher_input: [B, L, H] last hidden states, or [N, H] of positions in one line where the
                objective knows no responses: reduction "tokens" or "sum", no selection, no authors. The hidden sizes
                may differ. An objective without a teacher takes None.
            student_weight, teacher_weight: [V, H] lm_head weights.
            true_labels: [B, L] or [N] int64 or int32, the token that each position *predicts* (labels already shifted:
                ``labels[:, 1:]`` beside ``hidden[:, :-1]``), or ``ignore_index``. Labels of a sequence that follow each
                other are one response: packed texts whose first labels are not ignored need the objective itself, with
                ``kd.Layout.from_labels(labels, position_ids=position_ids)``. On a GPU they cost one sync.
            student_bias, teacher_bias: [V] or None.
            weights, from_teacher, denominator: as for the objective; weights have the shape of the labels.

        Returns:
            [] the loss; without any label that counts 0, with gradients of zero.

        Raises:
            TypeError, ValueError: naming the argument (or a ``kd.Head``'s), what was expected and what came.
        """
        if isinstance(student_input, Tensor) and student_input.dim() not in (2, 3):
            raise ValueError(f"student_input: expected [B, L, H] or [N, H], got {list(student_input.shape)}")
        student = Head(student_input, student_weight, student_bias, vocab_size=self.vocab_size)
        teacher = None
        if teacher_input is not None or teacher_weight is not None:
            teacher = Head(teacher_input, teacher_weight, teacher_bias, vocab_size=self.vocab_size)
        if not isinstance(true_labels, Tensor) or true_labels.shape != student.shape:
            got = list(true_labels.shape) if isinstance(true_labels, Tensor) else type(true_labels).__name__
            raise ValueError(f"true_labels: expected a label for each position {list(student.shape)}, got {got}")
        check_integral("true_labels", true_labels)
        if len(student.shape) == 1:
            self._check_needs_no_responses()
            student, teacher = (one and replace(one, hidden=one.hidden[None]) for one in (student, teacher))
            true_labels, weights = true_labels[None], weights if weights is None else weights[None]
        options = {"weights": weights, "from_teacher": from_teacher, "denominator": denominator}
        return self.objective(student, teacher, self._layout(true_labels), **options).loss

    def _check_needs_no_responses(self) -> None:
        """Of an objective whose positions come in one line: where a response ends is lost there."""
        objective, name = self.objective, type(self.objective).__name__
        if objective.by_author:
            raise ValueError(
                f"student_input: {name} needs to know who wrote a sequence; expected [B, L, H], got [N, H]"
            )
        if objective.selects:
            raise ValueError(f"student_input: {name} selects within responses; expected [B, L, H], got [N, H]")
        if objective.reduction not in ("tokens", "sum"):
            raise ValueError(
                f"student_input: a mean over {objective.reduction} needs to know them; expected [B, L, H], or "
                f"{name}(reduction='tokens'), got [N, H] and {objective.reduction!r}"
            )

    def _layout(self, labels: Tensor) -> Layout:
        """The layout of labels [B, L] that are shifted. ``Layout.from_labels`` shifts: it is given one label more."""
        layout = Layout.from_labels(pad(labels, (1, 0), value=self.ignore_index), self.ignore_index)
        rows = layout.index // (labels.shape[1] + 1)
        return Layout.trusted(layout.index - rows, layout.lengths, tuple(labels.shape), layout.token)
