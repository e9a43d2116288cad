"""Which positions are scored, and which of them form a response."""

import math

import pytest
import torch
from batches import positions
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd


def responses(layout: kd.Layout) -> list[list[int]]:
    return [part.tolist() for part in layout.index.split(list(layout.lengths))]


def layout_of(lengths: list[int]) -> kd.Layout:
    return kd.Layout(torch.arange(sum(lengths)), tuple(lengths), (1, sum(lengths)))


@settings(deadline=None, derandomize=True)
@given(rows=st.integers(0, 5), length=st.integers(0, 6), seed=st.integers(0, 999))
def test_from_mask(rows, length, seed):
    mask = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.5
    layout = kd.Layout.from_mask(mask)
    assert responses(layout) == positions(mask)
    assert len(layout) == int(mask.sum()) and layout.responses == int(mask.any(1).sum())
    assert layout.shape == (rows, length) and layout.index.dtype == torch.int64


@settings(deadline=None, derandomize=True)
@given(rows=st.integers(0, 5), length=st.integers(1, 8), seed=st.integers(0, 999))
def test_from_spans_is_from_mask_of_the_same_places(rows, length, seed):
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, length, (rows,), generator=generator)
    ends = starts + (torch.rand(rows, generator=generator) * (length - starts + 1)).long()
    places = torch.arange(length)
    expected = kd.Layout.from_mask((starts[:, None] <= places) & (places < ends[:, None]))
    layout = kd.Layout.from_spans(starts.tolist(), (ends - starts).tolist(), length)
    assert torch.equal(layout.index, expected.index) and layout.index.dtype == torch.int64
    assert (layout.lengths, layout.shape) == (expected.lengths, expected.shape)


@settings(deadline=None, derandomize=True)
@given(rows=st.integers(1, 4), length=st.integers(1, 8), seed=st.integers(0, 999))
def test_from_segments(rows, length, seed):
    ids = torch.randint(0, 4, (rows, length), generator=torch.Generator().manual_seed(seed)) * 7
    expected = [[b * length + t for t in range(length) if ids[b, t] == i] for b in range(rows) for i in (7, 14, 21)]
    assert responses(kd.Layout.from_segments(ids)) == [r for r in expected if r]


def test_from_labels_shifts():
    """A label at t is what position t - 1 predicts; a label at the first position has nothing that predicts it."""
    labels = torch.tensor([[-100, -100, 5, 6, -100], [9, -100, -100, -100, 3], [-100] * 5])
    expected = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0] * 5]).bool()
    assert responses(kd.Layout.from_labels(labels)) == positions(expected)
    ignored = torch.where(labels == -100, 0, labels)
    assert responses(kd.Layout.from_labels(ignored, ignore_index=0)) == positions(expected)


def test_eos_is_kept_where_it_pads_too():
    """The mask, not the id, says what is a label: prompt 1 1, response 4 4 EOS, padding with the EOS id."""
    labels = torch.tensor([[-100, -100, 4, 4, 2, -100, -100]])
    assert responses(kd.Layout.from_labels(labels)) == [[1, 2, 3]]


def scores(seed=0, rows=2, length=7, vocabulary=11):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, vocabulary, generator=generator) * 2
    ids = torch.randint(0, vocabulary, (rows, length), generator=generator)
    return kd.Logits(logits), logits, ids


def test_targets_are_the_labels_shifted():
    student, logits, ids = scores()
    labels = ids.clone()
    labels[:, :3] = -100
    targets = kd.Layout.targets(labels)
    assert targets.tolist() == [[*row[1:], -100] for row in labels.tolist()]
    expected = -logits.double().log_softmax(-1)[:, 2:-1].gather(-1, ids[:, 3:, None]).mean()
    layout = kd.Layout.from_labels(labels)
    assert kd.SFT()(student, None, layout, target=targets).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert kd.SFT()(student, None, layout).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    values = kd.cross_entropy(student, targets)
    assert values.sum().item() == pytest.approx(expected.item() * 8, rel=1e-6)
    torch.testing.assert_close(kd.cross_entropy(student, targets, rows=layout), values)
    torch.testing.assert_close(kd.statistics(student, target=targets, rows=layout).target_log_prob, -values)


def test_a_mask_one_position_late_is_refused_beside_a_target():
    """labels != -100 is True at the final token, which predicts none of the response."""
    student, _, ids = scores()
    labels = ids.clone()
    labels[:, :3], labels[1, 5:] = -100, -100
    with pytest.raises(ValueError, match=r"^target: .*kd\.Layout\.from_labels\(labels\) is the mask"):
        kd.SFT()(student, None, labels != -100, target=kd.Layout.targets(labels))


@pytest.mark.parametrize("prompt", [0, 3])
def test_labels_that_nobody_shifted_are_refused_as_target(prompt):
    """With the prompt ignored and, what no range of ids betrays, with every token labelled."""
    student, _, ids = scores()
    labels = ids.clone()
    labels[:, :prompt] = -100
    layout = kd.Layout.from_labels(labels)
    calls = {
        "objective": lambda: kd.SFT()(student, None, layout, target=labels),
        "metric": lambda: kd.GKD(0.5)(student, student, layout, target=labels),
        "per token": lambda: kd.cross_entropy(student, labels, rows=layout),
        "statistics": lambda: kd.statistics(student, target=labels, rows=layout),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=r"^target: .*kd\.Layout\.targets\(labels\) shifts them"):
            call()
            pytest.fail(name)
    if prompt:  # a mask does not know the tokens, but an ignored label where one must be predicted is seen
        mask = torch.zeros_like(labels, dtype=torch.bool)
        mask[:, prompt - 1 : -1] = True
        with pytest.raises(ValueError, match=r"^target: expected ids in \[0, 11\), got -100 to .*shifts them"):
            kd.SFT()(student, None, mask, target=labels)


def test_where_looking_would_be_a_sync_a_wrong_token_becomes_one_without_a_loss(monkeypatch):
    labels = torch.tensor([[-100, 3, 4, 5]])
    layout = kd.Layout.from_labels(labels)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert layout.at(labels).tolist() == [-1, -1, -1]
    assert layout.at(kd.Layout.targets(labels)).tolist() == [3, 4, 5]
    assert layout.at(torch.tensor([[3, 9, 5, 0]])).tolist() == [3, -1, 5]


def test_ids_of_int32_are_those_of_int64():
    student, _, ids = scores()
    labels = torch.where(torch.arange(7) < 3, -100, ids)
    layout, small = kd.Layout.from_labels(labels), kd.Layout.from_labels(labels.int())
    assert torch.equal(small.token, layout.token) and small.token.dtype == torch.int64
    built = kd.Layout(layout.index.int(), layout.lengths, layout.shape, layout.token.int())
    assert built.index.dtype == built.token.dtype == torch.int64
    target = layout.target.int()
    for name, call in {
        "objective": lambda target: kd.SFT()(student, None, built, target=target).loss,
        "per token": lambda target: kd.cross_entropy(student, target, rows=built.index.int()),
        "with a layout": lambda target: kd.cross_entropy(student, target, rows=built),
        "statistics": lambda target: kd.statistics(student, target=target, rows=layout).target_log_prob,
    }.items():
        assert torch.equal(call(target), call(layout.target)), name
        assert call(target).abs().sum() > 1, name
    with pytest.raises(ValueError, match=r"^target: .*shifts them"):
        kd.cross_entropy(student, labels.int(), rows=layout)


def test_per_token_tables():
    mask = torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    layout = kd.Layout.from_mask(mask)
    assert layout.lengths == (3, 2, 1)
    assert layout.response.tolist() == [0, 0, 0, 1, 1, 2]
    assert layout.length.tolist() == [3, 3, 3, 2, 2, 1]
    assert layout.position.tolist() == [0, 1, 2, 0, 1, 0]


def test_tables_of_responses_of_similar_length():
    layout = layout_of([3, 2, 1, 4, 1, 9])
    tables = [(responses.tolist(), tokens.tolist()) for responses, tokens in layout.tables]
    assert tables == [
        ([0, 3], [[0, 1, 2, 20], [6, 7, 8, 9]]),
        ([1], [[3, 4]]),
        ([2, 4], [[5], [10]]),
        ([5], [list(range(11, 20))]),
    ]
    values = torch.arange(20.0, dtype=torch.float64)
    values[4] = torch.nan
    sums = layout.sums(values).tolist()
    assert math.isnan(sums.pop(1)) and sums == [3, 5, 30, 10, 135]
    assert kd.Layout.from_mask(torch.zeros(2, 3, dtype=torch.bool)).tables == []


@settings(deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=30))
def test_tables_have_every_token_once_and_few_places_more(lengths):
    layout = layout_of(lengths)
    numbers = torch.cat([responses for responses, _ in layout.tables])
    places = torch.cat([tokens.flatten() for _, tokens in layout.tables])
    assert sorted(numbers.tolist()) == list(range(len(lengths)))
    assert sorted(places[places < len(layout)].tolist()) == list(range(len(layout)))
    assert len(places) < 2 * len(layout)
    for responses, tokens in layout.tables:
        assert torch.equal(layout.response[tokens[:, 0]], responses)


def test_a_part_is_a_layout_of_its_own():
    layout = kd.Layout.from_mask(torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 1]]).bool())
    assert responses(layout.part(0, 1)) == [[0, 1]] and len(layout.part(1, 2).index) == 2
    part = layout.part(1, 3)
    assert responses(part) == [[3, 5], [8]] and part.shape == (3, 3)
    assert part.response.tolist() == [0, 0, 1]


def test_taking_responses_in_another_order():
    layout = kd.Layout.from_mask(torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 1]]).bool())
    taken = layout.take([2, 0])
    assert responses(taken) == [[11], [0, 1]] and taken.shape == (4, 3)
    assert responses(layout.take([])) == [] and len(layout.take([])) == 0
    written = layout.written_by(torch.tensor([True, False, False, True]))
    assert written == [True, False, True], "sequences 0, 2 and 3 have responses"


def test_to_another_device():
    layout = kd.Layout.from_mask(torch.ones(2, 3, dtype=torch.bool)).to("meta")
    assert layout.index.device.type == "meta" and layout.lengths == (3, 3)
    token = torch.arange(6)
    assert kd.Layout(layout.index, (3, 3), (2, 3), token).to(torch.device("meta")).token.device.type == "meta"


def positioned(position_ids) -> kd.Layout:
    return kd.Layout.from_labels(torch.ones(2, 3, dtype=torch.int64), position_ids=position_ids)


@pytest.mark.parametrize(
    ("build", "error", "told"),
    [
        (lambda: kd.Layout.from_mask(torch.ones(2, 3)), TypeError, ["mask", "bool", "float32", "from_labels(labels)"]),
        (lambda: kd.Layout.from_spans([0, 1], [2], 4), ValueError, ["lengths", "2", "got 1"]),
        (lambda: kd.Layout.from_spans([1, 3], [2, 2], 4), ValueError, ["[0, 4)", "3 ... 4", "sequence 1"]),
        (lambda: kd.Layout.from_spans([-1], [2], 4), ValueError, ["[0, 4)", "-1 ... 0"]),
        (lambda: kd.Layout.from_mask([[True]]), TypeError, ["mask", "bool", "list"]),
        (lambda: kd.Layout.from_mask(torch.ones(3, dtype=torch.bool)), ValueError, ["mask", "[B, L]", "[3]"]),
        (lambda: kd.Layout.from_labels(torch.ones(2, 3)), TypeError, ["labels", "int", "float32"]),
        (lambda: kd.Layout.from_labels([[1]]), TypeError, ["labels", "list"]),
        (lambda: kd.Layout.from_labels(torch.ones(3, dtype=torch.int64)), ValueError, ["labels", "[B, L]", "[3]"]),
        (lambda: kd.Layout.from_labels(torch.tensor([[3, 4, -1]])), ValueError, ["labels", "-100", "ignore_index=-1"]),
        (lambda: kd.Layout.targets(torch.ones(2, 3)), TypeError, ["labels", "int", "float32"]),
        (lambda: positioned([0, 1, 2]), TypeError, ["position_ids", "integer", "list"]),
        (lambda: positioned(torch.ones(2, 3)), TypeError, ["position_ids", "integer", "float32"]),
        (lambda: positioned(torch.zeros(3, 2, 3).long()), ValueError, ["position_ids", "[B, L]", "[3, 2, 3]"]),
        (lambda: positioned(torch.zeros(2, 4).long()), ValueError, ["position_ids", "[2, 3]", "[2, 4]"]),
        (lambda: positioned(torch.tensor([[0, 1, 2], [0, 1, 5]])), ValueError, ["position_ids", "1 and then 5"]),
        (
            lambda: kd.Layout(torch.arange(2), (2,), (1, 3), torch.ones(2)),
            TypeError, ["token", "int64 or int32", "float32"],
        ),
        (
            lambda: kd.Layout(torch.arange(2), (2,), (1, 3), torch.ones(3).int()),
            ValueError, ["token", "[N]", "[3]"],
        ),
        (
            lambda: kd.Layout.from_labels(torch.ones(2, 3, dtype=torch.uint8)),
            TypeError, ["labels", "signed", "uint8"],
        ),
        (lambda: kd.Layout.from_segments(torch.ones(2, 3)), TypeError, ["ids", "int", "float32"]),
        (lambda: kd.Layout.from_segments(None), TypeError, ["ids", "NoneType"]),
        (lambda: kd.Layout.from_segments(torch.ones(2, 3, 1).int()), ValueError, ["ids", "[B, L]", "[2, 3, 1]"]),
    ],
)  # fmt: skip
def test_bad_input(build, error, told):
    with pytest.raises(error) as raised:
        build()
    assert all(part in str(raised.value) for part in told), str(raised.value)


class Untouched(TorchDispatchMode):
    """Fails where an operator takes this very tensor, but to copy it."""

    def __init__(self, tensor: torch.Tensor):
        super().__init__()
        self.place = tensor.data_ptr()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        mine = [each for each in args if isinstance(each, torch.Tensor) and each.data_ptr() == self.place]
        assert not mine or function is torch.ops.aten.clone.default, f"{function} runs where the batch is"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", ["from_mask", "from_labels", "from_segments"])
def test_responses_are_found_on_the_cpu(make, monkeypatch):
    """A batch on a GPU is copied once, and nothing else runs there: it would be a dozen launches and three syncs."""
    batch = torch.tensor([[0, 1, 1, 0, 2], [0, 0, 3, 3, 3]])
    batch = batch > 0 if make == "from_mask" else batch
    expected = getattr(kd.Layout, make)(batch)
    copies = []
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(self) or self.clone())
    with Untouched(batch):
        layout = getattr(kd.Layout, make)(batch)
    assert sum(each is batch for each in copies) == 1
    assert torch.equal(layout.index, expected.index) and layout.lengths == expected.lengths and len(layout) > 4


class OnAGpu:
    """Stands for a tensor there. A copy to the CPU that nobody waits for has no numbers yet."""

    shape, device, dtype = (3,), torch.device("cuda"), torch.int64

    def to(self, device, non_blocking=False):
        return torch.full((3,), -7) if non_blocking else torch.arange(3)


def test_a_layout_from_a_gpu_is_waited_for():
    layout = kd.Layout.trusted(OnAGpu(), (3,), (1, 3), OnAGpu())
    moved = layout.to("cpu")
    assert moved.index.tolist() == moved.token.tolist() == [0, 1, 2]
    assert layout.to("meta").index.tolist() == [-7] * 3  # to a GPU it is not
    student = kd.Head(torch.randn(1, 3, 4), torch.randn(5, 4))
    assert torch.equal(kd.entropy(student, rows=layout), kd.entropy(student))
