"""The only chunk loop.

    for each chunk:  student logits, sweep 1, select, (teacher logits, sweep 1, sweep 2, coefficients, sweep 3), dX, dW

Coefficients are constants to the gradient, so one sweep writes d loss / d logits of all terms over the student's
logits. Chunks hold whole responses wherever they fit. A response longer than a chunk gets a statistics pass first
(one more student GEMM) where the program selects within responses, and is then processed in pieces: the same numbers.

Memory: ``memory_budget`` bytes (plan.py) bound logits and workspace. Outside it are the gradients that are returned and
one fp32 [V, H] accumulator for dW: with bf16 weights from two chunks on, with fp16 weights always. So are the copies in
which autocast casts wider weights and hidden states. Where a group divides the vocabulary, V above is one rank's part,
and outside the budget there is also dX of the tokens in fp32, until all ranks have added theirs.

Axes: N tokens, n tokens of a part, V vocabulary, H hidden, K candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from ..compute import memory
from ..kernels import Divided, Rows, Shards, backend_for
from ..sources import Known, autocasts, check_complete, shared_vocabulary
from ..tensors import sliced
from . import agreement, plan
from .gradient import LogitGradient, side_by_side
from .spec import Call, Result
from .terms import View
from .tokens import Tokens, concatenated


class _Loop:
    """One pass over all tokens."""

    def __init__(self, call: Call, needs: tuple[bool, ...], shards: Shards | None):
        student, teacher, layout = call.student, call.teacher, call.layout
        device, self.operand = student.device, student.dtype
        dtype = student.logits_dtype(call.logits_dtype)
        teacher_dtype = torch.promote_types(dtype, teacher.dtype) if teacher else dtype
        self.call, self.needs, self.differentiates = call, call.terms.needs, any(needs)
        self.backend = backend_for(device, dtype, self.operand)
        if shards:
            self.backend = Divided(self.backend, shards)
        self.vocabulary = vocabulary = shards.vocabulary if shards else shared_vocabulary(student, teacher)
        self.columns = shards.count if shards else vocabulary  # of the logits
        for name, asked in (("k", self.needs.candidates), ("collision", self.needs.collision)):
            if asked > vocabulary:
                raise ValueError(f"{name}: expected at most the vocabulary's {vocabulary} entries, got {asked}")
        self.plan = plan.planned(call, self.backend, self.columns, dtype, teacher_dtype, needs)
        self.borders = list(accumulate(count for _, count in call.groups))

        sizes = [((self.plan.rows, self.columns), dtype)]
        copies = self.plan.copies
        sizes += [((self.plan.teacher_rows, self.columns), dtype)] * copies
        if teacher and teacher.complete:
            sizes.append(((self.plan.teacher_rows, self.columns), teacher_dtype))
        buffer, *others = memory.matrices(sizes, device)
        self.copies, others = others[:copies], others[copies:]
        pieces = sum(len(chunk.pieces) for chunk in self.plan.chunks)
        self.student = student.producer(self.backend, layout.index, self.columns, buffer, needs, pieces)
        other_buffer, entries = (others[0], self.columns) if others else (None, vocabulary)
        self.teacher = teacher and teacher.producer(self.backend, call.teacher_index, entries, other_buffer)
        # Ids outside the vocabulary become ids inside: CPUs have raised an error, asking a GPU would be a sync.
        self.target = None if call.target is None else call.target.clamp(0, vocabulary - 1)
        self.values: list[Tokens] = []
        self.coefficients: list[dict[str, Tensor]] = []

    def run(self) -> Result:
        for chunk in self.plan.chunks:
            selected = self._select_ahead(chunk)
            for piece in chunk.pieces:
                self._piece(piece, chunk, selected)
        return Result(
            concatenated(self.values), concatenated(self.coefficients), *zip(*self.student.gradients(), strict=True)
        )

    # ---- what is known of tokens ----

    def _targets(self, tokens: slice) -> Tensor | None:
        """Ids [n, 1] inside the vocabulary."""
        return None if self.target is None else self.target[tokens, None]

    def _student(self, tokens: slice, entries: Tensor | None = None) -> tuple[Rows, Tokens]:
        """The student's logits, z at the ids ``entries`` [n, K] and at the targets gathered, and what they say."""
        asked, target = self.needs, self._targets(tokens)
        gather = side_by_side(entries, target)
        largest = max(1, asked.candidates, asked.collision)
        rows = self.student.rows(tokens, self.call.terms.temperature, largest, gather)
        known = _summary(rows, target is not None, asked.collision)
        if target is not None:
            known.cross_entropy.masked_fill_(target[:, 0] != self.call.target[tokens], torch.nan)
        if asked.candidates:
            known.top_indices = rows.top_indices[:, : asked.candidates].clone()
            known.top_log_probs = rows.log_prob(rows.top_values[:, : asked.candidates])
        if self.call.coefficients is None:
            known.length = sliced(self.call.layout.length, tokens)
            known.weight = None if self.call.weight is None else sliced(self.call.weight, tokens)
        return rows, known

    def _teacher(self, tokens: slice, student: Tokens) -> tuple[Rows, Tokens]:
        """The same of a teacher that knows all entries, at the student's candidates."""
        asked, target = self.needs, self._targets(tokens)
        gather = side_by_side(student.top_indices if asked.candidates else None, target)
        largest = max(asked.collision, min(asked.teacher_collision, self.vocabulary))
        rows = self.teacher.rows(tokens, self.call.terms.temperature, max(1, largest), gather)
        known = _summary(rows, target is not None, largest)
        if asked.candidates:
            known.at_student_argmax = rows.log_prob(rows.gathered[:, :1])[:, 0]
        return rows, known

    # ---- what whole responses select ----

    def _select_ahead(self, chunk: plan.Chunk) -> dict[str, Tensor] | None:
        """What a response in several pieces selects, from a statistics pass; None where one piece shows it all."""
        if not self.call.selects or self.call.coefficients is not None:
            return {}
        if len(chunk.pieces) == 1:
            return None
        return self._select(chunk, concatenated([self._student(piece)[1] for piece in chunk.pieces]))

    def _select(self, chunk: plan.Chunk, known: Tokens) -> dict[str, Tensor]:
        program, start = self.call.program, chunk.pieces[0].start
        if program.selects_by_teacher:
            parts = self.plan.split(start, chunk.pieces[-1].stop)
            seen = [self._teacher(part, known[part.start - start : part.stop - start])[1] for part in parts]
            known = replace(known, teacher=concatenated(seen))
        given = program.select(known, self.call.layout.part(chunk.first, chunk.last))
        _check_given("select", given, known.stats.shape[0])
        return given

    # ---- values, coefficients and gradients ----

    def _piece(self, piece: slice, chunk: plan.Chunk, selected: dict[str, Tensor] | None) -> None:
        entries = self.teacher.entries(piece) if self.teacher and not self.call.teacher.complete else None
        student, known = self._student(piece, entries and entries[0])
        if selected is None:
            selected = self._select(chunk, known)
        origin, d_logits, powers = chunk.pieces[0].start, None, []
        if self.differentiates:  # the gradient overwrites the logits
            d_logits = student.logits.view(self.operand)[:, : self.columns]
        for tokens in self.plan.split(piece.start, piece.stop, self.borders):
            here = slice(tokens.start - piece.start, tokens.stop - piece.start)
            part, out = known[here], None if d_logits is None else sliced(d_logits, here)
            where = slice(tokens.start - origin, tokens.stop - origin)
            part.selected = {key: sliced(each, where) for key, each in selected.items()}
            powers.append(self._tokens(tokens, student[here], part, entries and tuple(e[here] for e in entries), out))
        if self.differentiates:
            self.student.add(piece, d_logits, concatenated(powers))

    def _tokens(
        self, tokens: slice, student: Rows, known: Tokens, teacher: Known | None, d_logits: Tensor | None
    ) -> Tensor | None:
        """Values, coefficients and the logits' gradient of some tokens of a chunk, all of one group.

        ``teacher``: what is known of one that knows no more than entries. The gradient of fp16 logits still has to be
        multiplied with what is returned [n].
        """
        call, group = self.call, self.call.terms.of(self._group(tokens.start))
        if self.teacher and teacher is None:
            teacher, known.teacher = self._teacher(tokens, known)
        copies = self.copies and self.copies[: group.copies(call.teacher)]
        spare = len(copies) < group.divergences
        view = View(known, student, teacher, self.teacher, self._targets(tokens), copies, spare)
        evaluated = {name: term.evaluated(view) for name, term in group.by_name.items()}
        known.values = {name: term.value for name, term in evaluated.items()}
        absent = call.terms.by_name.keys() - evaluated.keys()
        for name in absent:
            known.values[name] = torch.zeros_like(known.entropy)
        coefficients = self._coefficients(tokens, known)
        for name in absent & coefficients.keys():
            coefficients[name] = torch.zeros_like(coefficients[name])
        self.values.append(known)
        self.coefficients.append(coefficients)
        if d_logits is None:
            return None
        gradient = LogitGradient(student)
        for name, term in evaluated.items():
            if name in coefficients:
                term.add(gradient, coefficients[name])
        return gradient.write(self.backend, call.terms.temperature, d_logits)

    def _group(self, token: int) -> str | None:
        """The name of the group that a token is in."""
        for border, (name, _) in zip(self.borders, self.call.groups, strict=True):
            if token < border:
                return name
        return None

    def _coefficients(self, tokens: slice, known: Tokens) -> dict[str, Tensor]:
        """What each term counts at these tokens."""
        call = self.call
        if call.coefficients is not None:
            return {name: each[tokens] for name, each in call.coefficients.items()}
        given = call.program.coefficients(known)
        _check_given("coefficients", given, known.stats.shape[0])
        if given.keys() != call.terms.by_name.keys():
            raise ValueError(
                f"coefficients: expected one for each of the terms {[*call.terms.by_name]}, got some for {[*given]}"
            )
        share = call.scale * known.length.to(known.entropy.dtype) if call.by_length else call.scale
        return {name: share * each for name, each in given.items()}


def _check_given(method: str, given: object, count: int) -> None:
    """Raises a TypeError or ValueError where a program's method gave something else than numbers [count] by name."""
    if not isinstance(given, Mapping):
        raise TypeError(f"{method}: expected a dict of tensors by name, got {type(given).__name__}")
    for name, each in given.items():
        if not isinstance(each, Tensor) or each.shape != (count,):
            got = list(each.shape) if isinstance(each, Tensor) else repr(each)
            raise ValueError(f"{method}: expected a tensor [{count}] for {name!r}, a number for each token, got {got}")


def _summary(rows: Rows, targeted: bool, largest: int) -> Tokens:
    """The statistics of student or teacher; the target, where there is one, is the last id gathered."""
    cross_entropy = rows.log_sum - (rows.gathered[:, -1] - rows.max) if targeted else None
    collision = (2 * rows.log_prob(rows.top_values[:, :largest])).exp().sum(-1) if largest else None
    argmax = rows.top_indices
    if argmax.shape[1] > 1:
        argmax = argmax[:, :1].clone()  # a view would keep all of them
    return Tokens(rows.stats, argmax, cross_entropy=cross_entropy, collision=collision)


def run(call: Call, needs: tuple[bool, ...] = ()) -> Result | None:
    """Evaluates a program over all tokens, with gradients of those of the student's tensors in ``needs``; None where
    there are no tokens, after the same checks.

    Raises:
        TypeError: the program needs more of the teacher than its K entries.
        ValueError: on all ranks of the group that divides the student's vocabulary: they make different calls.
    """
    shards = None
    if call.student.group is not None:
        shards = agreement.shards(call, needs)
        student, teacher = (each and each.part(shards.entries) for each in (call.student, call.teacher))
        call = replace(call, student=student, teacher=teacher)
    if call.teacher:
        if call.terms.needs.all_entries or not call.terms.has_divergence:
            check_complete(call.teacher, "this needs the teacher's distribution over all entries")
        call.teacher.check_temperature(call.terms.temperature)
    device = call.student.device
    with torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext():
        loop = _Loop(call, needs, shards)
        return loop.run() if loop.plan.chunks else None
