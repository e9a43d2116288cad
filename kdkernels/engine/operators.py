"""What PyTorch sees of the per-token functions: the functional operators kdkernels::token_values and token_statistics.

    token_values(student, ...) -> [...]          its gradient: token_gradients(grad, student, ...) -> those asked for

Operators take tensors and plain numbers, so sources come packed (sources/base.py). Which gradients are wanted is
decided by the caller, where grad mode is visible. The backward recomputes the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from ..divergences import Divergence
from ..layout import Layout
from ..sources import unpacked
from .autograd import save, saved, scale_
from .loop import run
from .spec import Call, Program
from .terms import CrossEntropyTerm, DivergenceTerm, EntropyTerm, Needs, PlackettLuceTerm, Term, Terms

# ---- sources as arguments -------------------------------------------------------------------------------------------

_SOURCES = (
    "Tensor[] student, str student_key, float[] student_numbers, "
    "Tensor[] teacher, str teacher_key, float[] teacher_numbers, Tensor? target, Tensor? rows"
)
_LIMITS = "int? memory_budget, ScalarType? logits_dtype"


class Sources(NamedTuple):
    """The first arguments of every operator: both sources packed, target, and the positions asked for.

    ``rows``: int64 positions [N] or bool [...]; None: all positions.
    """

    student: list[Tensor]
    student_key: str
    student_numbers: list[float]
    teacher: list[Tensor]
    teacher_key: str
    teacher_numbers: list[float]
    target: Tensor | None
    rows: Tensor | None

    @property
    def shape(self) -> torch.Size:
        return self.student[0].shape[:-1]

    def call(self, program: Program, ignore_index: int | None, memory_budget, logits_dtype) -> Call:
        """The positions asked for, less the ignored ones on CPUs: elsewhere, finding them would cost a sync."""
        student = unpacked(self.student, self.student_key, self.student_numbers)
        teacher = unpacked(self.teacher, self.teacher_key, self.teacher_numbers)
        index = self.index()
        target = None if self.target is None else self.target.flatten()[index]
        if target is not None:
            if ignore_index is not None and index.device.type == "cpu":
                ignored = target == ignore_index
                if ignored.any():
                    index, target = index[~ignored], target[~ignored]
            check_range("target", target, student.vocabulary)
        (count,) = index.shape
        return Call(
            program,
            program.current_terms(),
            program.selects,
            student,
            teacher,
            Layout.trusted(index, (count,) if count else (), (1, self.shape.numel())),
            teacher_index=index,
            target=target,
            coefficients={},
            memory_budget=memory_budget,
            logits_dtype=logits_dtype,
        )

    def index(self) -> Tensor:
        count = self.shape.numel()
        if self.rows is None:
            return torch.arange(count, device=self.student[0].device)
        if self.rows.dtype == torch.bool:
            return self.rows.flatten().nonzero()[:, 0]
        check_range("rows", self.rows, count, distinct=True)
        return self.rows


def check_range(name: str, ids: Tensor, count: int, distinct: bool = False, hint: str = "") -> None:
    """Looks at ids on CPUs only: elsewhere it would be a sync."""
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = (int(each) for each in ids.aminmax())
    if not 0 <= low <= high < count:
        raise ValueError(f"{name}: expected ids in [0, {count}), got {low} to {high}{hint and f'; {hint}'}")
    if distinct and len(ids.unique()) < len(ids):
        raise ValueError(f"{name}: expected distinct positions, got {len(ids)} of which {len(ids.unique())} differ")


def _spread(values: Tensor, call: Call, shape: torch.Size) -> Tensor:
    """Values [N, ...] at their positions of the leading shape, 0 elsewhere; not a view (see _token_values)."""
    rest = values.shape[1:]
    out = values.new_zeros(shape + rest)
    out.view(shape.numel(), *rest).index_copy_(0, call.layout.index, values)
    return out


def _registered(function: Callable, schema: str, like: Callable, backward: Callable | None = None, setup=None):
    """The operator kdkernels::<name of function>; custom_op would add 8 to 20 microseconds to a call."""
    name = function.__name__.removeprefix("_")
    qualified = add_op_namespace_prefix(name)
    torch.library.define(qualified, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(qualified, "CompositeExplicitAutograd")(function)
    torch.library.register_fake(qualified, like)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup)
    return getattr(ops, name).default


# ---- per-token values, differentiable --------------------------------------------------------------------------------


class _Single(Program):
    """One term. Its coefficients are whatever gradient comes in: the call has them."""

    def __init__(self, name: str, term: Term):
        self.terms = {name: term}
        self._current = super().current_terms()

    def current_terms(self) -> Terms:
        """Always the same: they are made once for all calls with the same options."""
        return self._current


@lru_cache(maxsize=64)
def _single(term: str, divergence: tuple[float, ...], temperature: float, topk: int) -> _Single:
    return _Single(term, _TERMS[term](divergence, temperature, topk))


class _Values(NamedTuple):
    """The arguments of token_values after the sources."""

    term: str
    divergence: list[float]  # its a, b, mix and detached, or nothing
    temperature: float
    topk: int
    ignore_index: int | None
    memory_budget: int | None
    logits_dtype: torch.dtype | None
    needs: list[bool]  # per tensor of the student

    def call(self, sources: Sources) -> Call:
        program = _single(self.term, tuple(self.divergence), self.temperature, self.topk)
        return sources.call(program, self.ignore_index, self.memory_budget, self.logits_dtype)

    def ignored(self, call: Call) -> Tensor | None:
        """Which of the positions [N] of ``call`` do not count: none on CPUs, whose calls leave them out."""
        if call.target is None or call.target.device.type == "cpu":
            return None
        return call.target == self.ignore_index


_TERMS: dict[str, Callable[[tuple[float, ...], float, int], Term]] = {
    "cross_entropy": lambda divergence, temperature, topk: CrossEntropyTerm(),
    "divergence": lambda divergence, temperature, topk: DivergenceTerm(Divergence("", *divergence), temperature),
    "entropy": lambda divergence, temperature, topk: EntropyTerm(),
    "plackett_luce": lambda divergence, temperature, topk: PlackettLuceTerm(topk),
}
_VALUES = (
    f"{_SOURCES}, str term, float[] divergence, float temperature, int topk, int? ignore_index, {_LIMITS}, bool[] needs"
)


def _split(arguments: tuple) -> tuple[Sources, _Values]:
    count = len(Sources._fields)
    return Sources(*arguments[:count]), _Values(*arguments[count:])


def _token_values(*arguments) -> Tensor:
    sources, values = _split(arguments)
    call = values.call(sources)
    result = run(call)
    if result is None:
        return _values_like(*arguments).zero_()
    out = result.tokens.values[values.term]
    ignored = values.ignored(call)
    if ignored is not None:
        out = out.masked_fill(ignored, 0)
    if sources.rows is None and out.numel() == sources.shape.numel():
        # not a view: autograd lets nobody change those in place
        return out.view(sources.shape).clone(memory_format=torch.contiguous_format)
    return _spread(out, call, sources.shape)


def _values_like(*arguments) -> Tensor:
    student = Sources(*arguments[: len(Sources._fields)]).student[0]
    return student.new_empty(student.shape[:-1], dtype=torch.promote_types(student.dtype, torch.float32))


def _token_gradients(grad: Tensor, *arguments) -> list[Tensor]:
    sources, values = _split(arguments)
    call = values.call(sources)
    weight = grad.flatten()[call.layout.index]
    ignored = values.ignored(call)
    if ignored is not None:
        weight = weight.masked_fill(ignored, 0)
    needs = (*values.needs, *(False for _ in call.student.tensors[len(values.needs) :]))  # a bias that is not there
    result = run(replace(call, coefficients={values.term: weight}), needs)
    if result is None:
        return [t.zero_() for t in _gradients_like(grad, *arguments)]
    scale_(result.gradients, result.factors)
    return [g for g in result.gradients if g is not None]


def _gradients_like(grad: Tensor, *arguments) -> list[Tensor]:
    sources, values = _split(arguments)
    pairs = zip(sources.student, values.needs, strict=True)
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t, need in pairs if need]


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    sources, ctx.values = _split(inputs)
    # The teacher's too: an in-place change before backward must be an error, not another gradient.
    save(ctx, (*sources.student, *sources.teacher, sources.target, sources.rows))
    ctx.counts = len(sources.student), len(sources.teacher)
    ctx.sources = sources._replace(student=[], teacher=[], target=None, rows=None)


def _backward(ctx, grad: Tensor) -> tuple:
    tensors, (students, teachers) = saved(ctx), ctx.counts
    student, teacher = tensors[:students], tensors[students : students + teachers]
    target, rows = tensors[students + teachers :]
    sources = ctx.sources._replace(student=student, teacher=teacher, target=target, rows=rows)
    gradients = iter(token_gradients(grad, *sources, *ctx.values))
    d_student = [next(gradients) if need else None for need in ctx.values.needs]
    return d_student, *(_no_gradient(each) for each in (*sources[1:], *ctx.values))


def _no_second_derivatives(ctx, *grads):
    raise RuntimeError("kdkernels has no second derivatives: its gradients have no autograd formula")


def _no_gradient(argument: object) -> list[None] | None:
    """As PyTorch wants it: one None for each tensor of a list of tensors."""
    is_list = isinstance(argument, list) and all(isinstance(each, Tensor) for each in argument)
    return [None] * len(argument) if is_list else None


token_values = _registered(_token_values, f"({_VALUES}) -> Tensor", _values_like, _backward, _save)
token_gradients = _registered(
    _token_gradients, f"(Tensor grad, {_VALUES}) -> Tensor[]", _gradients_like, _no_second_derivatives
)


# ---- statistics ------------------------------------------------------------------------------------------------------


class _Statistics(Program):
    """No terms."""

    def __init__(self, topk: int, collision: int):
        self.reads = Needs(candidates=topk, collision=collision)


class _Asked(NamedTuple):
    """The arguments of token_statistics after the sources."""

    topk: int
    collision: int
    memory_budget: int | None
    logits_dtype: torch.dtype | None


def statistic_names(topk: int, targeted: bool, collision: int) -> list[str]:
    """Fields of Tokens that token_statistics returns of student or teacher, in order."""
    names = ["lse", "entropy", "argmax"]
    names += ["top_indices", "top_log_probs"] if topk else []
    names += ["cross_entropy"] if targeted else []
    return names + (["collision"] if collision else [])


def _token_statistics(*arguments) -> list[Tensor]:
    count = len(Sources._fields)
    sources, asked = Sources(*arguments[:count]), _Asked(*arguments[count:])
    call = sources.call(_Statistics(asked.topk, asked.collision), None, asked.memory_budget, asked.logits_dtype)
    result = run(call)
    if result is None:
        return [t.zero_() for t in _statistics_like(*arguments)]
    targeted = call.target is not None
    values = [getattr(result.tokens, n) for n in statistic_names(asked.topk, targeted, asked.collision)]
    if call.teacher:
        values += [getattr(result.tokens.teacher, n) for n in statistic_names(0, targeted, asked.collision)]
    return [_spread(v, call, sources.shape) for v in values]


def _statistics_like(*arguments) -> list[Tensor]:
    count = len(Sources._fields)
    sources, asked = Sources(*arguments[:count]), _Asked(*arguments[count:])

    def empty(tensors: list[Tensor], topk: int) -> list[Tensor]:
        dtype = torch.promote_types(tensors[0].dtype, torch.float32)
        return [
            tensors[0].new_empty(
                (*sources.shape, topk) if name.startswith("top_") else sources.shape,
                dtype=torch.int64 if name in ("argmax", "top_indices") else dtype,
            )
            for name in statistic_names(topk, sources.target is not None, asked.collision)
        ]

    return empty(sources.student, asked.topk) + (empty(sources.teacher, 0) if sources.teacher else [])


token_statistics = _registered(
    _token_statistics, f"({_SOURCES}, int topk, int collision, {_LIMITS}) -> Tensor[]", _statistics_like
)
