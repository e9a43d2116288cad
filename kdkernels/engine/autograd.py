"""The only torch.autograd.Function: a program's scalar loss, differentiable in the student's tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels import backend_for
from ..sources import Source
from .loop import run
from .spec import Call, Result


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
        # A second backward has these terms, coefficients and chunks, whatever becomes of the program in between.
        call.coefficients = result.coefficients
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
    if isinstance(grad, Tensor) and grad.device.type == "cpu":
        grad = grad.item()
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
    The call becomes the graph's: its sources are detached, and it gets its coefficients.
    """
    student = call.student.autocast()
    needs = needed(student)
    call.student, call.teacher = student.detach(), call.teacher and call.teacher.autocast().detach()
    out: list[Result | None] = []
    value = _Chunked.apply(call, needs, out, *student.tensors)
    return value, out[0]


def needed(student: Source) -> tuple[bool, ...]:
    """Which of the student's tensors want a gradient; nothing is computed for the others."""
    return tuple(t is not None and t.requires_grad and torch.is_grad_enabled() for t in student.tensors)
