"""The only chunk loop and the only torch.autograd.Function.

    for each chunk:  student logits, sweep 1, select, (teacher logits, sweep 1, sweep 2, coefficients, sweep 3), dX, dW

A *program* (an objective, or a per-token function) says which terms each token has and with which coefficients:

    loss = sum_t sum_term coefficient[term](t) * value[term](t)

over the terms divergence, entropy, cross_entropy and plackett_luce. A program may have another divergence for responses
that the teacher wrote: these tokens come first, and the row kernels see one kind at a time.

Coefficients are constants to the gradient, so one sweep writes d loss / d logits of all terms over the student's
logits. Chunks hold whole responses wherever they fit. A response longer than a chunk gets a statistics pass first
(one more student GEMM) where the program selects within responses, and is then processed in pieces: the same numbers.

Memory: ``memory_budget`` bytes bound logits and workspace. Outside it are the gradients that are returned and, from two
chunks on with 16-bit weights, one fp32 [V, H] accumulator for dW.

Axes: N tokens, n tokens of a part, V vocabulary, H hidden, K candidates.
"""

from __future__ import annotations

from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import gemm, memory, plan
from .divergences import Divergence
from .heads import Head, shared_vocabulary
from .layout import Layout
from .rows import Coefficients, Rows, backend_for, plackett_luce


@dataclass
class Tokens:
    """Per-token vectors [n]; None where the program or the inputs do not have it."""

    entropy: Tensor
    lse: Tensor
    argmax: Tensor
    top_indices: Tensor | None = None  # [n, K]
    top_log_probs: Tensor | None = None  # [n, K]
    cross_entropy: Tensor | None = None  # -log q(target)
    teacher: Tokens | None = None  # the teacher's entropy, lse, argmax, cross_entropy at the same positions
    at_student_argmax: Tensor | None = None  # the teacher's log p(argmax q)
    collision: Tensor | None = None  # sum of the teacher's Program.collision largest p_i^2
    divergence: Tensor | None = None
    divergence_from_teacher: Tensor | None = None  # 0 where the student wrote, as divergence is where the teacher did
    plackett_luce: Tensor | None = None
    length: Tensor | None = None  # tokens of the token's response
    weight: Tensor | None = None  # the caller's per-token weight
    selected: dict[str, Tensor] = field(default_factory=dict)  # Program.select of these tokens

    @staticmethod
    def cat(parts: list[Tokens]) -> Tokens:
        def join(values):
            if isinstance(values[0], Tokens):
                return Tokens.cat(values)
            if isinstance(values[0], dict):
                return {key: torch.cat([v[key] for v in values]) for key in values[0]}
            return None if values[0] is None else torch.cat(values)

        return Tokens(**{f.name: join([getattr(part, f.name) for part in parts]) for f in fields(Tokens)})


class Program:
    """What the chunk loop asks of an objective. The defaults are a program without terms: statistics only."""

    divergence: Divergence | None = None
    divergence_from_teacher: Divergence | None = None  # a term of its own, of the responses that the teacher wrote
    temperature: float = 1.0
    topk: int = 0  # the student's candidates per token; with a teacher also its probability of the first
    plackett_luce: bool = False  # the likelihood of the teacher's order of the candidates
    collision: int = 0  # the teacher's so many largest probabilities (all, if there are fewer) give its collision
    selects: bool = False  # select() needs whole responses
    selects_by_teacher: bool = False  # ... and the teacher's entropies: one more product with its head

    def select(self, entropy: Tensor, teacher_entropy: Tensor | None, layout: Layout) -> dict[str, Tensor]:
        """Constants [n] that depend on whole responses, from entropies [n] in ``layout``; once per response, in order.

        ``teacher_entropy`` is there for a program that ``selects_by_teacher``.
        """
        return {}

    def coefficients(self, tokens: Tokens) -> dict[str, Tensor]:
        """term -> [n]: what multiplies the term's value at each token. Constants to the gradient."""
        return {}


class Needs(NamedTuple):
    """Which gradients are wanted; nothing is computed for the others."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


@dataclass(frozen=True)
class Call:
    """One evaluation of a program. ``student`` and ``teacher`` hold detached tensors; [N] tensors follow ``layout``."""

    program: Program
    student: Head
    teacher: Head | None
    layout: Layout
    teacher_index: Tensor | None = None  # [N] flat positions in the teacher's hidden states
    target: Tensor | None = None  # [N] token ids
    weight: Tensor | None = None  # [N]
    from_teacher: int = 0  # so many tokens come first that are of responses the teacher wrote
    coefficients: dict[str, Tensor] | None = None  # term -> [N]: given, not asked of the program
    scale: float = 1.0  # on every coefficient: one over what the loss is a mean of
    memory_budget: int | None = None
    logits_dtype: torch.dtype | None = None


@dataclass
class Result:
    tokens: Tokens
    coefficients: dict[str, Tensor]
    gradients: tuple[Tensor | None, ...]  # of the student's hidden, weight, bias

    def term(self, name: str) -> Tensor:
        """sum over tokens of coefficient * value, in fp64; a token without a coefficient does not count, NaN or not."""
        c = self.coefficients[name].double()
        return torch.where(c == 0, 0, c * getattr(self.tokens, name).double()).sum()

    def loss(self) -> Tensor:
        """The sum of all terms."""
        return sum(self.term(name) for name in self.coefficients).to(self.tokens.entropy.dtype)


def default_logits_dtype(device: torch.device, operand: torch.dtype) -> torch.dtype:
    """fp32 on GPUs, whose GEMMs give it for nothing; the operands' own on CPUs, where it would double the GEMM."""
    return torch.float32 if device.type != "cpu" and operand.itemsize < 4 else operand


class _Side:
    """One head: the words both heads share, and one logits buffer for all its chunks."""

    def __init__(self, head: Head, index: Tensor, buffer: Tensor):
        vocabulary = buffer.shape[1]
        self.flat = head.hidden.reshape(-1, head.hidden.shape[-1])
        self.index = index
        self.weight = head.weight[:vocabulary]
        self.bias = None if head.bias is None else head.bias[:vocabulary]
        self.scale, self.softcap = float(head.scale), head.softcap
        self.buffer = buffer

    def hidden(self, tokens: slice) -> Tensor:
        return self.flat.index_select(0, self.index[tokens])

    def rows(self, backend, tokens: slice, temperature: float, topk: int, gather: Tensor | None) -> Rows:
        logits = self.buffer[: tokens.stop - tokens.start]
        gemm.project(self.hidden(tokens), self.weight, self.bias, logits)
        return backend.statistics(logits, self.scale, self.softcap, temperature, topk, gather)


class _Loop:
    """One pass over all tokens."""

    def __init__(self, call: Call, needs: Needs):
        student, teacher, program, layout = call.student, call.teacher, call.program, call.layout
        device, self.operand = student.hidden.device, student.hidden.dtype
        dtype = call.logits_dtype or default_logits_dtype(device, self.operand)
        if dtype != self.operand and (dtype != torch.float32 or self.operand.itemsize > 4):
            raise ValueError(f"logits_dtype: expected {self.operand} (the operands') or float32, got {dtype}")
        self.call, self.needs = call, needs
        self.backend = backend_for(device, dtype, self.operand)
        self.vocabulary = shared_vocabulary(student, teacher)
        if program.topk > self.vocabulary:
            raise ValueError(f"k: expected at most the vocabulary's {self.vocabulary} words, got {program.topk}")
        self.collision = min(program.collision, self.vocabulary)

        widths = [head.hidden.shape[-1] for head in (student, teacher) if head]
        fixed = self.backend.workspace(self.vocabulary) + max(gemm.workspace(w, self.operand, dtype) for w in widths)
        hidden_bytes = 2 * self.operand.itemsize + (dtype.itemsize if dtype != self.operand else 0)
        row_bytes = [self.vocabulary * dtype.itemsize + w * hidden_bytes for w in widths] + [0]
        budget = plan.DEFAULT_BUDGET if call.memory_budget is None else call.memory_budget
        if not isinstance(budget, int):
            raise TypeError(f"memory_budget: expected an int (bytes) or None, got {budget!r}")
        count = max(1, len(layout))
        rows, self.teacher_rows = plan.chunk_rows(budget, fixed, row_bytes[0], row_bytes[1], count)
        lengths = layout.lengths if program.selects else (len(layout),)
        self.chunks = plan.chunks(lengths, rows)

        shapes = [(rows, self.vocabulary)] + ([(self.teacher_rows, self.vocabulary)] if teacher else [])
        self.block, buffers = memory.borrow([(shape, dtype) for shape in shapes], device)
        self.student = _Side(student, layout.index, buffers[0])
        self.teacher = teacher and _Side(teacher, call.teacher_index, buffers[1])
        self.values: list[Tokens] = []
        self.coefficients: list[dict[str, Tensor]] = []
        self.d_hidden = self.d_weight = self.d_bias = None
        if needs.hidden:
            self.d_hidden = torch.zeros_like(student.hidden, memory_format=torch.contiguous_format)
        if needs.weight:
            pieces = sum(len(chunk.pieces) for chunk in self.chunks)
            self.d_weight = gemm.WeightGradient(student.weight, self.vocabulary, pieces)
        if needs.bias:
            self.d_bias = torch.zeros_like(student.bias, dtype=torch.promote_types(self.operand, torch.float32))

    def run(self) -> Result:
        for chunk in self.chunks:
            selected = self._select_ahead(chunk)
            for piece in chunk.pieces:
                self._piece(piece, chunk, selected)
        coefficients = {term: torch.cat([c[term] for c in self.coefficients]) for term in self.coefficients[0]}
        d_weight = self.d_weight and self.d_weight.result()
        d_bias = None if self.d_bias is None else self.d_bias.to(self.operand)
        return Result(Tokens.cat(self.values), coefficients, (self.d_hidden, d_weight, d_bias))

    def _select_ahead(self, chunk: plan.Chunk) -> dict[str, Tensor] | None:
        """What a response in several pieces selects, from a statistics pass; None where one piece shows it all."""
        if not self.call.program.selects or self.call.coefficients is not None:
            return {}
        return None if len(chunk.pieces) == 1 else self._select(chunk, self._entropies(self.student, chunk.pieces))

    def _select(self, chunk: plan.Chunk, entropy: Tensor) -> dict[str, Tensor]:
        program, teacher_entropy = self.call.program, None
        if program.selects_by_teacher:
            pieces = plan.split(chunk.pieces[0].start, chunk.pieces[-1].stop, self.teacher_rows)
            teacher_entropy = self._entropies(self.teacher, pieces)
        return program.select(entropy, teacher_entropy, self.call.layout.part(chunk.first, chunk.last))

    def _entropies(self, side: _Side, pieces: list[slice]) -> Tensor:
        return torch.cat([side.rows(self.backend, piece, 1.0, 1, None).entropy for piece in pieces])

    def _piece(self, piece: slice, chunk: plan.Chunk, selected: dict[str, Tensor] | None) -> None:
        call, program = self.call, self.call.program
        target = None if call.target is None else call.target[piece, None]
        student = self.student.rows(self.backend, piece, program.temperature, max(1, program.topk), target)
        if selected is None:
            selected = self._select(chunk, student.entropy)
        origin = chunk.pieces[0].start
        d_logits = student.logits.view(self.operand)[:, : self.vocabulary]  # the gradient overwrites the logits
        for tokens in plan.split(piece.start, piece.stop, self.teacher_rows, call.from_teacher):
            here = slice(tokens.start - piece.start, tokens.stop - piece.start)
            chosen = {key: v[tokens.start - origin : tokens.stop - origin] for key, v in selected.items()}
            self._tokens(tokens, student[here], chosen, d_logits[here])
        if self.d_hidden is not None:
            rows = torch.mm(d_logits, self.student.weight)
            self.d_hidden.view(-1, rows.shape[-1]).index_copy_(0, call.layout.index[piece], rows)
        if self.d_weight is not None:
            self.d_weight.add(d_logits, self.student.hidden(piece))
        if self.d_bias is not None:
            gemm.add_column_sums(d_logits, self.d_bias[: self.vocabulary])

    def _tokens(self, tokens: slice, student: Rows, selected: dict[str, Tensor], d_logits: Tensor) -> None:
        """Values, coefficients and logits' gradient of some tokens of a chunk, all written by the same model."""
        call, program = self.call, self.call.program
        terms = [term for term in ("divergence", "divergence_from_teacher") if getattr(program, term)]
        own = "divergence_from_teacher" if tokens.start < call.from_teacher else "divergence"
        kind = getattr(program, own)
        target = None if call.target is None else call.target[tokens, None]
        values = _summary(student, target is not None)
        values.selected = selected
        values.length = call.layout.length[tokens]
        values.weight = None if call.weight is None else call.weight[tokens]
        teacher = center = d_candidates = None
        if self.teacher:
            asked = [ids for ids in (student.top_indices if program.topk else None, target) if ids is not None]
            gather = torch.cat(asked, dim=1) if asked else None
            teacher = self.teacher.rows(self.backend, tokens, program.temperature, max(1, self.collision), gather)
            values.teacher = _summary(teacher, target is not None)
            if program.topk:
                values.teacher.at_student_argmax = teacher.log_prob(teacher.gathered[:, :1])[:, 0]
            if program.collision:
                values.teacher.collision = (2 * teacher.log_prob(teacher.top_values)).exp().sum(-1)
            if program.plackett_luce:
                candidates = teacher.gathered[:, : program.topk]
                values.plackett_luce, d_candidates = plackett_luce(student.top_values, candidates)
            if kind:
                value, center = self.backend.divergence(student, teacher, kind, program.temperature)
                for term in terms:
                    setattr(values, term, value if term == own else torch.zeros_like(value))
        if program.topk:
            values.top_indices, values.top_log_probs = student.top_indices, student.log_prob(student.top_values)
        if call.coefficients is not None:
            c = {term: each[tokens] for term, each in call.coefficients.items()}
        else:
            c = {term: call.scale * each for term, each in program.coefficients(values).items()}
            c |= {term: torch.zeros_like(c[term]) for term in terms if term in c and term != own}
        self.values.append(values)
        self.coefficients.append(c)
        if any(self.needs):
            kind = kind if own in c else None
            row_coefficients = _row_coefficients(student, target, d_candidates, c)
            self.backend.gradient_(student, teacher, kind, program.temperature, center, row_coefficients, d_logits)


def _summary(rows: Rows, targeted: bool) -> Tokens:
    """The statistics of one side; the target, where there is one, is the last id gathered."""
    cross_entropy = -rows.log_prob(rows.gathered[:, -1:])[:, 0] if targeted else None
    return Tokens(rows.entropy, rows.lse, rows.argmax, cross_entropy=cross_entropy)


def _row_coefficients(
    rows: Rows, target: Tensor | None, d_candidates: Tensor | None, c: dict[str, Tensor]
) -> Coefficients:
    """Coefficients of the terms as the row kernels take them: a cross-entropy is q minus one at the target."""
    dense = rows.stats.new_zeros(3, len(rows.stats))
    ids, scatter = [rows.top_indices[:, :0]], [rows.top_values[:, :0]]
    for term, row in (("divergence", 0), ("divergence_from_teacher", 0), ("entropy", 1), ("cross_entropy", 2)):
        if term in c:
            dense[row] += c[term]
    if "cross_entropy" in c:
        ids.append(target)
        scatter.append(-dense[2, :, None])
    if "plackett_luce" in c:
        ids.append(rows.top_indices)
        scatter.append(c["plackett_luce"][:, None].to(dense.dtype) * d_candidates)
    return Coefficients(dense, torch.cat(ids, dim=1), torch.cat(scatter, dim=1))


def run(call: Call, needs: Needs = Needs()) -> Result | None:  # noqa: B008 - an immutable default
    """Evaluates a program over all tokens; None where there are none, after the same checks."""
    device = call.student.hidden.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        loop = _Loop(call, needs)
        try:
            return loop.run() if loop.chunks else None
        finally:
            memory.give_back(loop.block)


# ---- autograd --------------------------------------------------------------------------------------------------------


class _Chunked(torch.autograd.Function):
    """Scalar loss of a program, or with ``per_token`` one term's values [N].

    A loss has its coefficients in the forward, so its gradients are computed there and backward only scales them, in
    place; a second backward through the same graph recomputes them, with the same coefficients. Per-token values get
    their coefficients, the incoming gradients, in the backward, which recomputes the logits.
    """

    @staticmethod
    def forward(ctx, call: Call, needs: Needs, per_token: str | None, out: list, hidden, weight, bias):
        ctx.call, ctx.needs, ctx.per_token = call, needs, per_token
        # The teacher's too: an in-place change before backward must be an error, not another gradient.
        teacher = call.teacher and (call.teacher.hidden, call.teacher.weight, call.teacher.bias)
        ctx.save_for_backward(hidden, weight, bias, *(teacher or ()))
        result = run(call, Needs() if per_token else needs)
        out.append(result)
        ctx.gradients = None
        if result is None:
            return hidden.new_zeros((0,) if per_token else (), dtype=_accurate(hidden.dtype))
        if per_token:
            return getattr(result.tokens, per_token)
        ctx.gradients = result.gradients
        # What a second backward needs: the program's options and state may change in between.
        ctx.call = replace(call, program=copy(call.program), coefficients=result.coefficients)
        return result.loss()

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("kdkernels has no second derivatives: expected a backward without create_graph=True")
        saved, call = ctx.saved_tensors[:3], ctx.call
        gradients, ctx.gradients = ctx.gradients, None
        if len(call.layout) == 0:
            gradients = [torch.zeros_like(t) if need else None for t, need in zip(saved, ctx.needs, strict=True)]
        elif ctx.per_token:
            gradients = run(replace(call, weight=grad), ctx.needs).gradients
        else:
            if gradients is None:
                gradients = run(call, ctx.needs).gradients
            known_one = grad.device.type == "cpu" and grad.item() == 1  # saves a pass over dW; a GPU would have to sync
            gradients = [g if g is None or known_one else g.mul_(grad) for g in gradients]
        return None, None, None, None, *gradients


def _accurate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def evaluate(call: Call, per_token: str | None = None) -> tuple[Tensor, Result | None]:
    """The differentiable loss of ``call`` (or one term's per-token values [N]) and everything computed on the way.

    ``call.student`` holds the caller's tensors here; gradients flow to those that require them, in grad mode only.
    """
    student, teacher = call.student.autocast(), call.teacher and call.teacher.autocast()
    inputs = (student.hidden, student.weight, student.bias)
    needs = Needs(*(t is not None and t.requires_grad and torch.is_grad_enabled() for t in inputs))
    call = replace(call, student=_detached(student), teacher=teacher and _detached(teacher))
    out: list[Result | None] = []
    value = _Chunked.apply(call, needs, per_token, out, *inputs)
    return value, out[0]


def _detached(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.detach()
    return replace(head, hidden=head.hidden.detach(), weight=head.weight.detach(), bias=bias)
