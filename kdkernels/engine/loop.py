"""The only chunk loop.

    for each chunk:  student logits, sweep 1, select, (teacher logits, sweep 1, sweep 2, coefficients, sweep 3), dX, dW

Coefficients are constants to the gradient, so one sweep writes d loss / d logits of all terms over the student's
logits. Chunks hold whole responses wherever they fit. A response longer than a chunk gets a statistics pass first
(one more student GEMM) where the program selects within responses, and is then processed in pieces: the same numbers.

Memory: ``memory_budget`` bytes (plan.py) bound logits and workspace. Outside it are the gradients that are returned and
one fp32 [V, H] accumulator for dW: with bf16 weights from two chunks on, with fp16 weights always. So are the copies in
which autocast casts wider weights and hidden states.

Axes: N tokens, n tokens of a part, V vocabulary, H hidden, K candidates.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from ..compute import fp16, memory
from ..kernels import Coefficients, Rows, backend_for, plackett_luce
from ..sources import Costs, Producer, Source, autocasts, check_complete, shared_vocabulary
from . import gpu, plan
from .spec import Call, Program, Result, Tokens, concatenated


class _Loop:
    """One pass over all tokens."""

    def __init__(self, call: Call, needs: tuple[bool, ...]):
        student, teacher, program, layout = call.student, call.teacher, call.program, call.layout
        device, self.operand = student.device, student.dtype
        dtype = student.logits_dtype(call.logits_dtype)
        teacher_dtype = torch.promote_types(dtype, teacher.dtype) if teacher else dtype
        self.call, self.differentiates = call, any(needs)
        self.backend = backend_for(device, dtype, self.operand)
        self.vocabulary = shared_vocabulary(student, teacher)
        if program.topk > self.vocabulary:
            raise ValueError(f"k: expected at most the vocabulary's {self.vocabulary} entries, got {program.topk}")

        largest, vocabulary = max(1, program.topk, program.collision), self.vocabulary
        mine = student.costs(self.backend, vocabulary, dtype, largest, True)
        other, stored = Costs(0, 0, 0), teacher is not None and not teacher.complete
        if teacher:
            largest = max(largest, program.teacher_collision)
            other = teacher.costs(self.backend, vocabulary, teacher_dtype, min(largest, vocabulary), False)
        count = max(1, len(layout))
        fixed = self.backend.workspace(count, vocabulary) + max(mine.fixed, other.fixed) + mine.kept + other.kept
        fixed += count * (plan.TOKEN_BYTES + plan.CANDIDATE_BYTES * program.topk)
        row, teacher_row = (mine.row + other.row, 0) if stored else (mine.row, other.row)  # no logits, no chunks
        work, budget = _work(call, dtype, needs), call.memory_budget
        wanted = gpu.wanted(device, work)
        if budget is None:
            sums = 4 * vocabulary * work.student if work.d_weight and self.operand == torch.bfloat16 else 0
            budget = plan.default_budget(wanted, partial(gpu.allowance, device), fixed, row, teacher_row, count, sums)
        rows, self.teacher_rows = plan.chunk_rows(budget, fixed, row, teacher_row, count, wanted)
        lengths, self.step = layout.lengths if program.selects else (len(layout),), gpu.TILE if wanted else 1
        self.chunks = plan.chunks(lengths, rows, self.step)

        sizes = [((rows, self.vocabulary), dtype)]
        if teacher and not stored:
            sizes.append(((self.teacher_rows, self.vocabulary), teacher_dtype))
        buffer, *others = memory.matrices(sizes, device)
        self.stored = stored
        self.values: list[Tokens] = []
        self.coefficients: list[dict[str, Tensor]] = []
        pieces = sum(len(chunk.pieces) for chunk in self.chunks)
        self.student = student.producer(self.backend, layout.index, vocabulary, buffer, needs, pieces)
        other_buffer = others[0] if others else None
        self.teacher = teacher and teacher.producer(self.backend, call.teacher_index, vocabulary, other_buffer)
        # Ids outside the vocabulary become ids inside: CPUs have raised an error, asking a GPU would be a sync.
        self.target = None if call.target is None else call.target.clamp(0, self.vocabulary - 1)

    def run(self) -> Result:
        for chunk in self.chunks:
            selected = self._select_ahead(chunk)
            for piece in chunk.pieces:
                self._piece(piece, chunk, selected)
        return Result(
            concatenated(self.values), concatenated(self.coefficients), *zip(*self.student.gradients(), strict=True)
        )

    def _select_ahead(self, chunk: plan.Chunk) -> dict[str, Tensor] | None:
        """What a response in several pieces selects, from a statistics pass; None where one piece shows it all."""
        if not self.call.program.selects or self.call.coefficients is not None:
            return {}
        return None if len(chunk.pieces) == 1 else self._select(chunk, self._entropies(self.student, chunk.pieces))

    def _select(self, chunk: plan.Chunk, entropy: Tensor) -> dict[str, Tensor]:
        program, teacher_entropy = self.call.program, None
        if program.selects_by_teacher:
            pieces = plan.split(chunk.pieces[0].start, chunk.pieces[-1].stop, self.teacher_rows, 0, self.step)
            teacher_entropy = self._entropies(self.teacher, pieces)
        return program.select(entropy, teacher_entropy, self.call.layout.part(chunk.first, chunk.last))

    def _entropies(self, producer: Producer, pieces: list[slice]) -> Tensor:
        return concatenated([producer.rows(piece, 1.0, 1, None).entropy for piece in pieces])

    def _piece(self, piece: slice, chunk: plan.Chunk, selected: dict[str, Tensor] | None) -> None:
        program = self.call.program
        stored = self.teacher.entries(piece) if self.stored else None
        gather = _beside(stored and stored[0], self._targets(piece))
        largest = max(1, program.topk, program.collision)
        student = self.student.rows(piece, program.temperature, largest, gather)
        if selected is None:
            selected = self._select(chunk, student.entropy)
        origin, d_logits, powers = chunk.pieces[0].start, None, []
        if self.differentiates:  # the gradient overwrites the logits
            d_logits = student.logits.view(self.operand)[:, : self.vocabulary]
        for tokens in plan.split(piece.start, piece.stop, self.teacher_rows, self.call.from_teacher, self.step):
            here = slice(tokens.start - piece.start, tokens.stop - piece.start)
            chosen = {key: v[tokens.start - origin : tokens.stop - origin] for key, v in selected.items()}
            out = None if d_logits is None else d_logits[here]
            powers.append(
                self._tokens(tokens, student[here], chosen, out, stored and tuple(each[here] for each in stored))
            )
        if self.differentiates:
            self.student.add(piece, d_logits, concatenated(powers))

    def _targets(self, tokens: slice) -> Tensor | None:
        """Ids [n, 1] inside the vocabulary."""
        return None if self.target is None else self.target[tokens, None]

    def _tokens(
        self,
        tokens: slice,
        student: Rows,
        selected: dict[str, Tensor],
        d_logits: Tensor | None,
        stored: tuple[Tensor, Tensor] | None,
    ) -> Tensor | None:
        """Values, coefficients and logits' gradient of some tokens of a chunk, all written by the same model.

        The gradient of fp16 logits still has to be multiplied with what is returned [n].
        """
        call, program = self.call, self.call.program
        terms = [term for term in ("divergence", "divergence_from_teacher") if getattr(program, term)]
        own = "divergence_from_teacher" if tokens.start < call.from_teacher else "divergence"
        kind, temperature = getattr(program, own), program.temperature
        target = self._targets(tokens)
        values = _summary(student, target is not None, program.collision)
        if target is not None:
            values.cross_entropy.masked_fill_(target[:, 0] != call.target[tokens], torch.nan)
        if program.topk:
            values.top_indices = student.top_indices[:, : program.topk].clone()
            values.top_log_probs = student.log_prob(student.top_values[:, : program.topk])
        teacher = center = d_candidates = outcomes = value = None
        if stored:
            outcomes = self.teacher.divergence(student, *stored, kind, temperature)
            value = outcomes.value
        elif self.teacher:
            gather = _beside(values.top_indices if program.topk else None, target)
            largest = max(program.collision, min(program.teacher_collision, self.vocabulary))
            teacher = self.teacher.rows(tokens, temperature, max(1, largest), gather)
            values.teacher = _summary(teacher, target is not None, largest)
            if program.topk:
                values.teacher.at_student_argmax = teacher.log_prob(teacher.gathered[:, :1])[:, 0]
            if program.plackett_luce:
                values.plackett_luce, d_candidates = plackett_luce(
                    student.top_values[:, : program.topk], teacher.gathered[:, : program.topk], teacher.max
                )
            if kind:
                value, center = self.backend.divergence(student, teacher, kind, temperature)
        for term in terms:
            setattr(values, term, value if term == own else torch.zeros_like(value))
        if call.coefficients is not None:
            c = {term: each[tokens] for term, each in call.coefficients.items()}
        else:
            values.selected, values.length = selected, call.layout.length[tokens]
            values.weight = None if call.weight is None else call.weight[tokens]
            c = {term: call.scale * each for term, each in program.coefficients(values).items()}
            c |= {term: torch.zeros_like(c[term]) for term in terms if term in c and term != own}
        self.values.append(values)
        self.coefficients.append(c)
        if outcomes and c.keys() - set(terms):
            check_complete(call.teacher, f"only divergences take it, not {[*c]}")
        if not self.differentiates:
            return None
        powers, narrow = None, self.operand == torch.float16
        if outcomes:
            coefficient = c[own]
            if narrow:
                powers = fp16.power(coefficient[None] * (student.scale / temperature))
                coefficient = coefficient / powers
            outcomes.write_gradient(student, coefficient, d_logits)
            return powers
        kind = kind if own in c else None
        row_coefficients = _row_coefficients(student, target, values.top_indices, d_candidates, c)
        if narrow:
            row_coefficients, powers = _divided(row_coefficients, temperature, student.scale)
        self.backend.gradient_(student, teacher, kind, temperature, center, row_coefficients, d_logits)
        return powers


def _beside(*ids: Tensor | None) -> Tensor | None:
    """Columns of ids [n, ...] side by side, contiguous; None where there are none."""
    asked = [each for each in ids if each is not None]
    if len(asked) < 2:
        return asked[0].contiguous() if asked else None
    return torch.cat(asked, dim=1)


def _summary(rows: Rows, targeted: bool, largest: int) -> Tokens:
    """The statistics of student or teacher; the target, where there is one, is the last id gathered."""
    cross_entropy = rows.log_sum - (rows.gathered[:, -1] - rows.max) if targeted else None
    collision = (2 * rows.log_prob(rows.top_values[:, :largest])).exp().sum(-1) if largest else None
    argmax = rows.top_indices[:, :1].clone()  # a view would keep all of them
    return Tokens(rows.stats, argmax, cross_entropy=cross_entropy, collision=collision)


def _row_coefficients(
    rows: Rows, target: Tensor | None, candidates: Tensor, d_candidates: Tensor | None, c: dict[str, Tensor]
) -> Coefficients:
    """Coefficients of the terms as the row kernels take them: a cross-entropy is q minus one at the target."""
    dense = rows.stats.new_zeros(3, len(rows.stats))
    for term, row in (("divergence", 0), ("divergence_from_teacher", 0), ("entropy", 1), ("cross_entropy", 2)):
        if term in c:
            dense[row].add_(c[term])
    ids, scatter = [], []
    if "cross_entropy" in c:
        ids.append(target)
        scatter.append(-dense[2, :, None])
    if "plackett_luce" in c:
        ids.append(candidates)
        scatter.append(c["plackett_luce"][:, None].to(dense.dtype) * d_candidates)
    if not ids:
        ids, scatter = [rows.top_indices[:, :0]], [rows.top_values[:, :0]]
    return Coefficients(dense, _beside(*ids), _beside(*scatter))


def _divided(c: Coefficients, temperature: float, scale: float) -> tuple[Coefficients, Tensor]:
    """Coefficients without their powers of two [n] (fp16.py), and these; the rest is what the kernels multiply with."""
    powers = fp16.power(torch.cat([c.dense[:1] / temperature, c.dense[1:], c.scatter.t()]) * scale)
    return Coefficients(c.dense / powers, c.ids, c.scatter / powers[:, None]), powers


def run(call: Call, needs: tuple[bool, ...] = ()) -> Result | None:
    """Evaluates a program over all tokens, with gradients of those of the student's tensors in ``needs``; None where
    there are no tokens, after the same checks.

    Raises:
        TypeError: the program needs more of the teacher than its K entries.
    """
    if call.teacher:
        _check_teacher(call.program, call.teacher)
    device = call.student.device
    with torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext():
        loop = _Loop(call, needs)
        return loop.run() if loop.chunks else None


def _check_teacher(program: Program, teacher: Source) -> None:
    if program.topk or program.all_entries or program.divergence is None:
        check_complete(teacher, "this needs the teacher's distribution over all entries")
    teacher.check_temperature(program.temperature)


def _work(call: Call, dtype: torch.dtype, needs: tuple[bool, ...]) -> gpu.Sides:
    """What a call multiplies: with ``dtype`` logits and gradients of those of the student's tensors in ``needs``."""
    student, teacher = call.student, call.teacher
    d_hidden, d_weight = needs[:2] if student.width and needs else (False, False)
    return gpu.Sides(student.width, teacher.width if teacher else 0, d_hidden, d_weight, dtype.itemsize)
