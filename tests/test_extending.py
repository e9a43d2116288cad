"""The worked examples of docs/EXTENDING.md run as written, and compute what they say."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd

TEXT = (Path(__file__).parent.parent / "docs/EXTENDING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def file_name(block: str) -> str | None:
    """A block whose first line is the comment ``# name.py`` is that file."""
    found = re.match(r"# (\w+\.py)\n", block)
    return found and found[1]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the blocks define, run one after the other with their files beside them."""
    folder, names = tmp_path_factory.mktemp("extending"), {}
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.chdir(folder)
        torch.manual_seed(0)
        for block in BLOCKS:
            name = file_name(block)
            if name:
                (folder / name).write_text(block, encoding="utf-8")
            else:
                exec(compile(block, "docs/EXTENDING.md", "exec"), names)
        yield names
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == folder:
            del sys.modules[name]


def kl(log_a: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def dense(head: kd.Head) -> torch.Tensor:
    return head.hidden.double() @ head.weight.double().T


def blended(z_s: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
    """BlendedKL of logits [B, L, V] whose every token counts."""
    q, p = z_s.log_softmax(-1), z_t.log_softmax(-1)
    h_s, h_t = -(q.exp() * q).sum(-1).detach(), -(p.exp() * p).sum(-1)
    share = torch.exp(-h_t)
    token = share * kl(p, q) + (1 - share) * kl(q, p)
    return (torch.sigmoid((h_s - h_t).mean(1)) * token.mean(1)).mean()


def compare(objective, student: kd.Head, teacher, z_t: torch.Tensor, mask: torch.Tensor) -> None:
    got = objective(student, teacher, mask)
    expected = blended(dense(student), z_t)
    torch.testing.assert_close(got.loss.double(), expected, rtol=1e-5, atol=0)
    for g, e in zip(*(torch.autograd.grad(x, student.tensors[:2]) for x in (got.loss, expected)), strict=True):
        assert g.norm() > 0
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-6)


def test_the_objective(names):
    code = next(block for block in BLOCKS if "class BlendedKL" in block).splitlines()
    assert len([line for line in code if line.strip()]) <= 40
    student, teacher = names["student"], names["teacher"]
    compare(names["BlendedKL"](), student, teacher, dense(teacher), names["mask"])


def test_the_divergence(names):
    q, p = dense(names["student"]).log_softmax(-1), dense(names["teacher"]).log_softmax(-1)
    m = ((p.exp() + q.exp()) / 2).log()
    torch.testing.assert_close(names["value"].double(), 0.9 * kl(p, m) + 0.1 * kl(q, m), rtol=1e-4, atol=1e-6)


def test_the_teacher(names):
    both = names["both"]
    z_t = (0.3 * both.first + 0.7 * both.second).double()
    compare(names["BlendedKL"](), names["student"], both, z_t, names["mask"])


def test_the_backend(names):
    """Statistics of both models twice: for the selection by whole responses and for the loss; the student's once."""
    assert names["BACKEND"].logits == (1 + 2) * 2 * 6 * 100
    assert "counted" not in names["registry"].BACKENDS
