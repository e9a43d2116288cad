"""Running a function inside the forward of what wraps a model.

DDP, FSDP, DeepSpeed and accelerate prepare for a backward in the forward of the module that they wrap: they gather
weights, choose a dtype, and note which gradients they have to reduce. A loss from hidden states and the lm_head's
weight is not the model's own forward, so it has to be computed in there. ``through`` is the way, and ``refuse_outside``
catches those who did not take it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# What a wrapper calls the module in it: torch.compile; Lightning's Fabric; FSDP1; DDP, DeepSpeed and most others.
COMPILED = "_orig_mod"
INNER = (COMPILED, "_forward_module", "_fsdp_wrapped_module", "module")
PLAIN = (Tensor, type(None), bool, int, float, complex, str)
_RUNNING: list[nn.Module] = []  # the models whose forward a function now runs in


def through(wrapper: nn.Module, function: Callable, /, *args, **kwargs) -> Any:
    """What ``function(*args, **kwargs)`` returns, run inside the forward of ``wrapper``.

    For one call the function takes the place of the forward of the model in the wrapper, and the wrapper is called. So
    DDP, FSDP, DeepSpeed, accelerate, Fabric and whatever they are nested in gather the weights and reduce the gradients
    of all that the function uses, as they do for the model's own forward::

        def loss(teacher, labels, **inputs):
            student = kd.Head.of(model, **inputs)
            return kd.GKD()(student, teacher, kd.Layout.from_labels(labels))

        out = kd.through(model, loss, teacher, **batch)

    Inside the function everything is as it was: it may call the model's own forward, and ``through`` of other models.

    The arguments pass through the wrapper as a batch does, so it may move tensors to its device and cast them; what
    must not be cast (a count, weights of tokens) belongs in the function's closure. Sources and layouts stay as they
    are. Of what replaced the model's own forward the autocast of accelerate and of ``torch.autocast`` as decorators is
    kept; a forward that torch.compile compiled takes no part, the function runs as it is. Hooks on the wrapper and the
    model see the function's arguments and its result.

    Args:
        wrapper: the model as it is trained: wrapped, with FSDP2's ``fully_shard`` applied, or plain. A module that
            nobody knows is a wrapper if it has a child named ``module``, else the model itself.
        function: it uses the model's parameters, whose gradients are wanted.
        args, kwargs: of the function.

    Returns:
        The function's result: tensors in tuples, lists, dicts and whatever else is a pytree. A ``kd.Output`` is one.

    Raises:
        TypeError: wrapper is no module or function is not callable; the function returns something in which no wrapper
            looks for tensors, whose gradients would not be reduced; the model is checkpointed as a whole, so that the
            backward would run its own forward instead of the function.
        RuntimeError: it is called for a model within the function that runs in it; the wrapper's forward does not call
            the module in it exactly once.
    """
    path = _path_to_model(wrapper, function)
    with ExitStack() as swapped:
        run = _Run(path[-1], function, swapped)
        for module in path:
            _swap(swapped, module, "_compiled_call_impl", None)  # model.compile()
            if COMPILED in module._modules:
                _swap(swapped, module, "forward", module._modules[COMPILED])
        run.take_place()
        out = wrapper(*map(_held, args), **{name: _held(value) for name, value in kwargs.items()})
        if run.calls == 0:
            raise RuntimeError(f"wrapper: expected its forward to call {run.name}, {type(wrapper).__name__} did not")
    return out


def _path_to_model(wrapper: nn.Module, function: Callable) -> list[nn.Module]:
    """The modules from the wrapper to the model in it, after ``through``'s checks of what it is given."""
    if not isinstance(wrapper, nn.Module):
        raise TypeError(f"wrapper: expected a torch.nn.Module, got {type(wrapper).__name__}")
    if not callable(function):
        raise TypeError(f"function: expected something callable, got {type(function).__name__}")
    path = list(modules_within(wrapper))
    model = path[-1]
    if "_checkpoint_wrapped_module" in model._modules:
        raise TypeError(
            "wrapper: expected a model that is not checkpointed as a whole (the backward would run the model's own "
            "forward in place of the function), got a CheckpointWrapper; checkpoint its layers"
        )
    if any(model is running for running in _RUNNING):
        raise RuntimeError(
            f"wrapper: a function runs in the forward of this {type(model).__name__} already; call what you need "
            "there directly"
        )
    return path


class _Run:
    """The function in place of a model's forward, once: autocast as that one has it, and within it every forward is in
    its own place.
    """

    def __init__(self, model: nn.Module, function: Callable, swapped: ExitStack):
        self.model, self.function, self.swapped, self.calls = model, function, swapped, 0
        self.name = f"the {type(model).__name__} in it"
        self.autocasts = autocasts_around(model)
        hooked = "_old_forward" in vars(model) and not self.autocasts  # accelerate's hooks, which move a batch
        self.forward = "_old_forward" if hooked else "forward"

    def take_place(self) -> None:
        _swap(self.swapped, self.model, self.forward, self)

    def __call__(self, *args, **kwargs) -> Any:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError(f"wrapper: expected its forward to call {self.name} once, it does again")
        self.swapped.close()
        _RUNNING.append(self.model)
        try:
            with ExitStack() as entered:
                for context in self.autocasts:
                    entered.enter_context(context)
                out = self.function(*map(given_to, args), **{name: given_to(value) for name, value in kwargs.items()})
        finally:
            _RUNNING.pop()
        self.take_place()
        for leaf in torch.utils._pytree.tree_leaves(out):
            if not isinstance(leaf, PLAIN):
                raise TypeError(
                    f"function: expected it to return tensors in tuples, lists, dicts or other pytrees (kd.Output is "
                    f"one), got {type(leaf).__name__}, in which no wrapper looks for tensors"
                )
        return out


class Held:
    """An argument that no wrapper looks into."""

    def __init__(self, value: object):
        self.value = value


def _held(value: object) -> object:
    """A kd.Head, kd.TopK or kd.Layout, whose tensors some wrappers would cast (FSDP1) and others refuse (Fabric)."""
    parameters = getattr(type(value), "__dataclass_params__", None)
    return Held(value) if parameters is not None and parameters.frozen else value


def given_to(value: object) -> object:
    return value.value if isinstance(value, Held) else value


def _swap(swapped: ExitStack, module: nn.Module, name: str, value: object) -> None:
    """Sets an attribute of this very module, until the stack is closed."""
    own = vars(module)
    if own.get(name) is value:
        return
    if name in own:
        swapped.callback(own.__setitem__, name, own[name])
    else:
        swapped.callback(own.pop, name)
    own[name] = value


def modules_within(wrapper: nn.Module) -> Iterator[nn.Module]:
    """The wrapper, the one in it, and so on to the model."""
    while wrapper is not None:
        yield wrapper
        children = wrapper._modules
        wrapper = next((children[name] for name in INNER if children.get(name) is not None), None)


def autocasts_around(model: nn.Module) -> list[torch.autocast]:
    """New contexts like those around the model's own forward, where its forward was decorated with autocast."""
    forward, found = vars(model).get("forward"), []
    while forward is not None:
        forward = getattr(forward, "__func__", forward)
        if forward is type(model).forward:
            break
        cells = getattr(forward, "__closure__", None) or ()
        # copies, because the function may call the decorated forward: one context cannot be entered within itself
        found += [copy(cell.cell_contents) for cell in cells if isinstance(cell.cell_contents, torch.autocast)]
        forward = getattr(forward, "__wrapped__", None)
    return found


def is_inside(model: nn.Module) -> bool:
    """Whether the forward of ``model``, a model or what wraps it, runs now, as far as that can be known."""
    path = list(modules_within(model))
    if any(path[-1] is running for running in _RUNNING) or DistributedDataParallel._active_ddp_module in path:
        return True
    if _is_recomputed():
        return True
    return any(_is_sharded(module) and _forward_runs(module) for module in path)


def is_wrapped(model: nn.Module) -> bool:
    """Whether something prepares for a backward in the forward of ``model``, or chooses a dtype there."""
    path = list(modules_within(model))
    wrappers = [module for module in path[:-1] if COMPILED not in module._modules]
    return bool(wrappers) or any(map(_is_sharded, path)) or bool(autocasts_around(path[-1]))


def refuse_outside(model: nn.Module) -> None:
    """Raises a RuntimeError where the hidden states of ``model`` are about to be computed outside of its wrapper's
    forward, so that gradients would not be reduced, or weights not be gathered.

    What wraps a model cannot be seen from the model. DDP is looked for among all objects, once a model and where there
    are several processes (.4 s). Models that were taken out of DeepSpeed's engine or FSDP1 need no looking: ZeRO 0 to 2
    reduce all the same, ZeRO-3 and FSDP1 have no weights there to compute with.
    """
    _check_model(model)
    path = list(modules_within(model))
    sharded = any(map(_is_sharded, path))
    if (torch.is_grad_enabled() or sharded) and is_wrapped(model) and not is_inside(model):
        raise RuntimeError(_OUTSIDE.format(" in ".join(type(module).__name__ for module in reversed(path))))
    if torch.is_grad_enabled() and _is_left_out(path[-1]):
        _refuse_left_out(path[-1])


def refuse_unprepared(model: nn.Module, hidden: Tensor) -> None:
    """Raises a RuntimeError where ``hidden``, states of ``model`` that require a gradient, cannot have come through the
    DDP around it, because that one's forward has never run. Found as in ``refuse_outside``.
    """
    _check_model(model)
    *_, inner = modules_within(model)
    ddp = ddp_around(inner) if hidden.requires_grad else None
    if ddp is not None and not ddp._lazy_init_ran and _is_left_out(inner):
        _refuse_left_out(inner)


def _is_left_out(model: nn.Module) -> bool:
    """Whether DDP is to reduce the gradients of ``model``, and neither its forward runs nor, in a backward, what was
    checkpointed in it.
    """
    active, ddp = DistributedDataParallel._active_ddp_module, ddp_around(model)
    if ddp is None or active is ddp or _is_recomputed():
        return False
    around = active is not None and any(module is model for module in active.modules())  # one that was made later
    return not around and any(parameter.requires_grad for parameter in model.parameters())


def _refuse_left_out(model: nn.Module) -> None:
    gc.collect()  # a DDP that nobody uses any more reduces nothing; it stays in a cycle until then
    ddp = ddp_around(model)
    if ddp is not None:
        raise RuntimeError(_OUTSIDE.format(f"{type(model).__name__} out of a {type(ddp).__name__}"))


def _is_recomputed() -> bool:
    """Whether a backward runs, in which what was checkpointed is computed again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a model of transformers, got {type(model).__name__}")


_OUTSIDE = (
    "model: expected to be called in the forward of what wraps it, got {} outside of it, where gradients are not "
    "reduced, weights not gathered and autocast not entered; run what uses the model's hidden states and head in "
    "kd.through(wrapper, function, ...), or give the wrapped model to kd.Distillation"
)


def ddp_around(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP that reduces the gradients of ``model``: looked for in the first call where there are several processes,
    and again when the one that was found is gone.

    A DDP made after a call that found none is not found, nor one that compiled autograd serves.
    """
    if (
        torch.compiler.is_compiling()
        or not torch.distributed.is_initialized()
        or torch.distributed.get_world_size() < 2
    ):
        return None
    known = _AROUND.get(model)
    if known is None or (isinstance(known, weakref.ref) and known() is None):  # another may be there by now
        every = (found for found in gc.get_objects() if issubclass(type(found), DistributedDataParallel))
        around = [ddp for ddp in every if any(module is model for module in ddp.modules())]
        _AROUND[model] = weakref.ref(around[0]) if around and not around[0]._use_python_reducer else lambda: None
    return _AROUND[model]()


_AROUND: weakref.WeakKeyDictionary[nn.Module, Callable] = weakref.WeakKeyDictionary()


def _is_sharded(module: nn.Module) -> bool:
    """Whether FSDP2's ``fully_shard`` was applied to it."""
    return any(each.__name__ == "FSDPModule" for each in type(module).__mro__)


def _forward_runs(module: nn.Module) -> bool:
    return module._get_fsdp_state()._training_state.name == "FORWARD"
