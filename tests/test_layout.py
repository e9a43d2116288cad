"""Which positions are scored, and which of them form a response."""

import math

import pytest
import torch
from batches import positions
from hypothesis import given, settings
from hypothesis import strategies as st

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
    assert written == [True, False, True], "rows 0, 2 and 3 have responses"


def test_to_another_device():
    layout = kd.Layout.from_mask(torch.ones(2, 3, dtype=torch.bool)).to("meta")
    assert layout.index.device.type == "meta" and layout.lengths == (3, 3)


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: kd.Layout.from_mask(torch.ones(2, 3)), TypeError, ["mask", "bool", "float32"]),
        (lambda: kd.Layout.from_mask([[True]]), TypeError, ["mask", "bool", "list"]),
        (lambda: kd.Layout.from_mask(torch.ones(3, dtype=torch.bool)), ValueError, ["mask", "[B, L]", "[3]"]),
        (lambda: kd.Layout.from_labels(torch.ones(2, 3)), TypeError, ["labels", "int", "float32"]),
        (lambda: kd.Layout.from_labels([[1]]), TypeError, ["labels", "list"]),
        (lambda: kd.Layout.from_labels(torch.ones(3, dtype=torch.int64)), ValueError, ["labels", "[B, L]", "[3]"]),
        (lambda: kd.Layout.from_segments(torch.ones(2, 3)), TypeError, ["ids", "int", "float32"]),
        (lambda: kd.Layout.from_segments(None), TypeError, ["ids", "NoneType"]),
        (lambda: kd.Layout.from_segments(torch.ones(2, 3, 1).int()), ValueError, ["ids", "[B, L]", "[2, 3, 1]"]),
    ],
)  # fmt: skip
def test_bad_input(build, error, words):
    with pytest.raises(error) as raised:
        build()
    assert all(word in str(raised.value) for word in words), str(raised.value)
