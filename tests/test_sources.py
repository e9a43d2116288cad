"""Sources are one protocol: nobody outside asks of what class one is, and a new one needs no other file."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import truth
from torch import Tensor

import kdkernels as kd
from kdkernels.sources import Costs, Producer, Source, packed, row_bytes, take, unpacked
from kdkernels.sources.logits import LogitsProducer

F64 = torch.float64
PACKAGE = Path(kd.__file__).parent
CLASSES = {"Head", "Logits", "TopK", "Source"}


# ---- nobody asks -----------------------------------------------------------------------------------------------------


def mentions(node: ast.AST | None) -> bool:
    """Whether an expression names one of the classes."""
    found = {getattr(each, field, None) for each in ast.walk(node) for field in ("id", "attr", "value")} if node else ()
    return any(isinstance(each, str) and each in CLASSES for each in found)


def ladders(source: str) -> list[int]:
    """Lines that decide by the class of a source: isinstance, type(x) is X, a match, a table of classes."""
    out = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, classes]) if mentions(classes):
                out.append(node.lineno)
            case ast.Compare() if any(map(mentions, (node.left, *node.comparators))):
                out.append(node.lineno)
            case ast.Dict() if any(isinstance(key, (ast.Name, ast.Attribute)) and mentions(key) for key in node.keys):
                out.append(node.lineno)
            case ast.MatchClass() if mentions(node.cls):
                out.append(node.cls.lineno)
    return out


def test_no_module_but_the_sources_asks_for_a_sources_class():
    paths = [path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE / "sources"]
    assert len(paths) > 40 and PACKAGE / "engine" / "loop.py" in paths
    found = {str(path.relative_to(PACKAGE)): ladders(path.read_text()) for path in paths}
    assert {name: lines for name, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "ladder",
    [
        "isinstance(x, Head)",
        "isinstance(x, (Tensor, kd.TopK))",
        "issubclass(type(x), sources.Source)",
        "type(x) is Logits",
        "type(x).__name__ == 'TopK'",
        "{Head: 1, Logits: 2}[type(x)]",
        "match x:\n    case Head():\n        pass",
    ],
)
def test_the_check_sees_a_ladder(ladder):
    assert ladders(ladder) and not ladders("isinstance(x, Layout) or x.complete or type(x) is Tensor")


# ---- a new kind of teacher -------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Blend(Source):
    """A teacher whose logits are computed chunk by chunk: share * first + (1 - share) * second, [..., V] each."""

    first: Tensor
    second: Tensor
    share: float = 0.5

    names = ("first", "second")
    axis = "V"

    @property
    def vocabulary(self) -> int:
        return self.first.shape[-1]

    @property
    def numbers(self) -> list[float]:
        return [self.share]

    @classmethod
    def unpack(cls, tensors: list[Tensor], numbers: list[float]) -> Blend:
        return cls(*tensors, *numbers)

    def costs(self, backend, vocabulary, dtype, largest, trained) -> Costs:
        return Costs(0, 0, 3 * row_bytes(vocabulary, self.device, dtype, largest))

    def producer(self, backend, index, vocabulary, buffer, needs=None, pieces=1) -> BlendProducer:
        return BlendProducer(self, backend, index, vocabulary, buffer)


class BlendProducer(Producer):
    def __init__(self, source: Blend, *rest):
        super().__init__(*rest)
        self.source = source

    def fill(self, tokens: slice, logits: Tensor) -> None:
        at, columns = self.index[tokens], slice(self.vocabulary)
        first, second = (take(each[..., columns], at) for each in self.source.tensors)
        logits.copy_(torch.lerp(second, first, self.source.share))


@dataclass(frozen=True, eq=False)
class Cooled(kd.Logits):
    """A student with logits / temperature, differentiable in the logits."""

    cooling: float = 1.0

    @property
    def numbers(self) -> list[float]:
        return [self.vocabulary, self.cooling]

    @classmethod
    def unpack(cls, tensors: list[Tensor], numbers: list[float]) -> Cooled:
        return cls(tensors[0], int(numbers[0]), numbers[1])

    def producer(self, backend, index, vocabulary, buffer, needs=None, pieces=1) -> CooledProducer:
        made = CooledProducer(self.logits, backend, index, vocabulary, buffer, needs or (False,))
        made.cooling = self.cooling
        return made


class CooledProducer(LogitsProducer):
    def fill(self, tokens: slice, logits: Tensor) -> None:
        super().fill(tokens, logits)
        logits /= self.cooling

    def add(self, tokens: slice, d_logits: Tensor, powers: Tensor | None) -> None:
        super().add(tokens, d_logits / self.cooling, powers)


def blend(vocabulary: int = 11, share: float = 0.3) -> tuple[Blend, Tensor]:
    """A teacher and its full logits."""
    first, second = torch.randn(2, 2, 5, vocabulary, dtype=F64)
    return Blend(first, second, share), share * first + (1 - share) * second


def head() -> kd.Head:
    return kd.Head(*(torch.randn(*shape, dtype=F64, requires_grad=True) for shape in ((2, 5, 4), (11, 4), (11,))))


def gradients(loss: Tensor, source: Source) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [t for t in source.tensors if t is not None]))


def same(got: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert other.norm() > 0
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", truth.DIVERGENCES)
def test_a_new_teacher_is_one_class(name):
    torch.manual_seed(0)
    student, (teacher, full) = head(), blend()
    weight, rows = torch.rand(2, 5, dtype=F64), torch.tensor([[True] * 4 + [False]] * 2)
    z = student.hidden @ student.weight.T + student.bias
    expected = truth.divergence(z, full, name, 0.7) * rows
    got = kd.divergence(student, teacher, truth.DIVERGENCES[name][0], 0.7, rows=rows)
    same([got, *gradients((got * weight).sum(), student)], [expected, *gradients((expected * weight).sum(), student)])


def test_a_new_teacher_in_an_objective_chunk_by_chunk():
    torch.manual_seed(1)
    student, (teacher, full) = head(), blend()
    mask = torch.tensor([[True, True, False, True, True], [True] * 5])
    expected = kd.GKD(0.9)(student, kd.Logits(full), mask)
    d_expected = gradients(expected.loss, student)
    with pytest.raises(ValueError, match="memory_budget: expected at least") as error:
        kd.GKD(0.9)(student, teacher, mask, memory_budget=1)
    least = int(str(error.value).split("at least ")[1].split()[0])
    for memory_budget in (None, least):  # the least: one token at a time
        got = kd.GKD(0.9)(student, teacher, mask, memory_budget=memory_budget)
        assert got.metrics.keys() == expected.metrics.keys()
        same([got.loss, *gradients(got.loss, student)], [expected.loss, *d_expected])


def test_a_new_teacher_is_checked_like_the_others():
    teacher, _ = blend(vocabulary=9)
    with pytest.raises(ValueError, match="teacher: expected a vocabulary of at least the student's 11"):
        kd.GKD()(head(), teacher, torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"teacher: expected first of shape \[2, 5, 'V'\]"):
        kd.divergence(head(), Blend(*torch.randn(2, 3, 5, 11, dtype=F64)), kd.JSD(0.5))
    with pytest.raises(TypeError, match=r"student: expected kd\.Head or kd\.Logits, got Blend"):
        kd.entropy(teacher)


def test_a_new_student_is_one_class():
    torch.manual_seed(2)
    logits, (teacher, _) = torch.randn(2, 5, 11, dtype=F64, requires_grad=True), blend()
    mask, cooled = torch.ones(2, 5, dtype=torch.bool), Cooled(logits, cooling=0.7)
    for loss in (
        lambda student: kd.divergence(student, teacher, kd.JSD(0.3)).square().sum(),
        lambda student: kd.GKD(0.3)(student, teacher, mask).loss,
    ):
        got, expected = loss(cooled), loss(kd.Logits(logits / 0.7))
        same([got, *gradients(got, cooled)], [expected, *torch.autograd.grad(expected, logits)])


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_packed_sources_come_back():
    ids = torch.tensor([[3, 1]])
    for source in (
        kd.Head(torch.randn(2, 3), torch.randn(5, 3), softcap=2.0, scale=0.5, vocab_size=4),
        kd.Head(torch.randn(2, 3), torch.randn(5, 3), torch.randn(5)),
        kd.Logits(torch.randn(2, 5)),
        kd.TopK(ids, torch.tensor([[-1.0, -2.0]]), renormalize=True),
        kd.TopK(ids, torch.tensor([[-1.0, -2.0]]), sampled=True),
        blend()[0],
    ):
        back = unpacked(*packed(source))
        assert type(back) is type(source)
        assert all(a is b for a, b in zip(back.tensors, source.tensors, strict=True))
        assert packed(back)[1:] == packed(source)[1:]
    assert unpacked(*packed(None)) is None


def test_a_class_made_twice_does_not_change_the_first():
    def make(factor: float) -> type:
        @dataclass(frozen=True, eq=False)
        class Scaled(kd.Logits):
            @classmethod
            def unpack(cls, tensors, numbers):
                return cls(tensors[0] * factor, int(numbers[0]))

        return Scaled

    z = torch.randn(3, 11)
    first = make(1.0)
    before = kd.entropy(first(z))
    second = make(5.0)
    assert not torch.equal(kd.entropy(second(z)), before)
    assert torch.equal(kd.entropy(first(z)), before)


def test_fields_that_would_be_lost_are_refused():
    with pytest.raises(TypeError, match=r"More: expected numbers and unpack of its own for its fields \['more'\]"):

        @dataclass(frozen=True, eq=False)
        class More(kd.Logits):
            more: float = 1.0


def test_the_key_of_no_class_here_is_named():
    with pytest.raises(RuntimeError, match=r"elsewhere\.Source: expected a source that is defined here"):
        unpacked([], "elsewhere.Source", [])
