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
                exec(compile(block, "docs/EXTENDING.md", "exec", dont_inherit=True), names)
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


def test_the_teacher_of_a_trainer(names):
    """Its source is the two models' logits."""

    class Model:
        def __init__(self, seed: int):
            self.logits = torch.randn(2, 6, 100, generator=torch.Generator().manual_seed(seed))

        def __call__(self, input_ids, attention_mask):
            assert input_ids.shape == attention_mask.shape == (2, 6)
            return self

    first, second = Model(1), Model(2)
    source = names["EnsembleTeacher"](first, second, 0.3).score(names["batch"])
    assert torch.equal(source.first, first.logits) and torch.equal(source.second, second.logits)


def test_the_judge(names):
    batch, student, teacher = names["batch"], names["student"], names["teacher"]
    weights = names["early_tokens"](batch)
    assert weights[0].tolist() == pytest.approx([0, 1, 3 / 4, 1 / 2, 1 / 4, 0])
    assert weights[1].tolist() == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0])
    q, p = dense(student).log_softmax(-1), dense(teacher).log_softmax(-1)
    m = (0.9 * p.exp() + 0.1 * q.exp()).log()
    expected = (weights * kl(q, m)).flatten()[batch.layout.index].sum() / 2  # both responses are the student's
    torch.testing.assert_close(names["judged"].loss.double(), expected, rtol=1e-5, atol=0)
    by_teacher = names["collate"]([[5, 6]], [[8, 9, 0]], pad_id=0, from_teacher=True)
    assert names["early_tokens"](by_teacher)[0, 1:4].tolist() == [1, 1, 1]


def test_the_sampler(names):
    from kdkernels.rollouts import Sampler

    public = {name for name in vars(Sampler) if not name.startswith("_")}
    assert public <= set(dir(names["sampler"]))
    responses = names["responses"]
    assert all(len(each) == 8 and each[-1] == 0 for each in responses)
    torch.manual_seed(0)
    drawn = [names["Dice"]().generate([[5]], 8) for _ in range(4)]
    torch.manual_seed(0)
    assert names["sampler"].generate([[5]], 8)[0] == max((each[0] for each in drawn), key=sum)
    assert names["own"].layout.lengths == (8, 8)


def test_the_recipe_key(names):
    from kdkernels.errors import InputError

    assert names["train"].noise == 0.1 and names["train"].steps == 10
    with pytest.raises(InputError, match=r"\[train\] noise: expected a finite number >= 0, got -1"):
        names["parse_table"](names["table"] | {"noise": -1}, names["keys"], "recipe.toml: [train]")


def test_the_backend(names):
    """Statistics of both models twice: for the selection by whole responses and for the loss; the student's once."""
    assert names["BACKEND"].logits == (1 + 2) * 2 * 6 * 100
    assert "counted" not in names["registry"].BACKENDS
