"""The README's code runs as written, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import kdkernels as kd

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def jsd(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """As people write it: JSD(0.9), mean over tokens, then over responses."""
    q, p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    m = (0.9 * p.exp() + 0.1 * q.exp()).log()
    token = (0.9 * p.exp() * (p - m) + 0.1 * q.exp() * (q - m)).sum(-1)
    return ((token * mask).sum(1) / mask.sum(1)).mean()


def models(heads: int):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=8 * heads, intermediate_size=16, num_hidden_layers=1, num_attention_heads=heads
    )
    torch.manual_seed(heads)
    return transformers.LlamaForCausalLM(config)


def test_before_and_after_are_the_same_loss_and_gradient():
    before, after = blocks()[0].split("# after", 1)
    names = {"torch": torch, "jsd": jsd, "student_model": models(2), "teacher_model": models(4).requires_grad_(False)}
    names["ids"], names["mask"] = torch.randint(97, (2, 7)), torch.arange(7).expand(2, 7) > 2
    losses, gradients = [], []
    for code in (before, "# after" + after):
        exec(code, names)
        names["student_model"].zero_grad()
        names["loss"].backward()
        losses.append(names["loss"].double())
        gradients.append([p.grad.clone() for p in names["student_model"].parameters()])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for expected, got in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-7)


def test_the_other_code_runs():
    heads = [torch.nn.Linear(8, 151665 // 1000, bias=False), torch.nn.Linear(16, 151665 // 1000, bias=False)]
    names = {
        "kd": kd,
        "student_lm_head": heads[0],
        "teacher_lm_head": heads[1],
        "hidden_s": torch.randn(2, 7, 8, requires_grad=True),
        "hidden_t": torch.randn(2, 7, 16),
        "mask": torch.arange(7).expand(2, 7) > 2,
    }
    for code in blocks()[1:]:
        exec(code.replace("151665", "150"), names)
    assert names["hidden_s"].grad.abs().max() > 0 and heads[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\(([^)#]+)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
