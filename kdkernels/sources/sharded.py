"""What an output layer multiplies where each process holds a part of its weights: FSDP2's and tensor-parallel shards.

ZeRO-3 and FSDP2 gather the weights of a module while its wrapper's forward runs; what is left to do here is a layer
that is an FSDP2 unit of its own, whose forward nobody calls, and heads that are read outside. FSDP2's processes have
tokens of their own, so that a weight's gradient is the mean of theirs. The processes of a tensor-parallel group have
the same tokens, and each keeps the gradient of its rows. The tensors alone do not tell the two apart; the model does.

All processes read a head, whatever tokens they have: nobody waits for one that has none.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..tensors import READ_INSIDE, check_floating, is_sharded

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def whole(model: nn.Module, layer: nn.Module, hidden: Tensor, parameter: Tensor) -> Tensor:
    """A parameter of an output layer, with a gradient that arrives in it as its wrapper has it.

    Args:
        model: the layer's model, as a whole that FSDP2 or a tensor-parallel plan was applied to.
        layer: the output layer.
        hidden: [..., H] what it would be called with.
        parameter: of the layer or of an adapter on it; returned as it is where this process has all of it.

    Raises:
        TypeError: the shards are none that a head can be made of, or nothing says what they are.
        ValueError: the parameter is on another device than hidden.
        RuntimeError: its gradient would not reach FSDP2.
    """
    check_floating("hidden", hidden)
    if not is_sharded(parameter):
        _check_reaches(model, hidden, parameter)
        return parameter
    if parameter.device != hidden.device:
        raise ValueError(
            f"weight: expected device {hidden.device} (that of hidden), got {parameter.device}; FSDP2 moves what it "
            f"offloads there for its forward: {READ_INSIDE}"
        )
    unit = _unit(model, parameter, "sharded_param")
    if unit is not None:
        return _gathered(parameter, unit, hidden.dtype)
    if _plan(layer) is not None and _rows_alone(parameter):
        return parameter.to_local()
    raise TypeError(
        f"weight: {_said(parameter)}, and {type(model).__name__} has no FSDP2 unit of it and no tensor-parallel plan "
        f"that divides the rows of its output layer; {READ_INSIDE}, or pass kd.Logits(model(...).logits)"
    )


def _said(weight: Tensor) -> str:
    return f"got shards {weight.placements} on {weight.device_mesh}"


# ---- FSDP2 ----


def _unit(model: nn.Module, weight: Tensor, form: str):
    """The FSDP2 parameter group of ``weight``, which is its "sharded_param" or "_unsharded_param"; None if it has none.

    PyTorch has no public way to ask. A state has one group, since PyTorch 2.13 several.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return None
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
                if group and any(getattr(one, form, None) is weight for one in group.fsdp_params):
                    return group
    return None


def _gathered(parameter: Tensor, unit, dtype: torch.dtype) -> Tensor:
    """The gathered parameter: the gradients of all processes are averaged, or divided by what the unit was told.

    Like FSDP2's own, it is gathered in the dtype of the products (MixedPrecisionPolicy's param_dtype) where the
    parameter has a wider one. The gradient is reduced in the parameter's own.
    """
    from torch.distributed.tensor import Partial, Replicate

    dimensions, factor = parameter.device_mesh.ndim, unit.gradient_divide_factor
    if dimensions != unit.mesh_info.mesh.ndim:
        raise TypeError(
            f"weight: {_said(parameter)}: no kd.Head is made of shards of both FSDP2 and tensor parallelism; "
            f"{READ_INSIDE}, where FSDP2 has gathered its part (the output layer is no FSDP2 unit of its own)"
        )
    narrower = dtype if dtype.itemsize < parameter.dtype.itemsize else None
    gathered = parameter.redistribute(placements=[Replicate()] * dimensions, forward_dtype=narrower)
    whole = gathered.to_local(grad_placements=[Partial("sum" if factor else "avg")] * dimensions)
    if factor and whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / factor)
    return whole


def class_of(module: nn.Module) -> type:
    """The class that a module had before FSDP2 gave it one that is both FSDP2's and the module's."""
    first, *others = type(module).__bases__
    return others[0] if others and first.__module__.startswith("torch.distributed.fsdp") else type(module)


def _check_reaches(model: nn.Module, hidden: Tensor, weight: Tensor) -> None:
    """Outside its forward FSDP2 learns of a backward from the tensors that its forward returned, and only from them."""
    if not weight.requires_grad or hidden.requires_grad or not torch.is_grad_enabled():
        return
    unit = _unit(model, weight, "_unsharded_param")
    if unit is not None and unit._training_state.name == "IDLE":
        raise RuntimeError(
            "weight: no gradient would reach it: hidden requires none, so FSDP2 would not see the backward; "
            f"{READ_INSIDE}"
        )


# ---- tensor parallel ----


def before_tensor_parallelism(forward: Callable | None) -> Callable | None:
    """The forward of a module that transformers' tensor parallelism replaced by one around it; others as they are."""
    return _around(forward).get("original_forward", forward)


def _around(forward: Callable | None) -> dict:
    """What a forward that transformers' tensor parallelism made knows: ``self``, its style, and ``original_forward``"""
    ours = getattr(forward, "__module__", None) == "transformers.distributed.tensor_parallel"
    return inspect.getclosurevars(forward).nonlocals if ours else {}


def divided(layer: nn.Module, hidden: Tensor) -> tuple[Tensor, ProcessGroup | None]:
    """The processes that divide the rows of an output layer by a tensor-parallel plan, and what it multiplies there.

    Returns:
        hidden [..., H] as the plan gives it to the layer, whole on each process (a plan for sequence parallelism
        gathers it), and the group of the processes; hidden as it is and None where there is no such plan.

    Raises:
        TypeError: the plan takes the input of the layer in pieces, or some of the processes have no row.
    """
    inputs = _plan(layer)
    if inputs is None or not is_sharded(layer.weight) or not _rows_alone(layer.weight):
        return hidden, None
    check_floating("hidden", hidden)
    mesh, rows = layer.weight.device_mesh, layer.weight.shape[0]
    if -(-rows // mesh.size()) * (mesh.size() - 1) >= rows:
        raise TypeError(f"weight: expected rows on each of {mesh.size()} processes, got {rows} in all")
    return inputs(hidden), mesh.get_group()


def _rows_alone(weight: Tensor) -> bool:
    """Whether each process of the mesh has rows of its own, in the order of the ranks."""
    from torch.distributed.tensor import Shard

    mesh = weight.device_mesh
    if mesh.ndim != 1 or weight.placements != (Shard(0),):
        return False
    return mesh.mesh.tolist() == sorted(mesh.mesh.tolist())


def _plan(layer: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a tensor-parallel plan, PyTorch's or transformers', does with the input of the layer that it has cut; None
    where there is none.
    """
    for hook in layer._forward_pre_hooks.values():
        if hook.__module__.startswith("torch.distributed.tensor"):
            return lambda hidden: hook(layer, (hidden,)).full_tensor()
    style = _around(layer.__dict__.get("forward")).get("self")
    return None if style is None else partial(_transformers_input, layer, style)


def _transformers_input(layer: nn.Module, style, hidden: Tensor) -> Tensor:
    """What a style of transformers' tensor parallelism makes of the layer's input: all of it on each process."""
    if not style.input_layouts.is_replicate():
        raise TypeError(
            f"hidden: expected a tensor-parallel plan whose output layer takes them whole, got {style.input_layouts}; "
            "pass kd.Logits(model(...).logits)"
        )
    return hidden
