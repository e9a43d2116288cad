"""The only chunk loop and the only torch.autograd.Function.

    for each chunk:  student logits, sweep 1, select, (teacher logits, sweep 1, sweep 2, coefficients, sweep 3), dX, dW

A *program* (an objective, or a per-token function) says which terms each token has and with which coefficients:

    loss = sum_t sum_term coefficient[term](t) * value[term](t)

over the terms divergence, entropy, cross_entropy and plackett_luce. A program may have another divergence for responses
that the teacher wrote: these tokens come first, and the row kernels see one kind at a time.

Coefficients are constants to the gradient, so one sweep writes d loss / d logits of all terms over the student's
logits. Chunks hold whole responses wherever they fit. A response longer than a chunk gets a statistics pass first
(one more student GEMM) where the program selects within responses, and is then processed in pieces: the same numbers.

Memory: ``memory_budget`` bytes (plan.py) bound logits and workspace. Outside it are the gradients that are returned and
one fp32 [V, H] accumulator for dW: with bf16 weights from two chunks on, with fp16 weights always. So are the copies in
which autocast casts wider weights and hidden states.

Axes: N tokens, n tokens of a part, V vocabulary, H hidden, K candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from . import coarse, fp16, gpu, memory, plan, sides
from .divergences import Divergence
from .heads import Head, Logits, Source, TopK, autocasts, shared_vocabulary
from .layout import Layout
from .rows import Coefficients, Rows, Summary, backend_for, plackett_luce


@dataclass(eq=False)
class Tokens(Summary):
    """Per-token vectors [n]; None where the program or the inputs do not have it."""

    stats: Tensor  # [n, ...]: entropy, lse
    top_indices: Tensor  # [n, K] the student's candidates, or the first alone: argmax
    top_log_probs: Tensor | None = None  # [n, K]
    cross_entropy: Tensor | None = None  # -log q(target)
    collision: Tensor | None = None  # sum of the largest squared probabilities
    teacher: Tokens | None = None  # the teacher's entropy, lse, argmax, cross_entropy at the same positions
    at_student_argmax: Tensor | None = None  # the teacher's log p(argmax q)
    divergence: Tensor | None = None
    divergence_from_teacher: Tensor | None = None  # 0 where the student wrote, as divergence is where the teacher did
    plackett_luce: Tensor | None = None
    length: Tensor | None = None  # tokens of the token's response, where coefficients are asked of the program
    weight: Tensor | None = None  # the caller's per-token weight
    selected: dict[str, Tensor] = field(default_factory=dict)  # Program.select of these tokens


def _cat(parts: list):
    """Consecutive tokens' tensors, dicts or Tokens as one, None where the parts are. Takes dicts and Tokens apart, so
    that no more than one tensor is there twice at a time."""
    first = parts[0]
    if len(parts) == 1 or first is None:
        return first
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, dict):
        return {key: _cat([part.pop(key) for part in parts]) for key in list(first)}
    return Tokens(**_cat([vars(part) for part in parts]))


class Program:
    """What the chunk loop asks of an objective. The defaults are a program without terms: statistics only."""

    divergence: Divergence | None = None
    divergence_from_teacher: Divergence | None = None  # a term of its own, of the responses that the teacher wrote
    temperature: float = 1.0
    topk: int = 0  # the student's candidates per token; with a teacher also its probability of the first
    plackett_luce: bool = False  # the likelihood of the teacher's order of the candidates
    collision: int = 0  # how many of the largest probabilities each side's collision sums up
    teacher_collision: int = 0  # the same of the teacher alone; all words where there are fewer
    selects: bool = False  # select() needs whole responses
    selects_by_teacher: bool = False  # ... and the teacher's entropies: one more product with its head
    all_words: bool = False  # needs the teacher's distribution over all words: kd.TopK will not do

    def select(self, entropy: Tensor, teacher_entropy: Tensor | None, layout: Layout) -> dict[str, Tensor]:
        """Constants [n] that depend on whole responses, from entropies [n] in ``layout``; once per response, in order.

        ``teacher_entropy`` is there for a program that ``selects_by_teacher``.
        """
        return {}

    def coefficients(self, tokens: Tokens) -> dict[str, Tensor]:
        """term -> [n]: what multiplies the term's value at each token. Constants to the gradient."""
        return {}


@dataclass(eq=False)
class Call:
    """One evaluation of a program. ``student`` and ``teacher`` hold detached tensors; [N] tensors follow ``layout``."""

    program: Program
    student: Head | Logits
    teacher: Source | None
    layout: Layout
    teacher_index: Tensor | None = None  # [N] flat positions on the teacher's side
    target: Tensor | None = None  # [N] token ids
    weight: Tensor | None = None  # [N]
    from_teacher: int = 0  # so many tokens come first that are of responses the teacher wrote
    coefficients: dict[str, Tensor] | None = None  # term -> [N]: given (or {}: none), not asked of the program
    scale: float = 1.0  # on the loss: one over what it is a mean of
    memory_budget: int | None = None
    logits_dtype: torch.dtype | None = None


@dataclass(eq=False)
class Result:
    tokens: Tokens
    coefficients: dict[str, Tensor]  # Call.scale included
    gradients: tuple[Tensor | None, ...]  # of the student's tensors
    factors: tuple[Tensor | float, ...]  # what they still have to be multiplied with: fp16 does not hold it

    @cached_property
    def terms(self) -> dict[str, Tensor]:
        """The sum of coefficient * value, in fp64; a token without a coefficient does not count, NaN or not."""
        out = {}
        for name, coefficient in self.coefficients.items():
            c = coefficient.double()
            out[name] = torch.where(c == 0, 0, c * getattr(self.tokens, name).double()).sum()
        return out

    def nonfinite(self) -> Tensor:
        """[] tokens of which a term's value or coefficient, an entropy or a likelihood of the target is not finite."""
        seen = list(self.coefficients.values())
        for side in (self.tokens, self.tokens.teacher):
            if side is not None:
                seen += [side.entropy, side.cross_entropy, side.divergence, side.divergence_from_teacher]
                seen.append(side.plackett_luce)
        return sum(~each.isfinite() for each in seen if each is not None).count_nonzero()

    def loss(self) -> Tensor:
        """The sum of all terms."""
        return sum(self.terms.values()).to(self.tokens.stats.dtype)


class _Loop:
    """One pass over all tokens."""

    def __init__(self, call: Call, needs: tuple[bool, ...]):
        student, teacher, program, layout = call.student, call.teacher, call.program, call.layout
        device, self.operand = student.device, student.dtype
        dtype = sides.logits_dtype(student, call.logits_dtype)
        teacher_dtype = torch.promote_types(dtype, teacher.dtype) if teacher else dtype
        self.call, self.differentiates = call, any(needs)
        self.backend = backend_for(device, dtype, self.operand)
        self.vocabulary = shared_vocabulary(student, teacher)
        if program.topk > self.vocabulary:
            raise ValueError(f"k: expected at most the vocabulary's {self.vocabulary} words, got {program.topk}")

        words, vocabulary = max(1, program.topk, program.collision), self.vocabulary
        mine = sides.costs(self.backend, student, vocabulary, dtype, words, True)
        other, stored = sides.Costs(0, 0, 0), isinstance(teacher, TopK)
        if teacher:
            words = max(words, program.teacher_collision)
            other = sides.costs(self.backend, teacher, vocabulary, teacher_dtype, min(words, vocabulary), False)
        count = max(1, len(layout))
        fixed = self.backend.workspace(count, vocabulary) + max(mine.fixed, other.fixed) + mine.kept + other.kept
        fixed += count * (plan.TOKEN_BYTES + plan.CANDIDATE_BYTES * program.topk)
        row, teacher_row = (mine.row + other.row, 0) if stored else (mine.row, other.row)  # words have no chunks
        work, budget = sides.work(student, teacher, dtype, needs), call.memory_budget
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
        self.values: list[Tokens] = []
        self.coefficients: list[dict[str, Tensor]] = []
        self.student = self._side(student, layout.index, buffer, needs)
        self.teacher = teacher and self._side(teacher, call.teacher_index, *others)
        # For what is no word, one that is: CPUs have raised an error, asking a GPU would be a sync.
        self.target = None if call.target is None else call.target.clamp(0, self.vocabulary - 1)

    def _side(self, source: Source, index: Tensor, buffer: Tensor | None = None, needs: tuple[bool, ...] | None = None):
        needs = needs or (False,) * len(source.tensors)
        if isinstance(source, Head):
            pieces = sum(len(chunk.pieces) for chunk in self.chunks)
            return sides.HeadSide(self.backend, source, index, buffer, needs, pieces)
        if isinstance(source, Logits):
            return sides.LogitsSide(self.backend, source, index, buffer, needs)
        return sides.TopKSide(source, index, self.vocabulary)

    def run(self) -> Result:
        for chunk in self.chunks:
            selected = self._select_ahead(chunk)
            for piece in chunk.pieces:
                self._piece(piece, chunk, selected)
        return Result(_cat(self.values), _cat(self.coefficients), *zip(*self.student.gradients(), strict=True))

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

    def _entropies(self, side, pieces: list[slice]) -> Tensor:
        return _cat([side.rows(piece, 1.0, 1, None).entropy for piece in pieces])

    def _piece(self, piece: slice, chunk: plan.Chunk, selected: dict[str, Tensor] | None) -> None:
        program = self.call.program
        words = self.teacher.words(piece) if isinstance(self.teacher, sides.TopKSide) else None
        gather = _beside(words and words[0], self._targets(piece))
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
                self._tokens(tokens, student[here], chosen, out, words and tuple(each[here] for each in words))
            )
        if self.differentiates:
            self.student.add(piece, d_logits, _cat(powers))

    def _targets(self, tokens: slice) -> Tensor | None:
        """Ids [n, 1] that are words."""
        return None if self.target is None else self.target[tokens, None]

    def _tokens(
        self,
        tokens: slice,
        student: Rows,
        selected: dict[str, Tensor],
        d_logits: Tensor | None,
        words: tuple[Tensor, Tensor] | None,
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
        if words:
            outcomes = coarse.divergence(self.backend, student, *words, kind, temperature, self.teacher.renormalize)
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
            raise TypeError(f"teacher: expected kd.Head or kd.Logits, got TopK: only divergences take it, not {[*c]}")
        if not self.differentiates:
            return None
        powers, narrow = None, self.operand == torch.float16
        if outcomes:
            coefficient = c[own]
            if narrow:
                powers = fp16.power(coefficient[None] * (student.scale / temperature))
                coefficient = coefficient / powers
            coarse.gradient_(self.backend, student, outcomes, coefficient, d_logits)
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
    """The statistics of one side; the target, where there is one, is the last id gathered."""
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
        TypeError: the program needs more of the teacher than its K words.
    """
    if isinstance(call.teacher, TopK):
        _check_stored(call.program, call.teacher)
    device = call.student.device
    with torch.autocast(device.type, enabled=False) if autocasts(device) else nullcontext():
        loop = _Loop(call, needs)
        return loop.run() if loop.chunks else None


def _check_stored(program: Program, teacher: TopK) -> None:
    if program.topk or program.all_words or program.divergence is None:
        raise TypeError(
            "teacher: expected kd.Head or kd.Logits, got TopK: this needs the teacher's distribution over all words"
        )
    if program.temperature != 1 and not teacher.renormalize:
        raise ValueError(
            f"temperature: expected 1 with a kd.TopK teacher that keeps a bucket of all other words, got "
            f"{program.temperature}; renormalize=True drops the bucket"
        )


# ---- autograd --------------------------------------------------------------------------------------------------------


def save(ctx, tensors: Sequence[Tensor | None]) -> None:
    """ctx.save_for_backward, which refuses tensors made in inference mode; these cannot change in place outside it."""
    ctx.unchanging = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
    ctx.save_for_backward(*(None if i in ctx.unchanging else t for i, t in enumerate(tensors)))


def saved(ctx) -> list[Tensor | None]:
    """What ``save`` was given. An error where one of them has changed since."""
    return [ctx.unchanging.get(i, t) for i, t in enumerate(ctx.saved_tensors)]


class _Chunked(torch.autograd.Function):
    """Scalar loss of a program.

    Its coefficients are known in the forward, so its gradients are computed there and backward only scales them, in
    place; a second backward through the same graph recomputes them, with the same coefficients.
    """

    @staticmethod
    def forward(ctx, call: Call, needs: tuple[bool, ...], out: list, *tensors):
        ctx.call, ctx.needs = call, needs
        # The teacher's too: an in-place change before backward must be an error, not another gradient.
        save(ctx, (*tensors, *(call.teacher.tensors if call.teacher else ())))
        result = run(call, needs)
        out.append(result)
        ctx.gradients = None
        if result is None:
            return tensors[0].new_zeros((), dtype=torch.promote_types(tensors[0].dtype, torch.float32))
        ctx.gradients, ctx.factors = result.gradients, result.factors
        # What a second backward needs: the program's options and state may change in between.
        ctx.call = replace(call, program=copy(call.program), coefficients=result.coefficients)
        return result.loss()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("kdkernels has no second derivatives: expected a backward without create_graph=True")
        tensors, call = saved(ctx), ctx.call
        gradients, ctx.gradients = ctx.gradients, None
        if len(call.layout) == 0:
            gradients = [torch.zeros_like(t) if need else None for t, need in zip(tensors, ctx.needs, strict=False)]
        else:
            if gradients is None:
                gradients = run(call, ctx.needs).gradients  # their factors are the same
            scale_(gradients, ctx.factors, grad)
        return None, None, None, *gradients


_SCALED = 1 << 20  # numbers at a time: PyTorch widens them first


def scale_(gradients: Sequence[Tensor | None], factors: Sequence[Tensor | float], grad: Tensor | float = 1.0) -> None:
    """gradients *= factors * grad, in the precision of ``grad`` [], at least fp32: AMP's loss scale has no fp16 value.

    A factor is one number or, for gradients [..., X], one for each [..., 1].
    """
    for gradient, factor in zip(gradients, factors, strict=True):
        if gradient is None:
            continue
        factor = factor * grad
        on_cpu = gradient.device.type == "cpu"
        if isinstance(factor, Tensor) and factor.dim():
            rows = gradient.view(-1, gradient.shape[-1])
            step = max(1, _SCALED // rows.shape[1]) if on_cpu else max(1, len(rows))
            for some, each in zip(rows.split(step), factor.view(-1, 1).split(step), strict=True):
                some.mul_(each)
        elif on_cpu or not isinstance(factor, Tensor):
            factor = float(factor)
            if factor != 1:  # saves a pass over dW; on a GPU only a kernel can see that
                gradient.mul_(factor)
        else:
            backend_for(gradient.device, gradient.dtype).scale_(gradient, factor)


def evaluate(call: Call) -> tuple[Tensor, Result | None]:
    """The differentiable loss of ``call`` and everything computed on the way.

    ``call.student`` holds the caller's tensors here; gradients flow to those that require them, in grad mode only.
    """
    student, teacher = call.student.autocast(), call.teacher and call.teacher.autocast().detach()
    needs = needed(student)
    call = replace(call, student=student.detach(), teacher=teacher)
    out: list[Result | None] = []
    value = _Chunked.apply(call, needs, out, *student.tensors)
    return value, out[0]


def needed(student: Source) -> tuple[bool, ...]:
    """Which of the student's tensors want a gradient; nothing is computed for the others."""
    return tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in student.tensors)
