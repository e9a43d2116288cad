"""What the examples should give: the same steps by full logits in fp64, one process, plain SGD.

A loss is a function of the logits of all responses, two lists of [l, V], and of their tokens, a list of [l].
"""

import copy

import torch

from kdkernels import reference

BETA = 0.5
LISTED = 5  # entries that a served teacher lists, of 15


def jsd(z_s: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
    """[l] the generalized JSD."""
    q, p = z_s.log_softmax(-1), z_t.log_softmax(-1)
    m = (BETA * p.exp() + (1 - BETA) * q.exp()).log()
    return (BETA * p.exp() * (p - m) + (1 - BETA) * q.exp() * (q - m)).sum(-1)


def mean_of_tokens(z_s, z_t, tokens):
    return torch.cat([jsd(*pair) for pair in zip(z_s, z_t, strict=True)]).mean()


def mean_of_responses(z_s, z_t, tokens):
    return torch.stack([jsd(*pair).mean() for pair in zip(z_s, z_t, strict=True)]).mean()


def tsd_kd(z_s, z_t, tokens):
    return reference.tsd_kd(z_s, z_t, k=4)


def mean_over_listed(z_s, z_t, tokens):
    """Of distributions over the entries that a server lists (the likeliest, the token itself) and one for the rest."""
    found = []
    for response in zip(z_s, z_t, tokens, strict=True):
        values = []
        for s, t, token in zip(*response, strict=True):
            listed = torch.cat([t.topk(LISTED).indices, token[None]]).unique()
            values.append(jsd(with_bucket(s, listed), with_bucket(t, listed)))
        found.append(torch.stack(values).mean())
    return torch.stack(found).mean()


def with_bucket(z, listed):
    """[k + 1] the log-probabilities of the listed entries, and of all others together."""
    log_p = z.log_softmax(-1)
    others = torch.ones_like(z, dtype=torch.bool).index_fill(0, listed, False)
    return torch.cat([log_p[listed], log_p[others].logsumexp(-1, keepdim=True)])


def logits(model, batch, entries):
    """[B, L - 1, V] of the positions that predict, in rows of their own."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    return model(**inputs).logits[:, :-1, :entries]


def train(student, teacher, entries, steps, lr, loss):
    """Losses and the change of each weight; a step is a list of batches, whichever process had them."""
    student, teacher = (copy.deepcopy(model).double() for model in (student, teacher))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    trained = [p for p in student.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(trained, lr=lr), []
    for batches in steps:
        z_s, z_t, tokens = [], [], []
        for batch in batches:
            labels = batch["labels"][:, 1:]
            scored = labels != -100
            tokens += [row[at] for row, at in zip(labels, scored, strict=True)]
            for z, model in ((z_s, student), (z_t, teacher)):
                z += [row[at] for row, at in zip(logits(model, batch, entries), scored, strict=True)]
        value = loss(z_s, z_t, tokens)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses, {name: p.detach() - before[name] for name, p in student.named_parameters() if p.requires_grad}


def check(losses, update, expected):
    """Losses within 1e-6, the update within 1e-4 of its norm, weight by weight."""
    expected_losses, expected_update = expected
    assert len(losses) == len(expected_losses) >= 2 and update.keys() == expected_update.keys()
    for got, right in zip(losses, expected_losses, strict=True):
        assert right > 0.01 and abs(got - right) < 1e-6, (losses, expected_losses)
    for name, right in expected_update.items():
        assert right.norm() > 0, name
        assert (update[name].double() - right).norm() < 1e-4 * right.norm(), name
