"""Packed texts: as many responses as were packed, each scored as in a sequence of its own."""

import pytest
import torch
from tiny_models import tiny

import kdkernels as kd
from kdkernels import reference

PACKED = [  # prompt 3 4, response 5 6 2; prompt 7, response 8 2; prompt 9 1 4, response 7 5 6 2
    [([3, 4], [5, 6, 2]), ([7], [8, 2]), ([9, 1, 4], [7, 5, 6, 2])],
    [([6], [2]), ([8, 8, 3], [9, 9, 9, 4, 2]), ([5], [2])],
]


def labelled(pieces):
    """Hugging Face labels of one row of (prompt, response) pairs."""
    return [token for prompt, response in pieces for token in (*[-100] * len(prompt), *response)]


def touching(pieces):
    """Labels of one row of the same texts in which every token is scored: nothing lies between two texts."""
    return [token for prompt, response in pieces for token in (*prompt, *response)]


def places(pieces):
    """position_ids of one row."""
    return [t for prompt, response in pieces for t in range(len(prompt) + len(response))]


def padded(rows, fill):
    rows = list(rows)
    length = max(map(len, rows)) + 1
    return torch.tensor([[*row, *[fill] * (length - len(row))] for row in rows])


def test_packed_labels_are_as_many_responses_as_were_packed():
    labels = padded([labelled(row) for row in PACKED], -100)
    layout = kd.Layout.from_labels(labels)
    assert layout.lengths == (3, 2, 4, 1, 5, 1) and layout.sequence.tolist() == [0, 0, 0, 1, 1, 1]
    assert layout.token.tolist() == [token for row in PACKED for _, response in row for token in response]
    assert layout.part(1, 3).token.tolist() == [8, 2, 7, 5, 6, 2]
    assert layout.take([5, 1]).token.tolist() == [2, 8, 2]


def test_position_ids_part_texts_that_touch():
    labels, ids = padded(map(touching, PACKED), -100), padded(map(places, PACKED), 0)
    layout = kd.Layout.from_labels(labels, position_ids=ids)
    texts = [[*prompt, *response] for row in PACKED for prompt, response in row]
    assert layout.lengths == tuple(len(text) - 1 for text in texts)
    assert layout.token.tolist() == [token for text in texts for token in text[1:]], "a first token is not predicted"
    targets = kd.Layout.targets(labels, position_ids=ids)
    assert torch.equal(targets.flatten()[layout.index], layout.token)
    assert (targets != -100).sum() == len(layout)
    assert kd.Layout.from_labels(labels).lengths == (14, 11), "labels alone do not show them"


@pytest.mark.parametrize("way", ["layout", "part", "take", "distillation"])
def test_texts_that_may_touch_are_refused_where_whole_responses_matter(way):
    """Every token has a label: one text a sequence or several, which labels alone do not show."""
    labels, ids = padded(map(touching, PACKED), -100), padded(map(places, PACKED), 0)
    student, teacher = (kd.Logits(torch.randn(*labels.shape, 10)) for _ in range(2))
    ways = {
        "layout": lambda layout: layout,
        "part": lambda layout: layout.part(0, 1),
        "take": lambda layout: layout.take([0]),
    }
    objective = kd.TSDKD(k=4, opener=0.3, entropy_ratio=0.4)
    refused = pytest.raises(ValueError, match=r"several texts that touch: kd\.Layout\.from_labels\(")
    if way == "distillation":
        model = tiny("qwen2")
        module, words = kd.Distillation(model, objective, model.config.vocab_size), padded(map(touching, PACKED), 0)
        scored = kd.Logits(torch.randn(*labels.shape, model.config.vocab_size))
        with refused:
            module(input_ids=words, labels=labels, teacher=scored)
        assert module(input_ids=words, labels=labels, teacher=scored, position_ids=ids).count == 6
        return
    made = ways[way](kd.Layout.from_labels(labels))
    assert not made.to("meta").parted
    with refused:
        objective(student, teacher, made)
    assert kd.GKD(0.5)(student, teacher, made).loss > 0
    assert objective(student, teacher, ways[way](kd.Layout.from_labels(labels, position_ids=ids))).loss != 0
    prompted = labels.clone()
    prompted[:, 0] = -100  # the first token of a prompt, or what packing collators put before each text
    assert kd.Layout.from_labels(prompted).parted


def test_what_the_flattening_collator_of_transformers_makes():
    transformers = pytest.importorskip("transformers")
    texts = [[*prompt, *response] for prompt, response in PACKED[0]]
    batch = transformers.DataCollatorWithFlattening()([{"input_ids": text} for text in texts])
    labels = batch["labels"].masked_fill(batch["labels"] == -100, 11)  # as a collator that ignores none makes them
    for one in (batch["labels"], labels):
        layout = kd.Layout.from_labels(one, position_ids=batch["position_ids"])
        assert layout.lengths == (4, 2, 6)
        assert layout.token.tolist() == [token for text in texts for token in text[1:]]


@pytest.mark.parametrize("ids", ["as collated", "left padding", "int32", "one row for all", "of RoBERTa", "truncated"])
def test_position_ids_of_whole_sequences_change_nothing(ids):
    labels = torch.tensor([[-100, -100, 5, 6, 7, 8], [-100, -100, 5, -100, -100, 9]])
    given = {
        "as collated": torch.arange(6).expand(2, 6),
        "left padding": torch.tensor([[1, 0, 1, 2, 3, 4], [0, 0, 1, 2, 3, 4]]),
        "int32": torch.arange(6, dtype=torch.int32).expand(2, 6),
        "one row for all": torch.arange(6)[None],
        "of RoBERTa": torch.arange(2, 8).expand(2, 6),
        "truncated": torch.tensor([[0, 1, 2, 3, 4, 5], [0, 9, 10, 2, 3, 4]]),  # a jump where nothing is scored
    }[ids]
    layout, plain = kd.Layout.from_labels(labels, position_ids=given), kd.Layout.from_labels(labels)
    assert torch.equal(layout.index, plain.index) and layout.lengths == plain.lengths == (4, 1, 1)
    assert torch.equal(layout.token, plain.token)


@pytest.mark.parametrize("scored", [labelled, touching], ids=["responses", "every token"])
@pytest.mark.parametrize(
    "objective",
    [kd.TSDKD(k=4, opener=0.3, entropy_ratio=0.4), kd.GKD(0.5), kd.SFT(), kd.DistiLLM2()],
    ids=lambda one: type(one).__name__,
)
def test_a_packed_sequence_is_scored_as_its_texts_in_sequences_of_their_own(objective, scored):
    """The hidden states of every text are the same in both batches; loss, count, metrics and gradients must be too."""
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    teacher_weight = torch.randn(12, 6, generator=generator, dtype=torch.float64)
    states = {
        (b, i): torch.randn(2, len(p) + len(r), 6, generator=generator, dtype=torch.float64)
        for b, row in enumerate(PACKED)
        for i, (p, r) in enumerate(row)
    }

    def run(rows, parted=True):  # rows of (b, i)
        texts = [[PACKED[b][i] for b, i in row] for row in rows]
        labels, ids = padded(map(scored, texts), -100), padded(map(places, texts), 0)
        hidden = torch.zeros(2, *labels.shape, 6, dtype=torch.float64)
        for n, row in enumerate(rows):
            packed = torch.cat([states[key] for key in row], 1)
            hidden[:, n, : packed.shape[1]] = packed
        parameter = weight.clone().requires_grad_()
        teacher = kd.Head(hidden[1], teacher_weight) if objective.needs_teacher else None
        by_teacher = {"from_teacher": torch.arange(len(rows)) * 0 == 0} if objective.by_author else {}
        one_text = torch.arange(labels.shape[1])[None]
        layout = kd.Layout.from_labels(labels, position_ids=ids if parted else one_text)
        out = objective(kd.Head(hidden[0], parameter), teacher, layout, **by_teacher)
        out.loss.backward()
        return out, parameter.grad

    together = [[(b, i) for i in range(3)] for b in range(2)]
    packed, packed_gradient = run(together)
    apart, gradient = run([[(b, i)] for b in range(2) for i in range(3)])
    assert packed.count == apart.count and gradient.norm() > 0.05
    torch.testing.assert_close(packed.loss, apart.loss)
    torch.testing.assert_close(packed_gradient, gradient)
    torch.testing.assert_close(packed.metrics, apart.metrics)
    if scored is touching:
        assert (run(together, parted=False)[1] - gradient).norm() > 0.02 * gradient.norm(), "else nothing is tested"


def test_tsd_kd_of_packed_texts_is_the_reference():
    """Openers and most uncertain tokens of each text, value and gradient in fp64."""
    generator = torch.Generator().manual_seed(3)
    labels, ids = padded(map(touching, PACKED), -100), padded(map(places, PACKED), 0)
    z_s, z_t = 2 * torch.randn(2, *labels.shape, 12, generator=generator, dtype=torch.float64)
    z_s.requires_grad_()
    layout = kd.Layout.from_labels(labels, position_ids=ids)
    objective = kd.TSDKD(k=4, opener=0.3, entropy_ratio=0.4)
    out = objective(kd.Logits(z_s), kd.Logits(z_t), layout)
    texts, where = [], 0
    for b, row in enumerate(PACKED):
        where = b * labels.shape[1]
        for prompt, response in row:
            texts.append(slice(where, where + len(prompt) + len(response) - 1))  # the last token predicts nothing
            where += len(prompt) + len(response)
    parts = ([z.flatten(0, 1)[text] for text in texts] for z in (z_s, z_t))
    expected = reference.tsd_kd(*parts, k=4, opener_share=0.3, entropy_ratio=0.4)
    torch.testing.assert_close(out.loss, expected)
    got, exact = (torch.autograd.grad(each, z_s)[0] for each in (out.loss, expected))
    torch.testing.assert_close(got, exact)
    assert exact.norm() > 0.05 and out.count == 6
    one_text = torch.arange(labels.shape[1])[None]
    joined = objective(kd.Logits(z_s), kd.Logits(z_t), kd.Layout.from_labels(labels, position_ids=one_text))
    assert abs(joined.loss - expected) > 0.02 * expected, "else nothing is tested"


PACKED_MASK = torch.tensor([[0, 1, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0]]).bool()


def test_selecting_within_responses_needs_to_know_them():
    """A mask of packed texts has gaps, as has one of a response with tokens that are not scored: nobody guesses."""
    student = kd.Logits(torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(0)))
    objective = kd.TSDKD(k=3, opener=0.5, reduction="tokens")
    with pytest.raises(ValueError, match=r"^mask: .*gap behind \[1, 1\].*position_ids=.*from_segments\(mask\.long"):
        objective(student, student, PACKED_MASK)
    one = objective(student, student, kd.Layout.from_segments(PACKED_MASK.long()))
    two = objective(student, student, kd.Layout.from_segments(PACKED_MASK * torch.tensor([1, 1, 1, 2, 2, 2])))
    assert abs(one.loss - two.loss) > 0.02 * abs(one.loss), "else it would not matter"
    assert kd.GKD()(student, student, PACKED_MASK).count == 2, "one a sequence, whatever lies between"


def test_the_targets_of_a_layout():
    labels = padded(map(labelled, PACKED), -100)
    layout = kd.Layout.from_labels(labels)
    assert torch.equal(layout.target, kd.Layout.targets(labels)) and layout.target.dtype == torch.int64
    assert torch.equal(layout.at(layout.target), layout.token)
    some = layout.take([4, 1])
    assert some.target[some.target != -100].tolist() == [8, 2, 9, 9, 9, 4, 2], "of its own responses"
    student = kd.Logits(torch.randn(*labels.shape, 11, generator=torch.Generator().manual_seed(0)))
    values = kd.cross_entropy(student, layout.target, rows=layout)
    torch.testing.assert_close(values.sum() / len(layout), kd.SFT()(student, None, layout).loss)
    torch.testing.assert_close(kd.cross_entropy(student, layout.target), values)
    with pytest.raises(ValueError, match=r"^target: .*made from a mask.*kd\.Layout\.from_labels\(labels\)"):
        _ = kd.Layout.from_mask(labels > 0).target
