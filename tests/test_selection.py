"""Selections over a batch of responses are the reference's over each of them, ties and zeros included."""

import torch
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
