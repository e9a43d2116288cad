"""How tokens are cut into chunks that fit a budget."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdkernels import plan

LENGTHS = st.lists(st.integers(1, 40), max_size=12).map(tuple)


@settings(deadline=None, derandomize=True)
@given(lengths=LENGTHS, rows=st.integers(1, 60))
def test_chunks(lengths, rows):
    """Every token once and in order; whole responses where they fit; a longer one alone, in even pieces."""
    out = plan.chunks(lengths, rows)
    pieces = [piece for chunk in out for piece in chunk.pieces]
    assert [t for piece in pieces for t in range(piece.start, piece.stop)] == list(range(sum(lengths)))
    assert all(0 < piece.stop - piece.start <= rows for piece in pieces)
    assert [chunk.first for chunk in out] == [0, *(chunk.last for chunk in out)][: len(out)]
    for chunk in out:
        mine = lengths[chunk.first : chunk.last]
        assert chunk.pieces[0].start == sum(lengths[: chunk.first])
        assert sum(piece.stop - piece.start for piece in chunk.pieces) == sum(mine)
        if len(chunk.pieces) > 1:
            assert len(mine) == 1 and mine[0] > rows
            sizes = [piece.stop - piece.start for piece in chunk.pieces]
            assert max(sizes) - min(sizes) <= 1 and len(sizes) == -(-mine[0] // rows)
    for chunk, following in zip(out, out[1:], strict=False):  # nothing that would have fitted was left out
        assert sum(lengths[chunk.first : chunk.last]) + lengths[following.first] > rows


@pytest.mark.parametrize(
    ("border", "expected"),
    [
        (0, [(2, 5), (5, 9)]),
        (9, [(2, 5), (5, 9)]),
        (2, [(2, 5), (5, 9)]),
        (4, [(2, 4), (4, 6), (6, 9)]),
        (8, [(2, 5), (5, 8), (8, 9)]),
    ],
)
def test_no_slice_crosses_a_border(border, expected):
    assert [(each.start, each.stop) for each in plan.split(2, 9, 4, border)] == expected


@settings(deadline=None, derandomize=True)
@given(
    free=st.integers(1, 10**6),
    fixed=st.integers(0, 1000),
    student=st.integers(1, 5000),
    teacher=st.integers(0, 5000),
    tokens=st.integers(1, 2000),
)
def test_rows_fit_the_budget(free, fixed, student, teacher, tokens):
    budget = fixed + free
    if free < student + teacher:
        with pytest.raises(ValueError, match=rf"memory_budget.*{fixed + student + teacher} bytes.*{budget}"):
            plan.chunk_rows(budget, fixed, student, teacher, tokens)
        return
    rows, teacher_rows = plan.chunk_rows(budget, fixed, student, teacher, tokens)
    assert 1 <= rows <= tokens and 1 <= teacher_rows <= rows
    assert fixed + rows * student + teacher_rows * teacher <= budget
    if free >= tokens * (student + teacher):
        assert (rows, teacher_rows) == (tokens, tokens)


def test_the_default_budget_at_a_real_size():
    """151936 words in bf16: 1000 student rows or more a chunk; below, reading the weights dominates."""
    row = 2 * 151936
    rows, teacher_rows = plan.chunk_rows(plan.DEFAULT_BUDGET, 0, row, row, 16384)
    assert 1000 <= rows <= 1200 and 128 <= teacher_rows <= 256
    assert plan.chunk_rows(plan.DEFAULT_BUDGET, 0, row, row, 512) == (512, 512)
