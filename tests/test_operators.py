"""Native's row operators are what torch expects of a mutating operator: schema, fake kernel, no autograd."""

import inspect

import pytest
import torch
from backends import BF16, COMPILED, F16, F32

import kdkernels as kd
from kdkernels.kernels import Coefficients, Request, backend_for
from kdkernels.kernels.torch_ops import OperatorBackend, Operators

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own tracing


@pytest.fixture(params=COMPILED)
def plain(request, monkeypatch) -> OperatorBackend:
    """Each backend that is three functions."""
    monkeypatch.setenv("KDKERNELS_BACKEND", request.param)
    return backend_for(torch.device("cpu"), F32)


def checked(backend: OperatorBackend) -> OperatorBackend:
    """The same, whose operators are checked at every call, and then called."""

    def with_opcheck(operator):
        def call(*args):
            result = torch.library.opcheck(operator, args)
            assert set(result.values()) == {"SUCCESS"}, result
            assert operator(*args) is None

        return call

    return type(backend)(Operators(*map(with_opcheck, backend.operators)))


@pytest.mark.parametrize("plain", ["native"], indirect=True)
@pytest.mark.parametrize("options", [(1.0, None, 1.0), (0.5, 30.0, 0.7)], ids=["plain", "transformed"])
def test_opcheck(plain, options):
    pairs = [
        (x, out) for x in (F32, BF16, F16) for out in (F32, BF16, F16) if not plain.refusal(Request("cpu", x, out))
    ]
    pairs = [(x, out) for x, out in pairs if out.itemsize < x.itemsize or out == x]
    assert len(pairs) >= 3
    for dtype, out_dtype in pairs:
        assert sweep(plain, dtype, out_dtype, *options, checked(plain)).norm() > 0


def test_a_gradient_needs_room(plain):
    with pytest.raises((RuntimeError, ValueError), match="out_dtype"):
        sweep(plain, BF16, F32, 1.0, None, 1.0, plain)


def sweep(plain, dtype, out_dtype, scale, softcap, temperature, backend) -> torch.Tensor:
    """All three operators, with and without a teacher; the last gradient."""
    torch.manual_seed(0)
    x_s, x_t = torch.randn(2, 40).to(dtype), torch.randn(2, 40).to(dtype)
    ids = torch.tensor([[1, 39], [7, 7]])
    coefficients = Coefficients(torch.randn(3, 2), ids, torch.randn(2, 2))
    for divergence in (None, kd.SkewReverseKL(0.1)):
        buffer = x_s.clone()
        s = backend.statistics(buffer, scale, softcap, temperature, 3, ids)
        t = plain.statistics(x_t, scale, softcap, temperature, 1, None)
        sums = backend.divergence(s, t, divergence, temperature)[1] if divergence else None
        out = buffer.view(out_dtype)[:, :40] if out_dtype.itemsize <= dtype.itemsize else torch.empty(2, 40)
        backend.gradient_(s, t if divergence else None, divergence, temperature, sums, coefficients, out)
    return out.float()


def test_the_backends_agree_on_their_functions():
    """One set of adapters calls them all, by position."""
    from kdkernels.kernels.native import BACKEND as native
    from kdkernels.kernels.triton.backend import BACKEND as triton

    for operator, function in zip(native.operators, triton.operators, strict=True):
        assert [a.name for a in operator._schema.arguments] == list(inspect.signature(function).parameters)
