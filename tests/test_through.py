"""kd.through: a function in the forward of what wraps a model. What several processes reduce: test_wrappers.py."""

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import kdkernels as kd
from kdkernels import wrappers


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return self.layer(x)


class Wrapper(nn.Module):
    """One that nobody knows."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Outer(Wrapper):
    """It notes what it sees."""

    def __init__(self, module):
        super().__init__(module)
        self.seen = []

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        self.seen += [(args, kwargs), out]
        return out


class Never(Wrapper):
    def forward(self, *args, **kwargs):
        return None


class Twice(Wrapper):
    def forward(self, *args, **kwargs):
        self.module(*args, **kwargs)
        return self.module(*args, **kwargs)


def untouched(module):
    return [vars(m).keys() & {"forward", "_compiled_call_impl"} for m in module.modules()]


def test_a_plain_module_runs_the_function_and_its_hooks():
    model, seen = Model(), []
    model.register_forward_hook(lambda module, args, out: seen.append((args, out)))
    assert kd.through(model, lambda a, *, b: {"sum": [a + b]}, 2, b=3) == {"sum": [5]}
    assert seen == [((2,), {"sum": [5]})] and not any(untouched(model))


def test_wrappers_see_arguments_and_result():
    model = Model()
    wrapper, x = Outer(Outer(model)), torch.randn(4, 3)

    def function(x, scale):
        assert wrappers.is_inside(wrapper) and wrappers.is_inside(model)
        return scale * model(x)  # the model's own forward

    out = kd.through(wrapper, function, x, scale=2)
    assert torch.equal(out, 2 * model.layer(x)) and not wrappers.is_inside(wrapper)
    assert wrapper.seen[0] == ((x,), {"scale": 2}) and wrapper.seen[1] is out is wrapper.module.seen[1]
    assert torch.equal(wrapper(x), model.layer(x))


def test_no_wrapper_looks_into_sources_and_layouts():
    """FSDP1 would cast their tensors, Lightning's Fabric refuses them."""
    head, layout = kd.Head(torch.ones(1, 2), torch.ones(3, 2)), kd.Layout.from_mask(torch.ones(1, 2).bool())
    wrapper, x = Outer(Model()), torch.ones(1)
    same = kd.through(wrapper, lambda a, b, *, c: [a is head, b is x, c is layout], head, x, c=layout)
    assert same == [True] * 3
    (first, second), named = wrapper.seen[0]
    assert second is x and not any(isinstance(value, (kd.Head, kd.Layout)) for value in (first, *named.values()))


def test_the_function_may_have_any_argument():
    assert kd.through(Model(), lambda wrapper, function: wrapper + function, wrapper=1, function=2) == 3


@pytest.mark.parametrize(
    "how", ["compile(model)", "model.compile()", "compile(Wrapper)", "Wrapper(compile)", "forward"]
)
def test_compiled_wrappers_stay_compiled(how):
    """The function runs as it is; afterwards the compiled forward is there again, and is not compiled anew."""
    model, compiled = Model(), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    options = {"backend": backend, "fullgraph": True}
    wrapper = {
        "compile(model)": lambda: torch.compile(model, **options),
        "model.compile()": lambda: model.compile(**options) or model,
        "compile(Wrapper)": lambda: torch.compile(Wrapper(model), **options),
        "Wrapper(compile)": lambda: Wrapper(torch.compile(model, **options)),
        "forward": lambda: setattr(model, "forward", torch.compile(model.forward, **options)) or model,
    }[how]()
    x = torch.randn(4, 3)
    expected = model.layer(x)
    torch._dynamo.reset()
    torch.testing.assert_close(wrapper(x), expected)
    before = len(compiled)
    assert before > 0

    def function(x):
        return [str(model.layer.weight.shape), x + 1]  # no graph: the text would break one

    for _ in range(3):
        name, out = kd.through(wrapper, function, x)
        assert name == "torch.Size([2, 3])" and torch.equal(out, x + 1)
    torch.testing.assert_close(wrapper(x), expected)
    assert len(compiled) == before


def test_an_exception_leaves_everything_as_it_was():
    model = Model()
    wrapper = Outer(torch.compile(model, backend="eager"))
    before = untouched(wrapper)

    def function():
        raise ArithmeticError("inside")

    for call in (function, lambda: kd.through(wrapper, function), lambda: object()):
        with pytest.raises((ArithmeticError, RuntimeError, TypeError)):
            kd.through(wrapper, call)
        assert untouched(wrapper) == before and not wrappers._RUNNING
    assert kd.through(wrapper, lambda: 1) == 1


def test_the_wrapper_may_fail_before_the_function():
    class Broken(Outer):
        def forward(self, *args):
            raise ValueError("no input")

    wrapper = Broken(Model())
    with pytest.raises(ValueError, match="no input"):
        kd.through(wrapper, lambda: 1)
    assert not any(untouched(wrapper))


def test_other_models_within():
    student, teacher = Outer(Model()), Outer(Model())
    x = torch.randn(4, 3)

    def function():
        scored = kd.through(teacher, lambda: teacher.module(x))
        assert wrappers.is_inside(student) and not wrappers.is_inside(teacher)
        return scored + student.module(x)

    assert torch.equal(kd.through(student, function), teacher.module(x) + student.module(x))


def test_within_itself_is_refused():
    wrapper = Outer(Model())
    for again in (wrapper, wrapper.module):
        with pytest.raises(RuntimeError, match="in the forward of this Model already"):
            kd.through(wrapper, lambda again=again: kd.through(again, lambda: 1))


class Opaque:
    def __init__(self, loss):
        self.loss = loss


@pytest.mark.parametrize(
    ("wrapper", "function", "error", "words"),
    [
        (lambda: 3, lambda: 1, TypeError, ["wrapper", "torch.nn.Module", "int"]),
        (lambda: lambda x: x, lambda: 1, TypeError, ["wrapper", "torch.nn.Module", "function"]),
        (Model, 5, TypeError, ["function", "callable", "int"]),
        (Model, lambda: Opaque(torch.ones(())), TypeError, ["function", "Opaque", "kd.Output"]),
        (
            Model,
            lambda: [kd.Head(torch.ones(1, 2), torch.ones(3, 2))],
            TypeError,
            ["function", "Head", "pytree"],
        ),
        (lambda: Never(Model()), lambda: 1, RuntimeError, ["call the Model in it, Never did not"]),
        (lambda: Twice(Model()), lambda: 1, RuntimeError, ["call the Model in it once", "again"]),
        (lambda: checkpoint_wrapper(Model()), lambda: 1, TypeError, ["wrapper", "checkpoint", "layers"]),
        (lambda: Outer(checkpoint_wrapper(Model())), lambda: 1, TypeError, ["wrapper", "checkpoint", "layers"]),
    ],
)
def test_what_is_refused(wrapper, function, error, words):
    with pytest.raises(error) as caught:
        kd.through(wrapper(), function)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("how", ["method", "function", "twice", "around a hook"])
def test_autocast_of_the_own_forward(how):
    """As accelerate puts it there, for a model alone and around what moves its inputs."""
    model = Model()
    cast = torch.autocast("cpu", torch.bfloat16)
    if how == "method":
        model.forward = cast(Model.forward).__get__(model)
    elif how == "function":
        model.forward = cast(model.forward)
    elif how == "twice":
        model.forward = torch.autocast("cpu", torch.float16)(cast(model.forward))
    else:
        model._old_forward = model.forward
        model.forward = cast(lambda *args, **kwargs: model._old_forward(*args, **kwargs))
    x = torch.randn(4, 3)
    before = dict(vars(model))
    assert model(x).dtype == torch.bfloat16
    for wrapper in (model, Outer(model)):
        inside, own, after = kd.through(wrapper, lambda: (model.layer(x), model(x), model.layer(x)))
        assert inside.dtype == own.dtype == after.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu")
    assert vars(model) == before and model.layer(x).dtype == torch.float32
