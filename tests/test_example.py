"""The worked example of docs and papers through the public API: logits are hidden states over an identity weight."""

import pytest
import torch
import truth

import kdkernels as kd

Z_S, Z_T = [2.0, 1.0, 0.0, -1.0], [0.0, 3.0, 1.0, -1.0]
H_S, H_T, GATE, PL3 = 0.947537, 0.595087, 0.587212, 3.534534
PL3_GRADIENT = [1.546038, -0.755272, -0.790767, 0.0]


def head(z) -> kd.Head:
    hidden = torch.as_tensor(z, dtype=torch.float32).clone().requires_grad_()
    return kd.Head(hidden, torch.eye(hidden.shape[-1]))


def close(got, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.detach().double(), expected.detach(), rtol=0, atol=1e-5)


def test_statistics(backend):
    got = kd.statistics(head([Z_S]), head([Z_T]), topk=3, target=torch.tensor([1]))
    close(got.entropy, [H_S])
    close(got.teacher.entropy, [H_T])
    assert got.argmax.tolist() == [0] and got.teacher.argmax.tolist() == [1]
    assert got.topk_indices.tolist() == [[0, 1, 2]]
    log_q = torch.tensor([Z_S], dtype=torch.float64).log_softmax(-1)
    close(got.topk_log_probs, log_q[:, :3])
    close(got.target_log_prob, log_q[:, 1])
    close(got.lse, torch.tensor([Z_S], dtype=torch.float64).logsumexp(-1))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("forward", 0.946628),
        ("reverse", 1.471911),
        ("jsd.1", 0.084775),
        ("jsd.5", 0.249246),
        ("jsd.9", 0.113819),
        ("skl", 0.762350),
        ("srkl", 0.909405),
        ("jsd0", 0.946628),
        ("jsd1", 1.471911),
    ],
)
def test_divergences(backend, name, expected):
    student = head([Z_S])
    value = kd.divergence(student, head([Z_T]), truth.DIVERGENCES[name][0])
    close(value, [expected])
    value.sum().backward()
    z = torch.tensor([Z_S], dtype=torch.float64, requires_grad=True)
    truth.divergence(z, torch.tensor([Z_T], dtype=torch.float64), name).sum().backward()
    close(student.hidden.grad, z.grad)
    assert student.hidden.grad.norm() > 0.01


def test_gradient_of_the_forward_kl_is_q_minus_p(backend):
    student = head([Z_S])
    kd.divergence(student, head([Z_T]), kd.ForwardKL()).sum().backward()
    close(student.hidden.grad, torch.tensor([Z_S]).softmax(-1) - torch.tensor([Z_T]).softmax(-1))


@pytest.mark.parametrize(("k", "expected"), [(3, PL3), (2, 1.313262)])
def test_plackett_luce(backend, k, expected):
    student = head([Z_S])
    value = kd.plackett_luce(student, head([Z_T]), k=k)
    close(value, [expected])
    value.sum().backward()
    if k == 3:
        close(student.hidden.grad, [PL3_GRADIENT])
    else:  # one comparison: -log sigmoid(z_1 - z_0)
        close(student.hidden.grad, [[0.731059, -0.731059, 0, 0]])


def test_tsd_kd(backend):
    """One token: it is the opener and the most uncertain token."""
    student = head([[Z_S]])
    out = kd.TSDKD(k=3)(student, head([[Z_T]]), torch.tensor([[True]]))
    close(out.loss, 0.1 * PL3 + GATE * 0.113819 + H_S)
    close(out.metrics["indirect"], 0.1 * PL3)
    close(out.metrics["direct"], GATE * 0.113819)
    close(out.metrics["entropy_minimisation"], H_S)
    close(out.metrics["gate"], GATE)
    out.loss.backward()
    z = torch.tensor([Z_S], dtype=torch.float64, requires_grad=True)
    (GATE * truth.divergence(z, torch.tensor([Z_T], dtype=torch.float64), "jsd.9") + truth.entropy(z)).sum().backward()
    close(student.hidden.grad[0], z.grad + 0.1 * torch.tensor([PL3_GRADIENT]))


def test_gkd_and_sft(backend):
    target = torch.tensor([[1]])
    close(kd.GKD(beta=0.5)(head([[Z_S]]), head([[Z_T]]), target > 0).loss, 0.249246)
    student = head([[Z_S]])
    loss = kd.SFT()(student, None, target > 0, target=target).loss
    q = torch.tensor(Z_S, dtype=torch.float64).softmax(-1)
    close(loss, -q[1].log())
    loss.backward()
    close(student.hidden.grad[0, 0], q - torch.eye(4)[1])


def logits_of_entropy(h: float, vocabulary: int = 20) -> list[float]:
    """(s, 0, 0, ...) with the s >= 0 that gives the entropy."""
    low, high = 0.0, 50.0
    for _ in range(60):
        s = (low + high) / 2
        z = torch.zeros(vocabulary, dtype=torch.float64)
        z[0] = s
        low, high = (s, high) if truth.entropy(z) > h else (low, s)
    return z.tolist()


@pytest.mark.parametrize(("share", "m"), [(0.6, 2), (0.1, 1)])
def test_openers(backend, share, m):
    z = [[logits_of_entropy(h) for h in (2, 0.5, 0.1, 1, 0.2, 0.2)]]
    student = head(z)
    out = kd.TSDKD(opener=share, k=2, direct_weight=0.0, entropy_weight=0.0)(
        student, head(z), torch.ones(1, 6, dtype=torch.bool)
    )
    close(out.metrics["opener_share"], m / 6)
    out.loss.backward()
    assert (student.hidden.grad[0].abs().sum(-1) > 0).tolist() == [True] * m + [False] * (6 - m)
