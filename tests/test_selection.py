"""Selections over a batch of responses are the reference's over each of them, ties and zeros included."""

import pytest
import torch
from allocations import Allocations
from hypothesis import given, settings
from hypothesis import strategies as st

import kdkernels as kd
from kdkernels import reference
from kdkernels.objectives import selection

ENTROPIES = st.lists(st.sampled_from([0.0, 0.1, 0.5, 0.5, 2.0]), min_size=1, max_size=30)
SHARES = st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.9, 1.0])


def layout_of(responses: list[list[float]]) -> kd.Layout:
    mask = torch.zeros(len(responses), max(map(len, responses)), dtype=torch.bool)
    for row, response in zip(mask, responses, strict=True):
        row[: len(response)] = True
    return kd.Layout.from_mask(mask)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(responses=st.lists(ENTROPIES, min_size=1, max_size=5), share=SHARES)
def test_batches(responses, share):
    layout, entropy = layout_of(responses), torch.tensor([h for r in responses for h in r])
    opener = selection.opener(entropy, share, layout).split(list(layout.lengths))
    uncertain, count = (part.split(list(layout.lengths)) for part in selection.most_uncertain(entropy, share, layout))
    for i, response in enumerate(responses):
        h = torch.tensor(response)
        assert torch.equal(opener[i], reference.opener(h, share))
        assert torch.equal(uncertain[i], reference.most_uncertain(h, share))
        assert (count[i] == uncertain[i].sum()).all()


def test_a_bad_token_stays_in_its_response():
    responses = [[1.0, 2.0, 3.0, 1.0], [1.0, float("nan"), 2.0], [0.5, 0.5, 4.0]]
    layout, entropy = layout_of(responses), torch.tensor([h for r in responses for h in r])
    for select in (selection.opener, lambda *args: selection.most_uncertain(*args)[0]):
        got = select(entropy, 0.5, layout)
        clean = select(entropy.nan_to_num(1.0), 0.5, layout)
        elsewhere = layout.response != 1
        assert torch.equal(got[elsewhere], clean[elsewhere])


RAGGED = kd.Layout(torch.arange(28000), (4,) * 1000 + (20000,) + (4,) * 1000, (1, 28000))
SELECTIONS = {
    "opener": lambda entropy, layout: selection.opener(entropy, 0.3, layout),
    "an opener for each": lambda entropy, layout: selection.opener(
        entropy, torch.full((layout.responses,), 0.3, dtype=torch.float64, device=entropy.device), layout
    ),
    "uncertain": lambda entropy, layout: selection.most_uncertain(entropy, 0.3, layout)[0],
    "adaptive": lambda entropy, layout: kd.AdaptiveOpener().to(entropy.device)(entropy, entropy / 2, layout),
}


@pytest.mark.parametrize("select", SELECTIONS)
def test_memory_is_that_of_the_tokens(select):
    """2000 responses of 4 tokens and one of 20000: rows as wide as the longest would be 320 MB in fp64."""
    entropy = torch.rand(len(RAGGED))
    with Allocations() as seen:
        SELECTIONS[select](entropy, RAGGED)
    assert 8 * len(RAGGED) < seen.peak < 160 * len(RAGGED)


def test_a_very_long_response_beside_short_ones():
    """Each response's tokens are the reference's of it alone; small entropies behind large ones keep their digits."""
    entropy = torch.rand(len(RAGGED)) ** 8
    entropy[:4000] *= 1e9
    opener, uncertain = (
        SELECTIONS[name](entropy, RAGGED).split(list(RAGGED.lengths)) for name in ("opener", "uncertain")
    )
    for i, h in enumerate(entropy.split(list(RAGGED.lengths))):
        assert torch.equal(opener[i], reference.opener(h, 0.3))
        assert torch.equal(uncertain[i], reference.most_uncertain(h, 0.3))


@pytest.mark.parametrize("select", SELECTIONS)
def test_no_number_is_read_from_the_device(select):
    """Meta tensors have none to read."""
    layout = layout_of([[0.0] * n for n in (3, 9, 1)]).to("meta")
    SELECTIONS[select](torch.empty(13, device="meta"), layout)
