"""A renormalised list leaves the student's mass on the words that it does not list; one with a bucket takes it off."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kdkernels as kd

MODEL = os.environ.get("KDKERNELS_SMOLLM2", "")


def trained(student, teacher, weight, steps=60):
    """Hidden states after so many steps of a linear map over them, by the reverse KL."""
    adapter = torch.zeros(student.shape[1], student.shape[1], requires_grad=True)
    optimizer = torch.optim.Adam([adapter], lr=3e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        kd.divergence(kd.Head(student + student @ adapter, weight), teacher, kd.ReverseKL()).mean().backward()
        optimizer.step()
    return (student + student @ adapter).detach()


def test_renormalised_lists_inflate_entropy_and_tail():
    generator = torch.Generator().manual_seed(0)
    weight, hidden, noise = (torch.randn(shape, generator=generator) for shape in ((300, 12), (64, 12), (64, 12)))
    known = kd.statistics(teacher := kd.Head(hidden, weight), topk=8)
    found = {}
    for renormalize in (False, True):
        lists = kd.TopK(known.topk_indices, known.topk_log_probs, renormalize=renormalize)
        states = trained(0.5 * hidden + 0.3 * noise, lists, weight)
        log_q = (states @ weight.T).log_softmax(-1)
        outside = 1 - log_q.gather(1, known.topk_indices.long()).exp().sum(1)
        entropy = -(log_q.exp() * log_q).sum(1)
        far = kd.divergence(kd.Head(states, weight), teacher, kd.ReverseKL())
        found[renormalize] = [one.mean().item() for one in (outside, entropy, far)]
    for bucket, without in zip(found[False], found[True], strict=True):
        assert 0 < 1.3 * bucket < without


@pytest.mark.slow
@pytest.mark.skipif(not MODEL, reason="KDKERNELS_SMOLLM2 names no directory with SmolLM2-135M-Instruct")
def test_words_of_a_real_model():
    """The likeliest are a bound that rises with K; the loss of 128 drawn ones is the whole one within 1e-3."""
    program = Path(__file__).parent.parent / "benchmarks" / "stored_teachers.py"
    command = [sys.executable, str(program), "--tokens", "24", "--steps", "5"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = {}
    for line in printed.splitlines():
        if line.startswith("| "):
            cells = line.strip("| ").split(" | ")
            rows.setdefault(cells[0], cells)  # of the student that has not been trained
    few, many = (float(rows[k][3]) for k in ("16", "128"))
    assert float(rows["49152"][3]) > 0.1 and few < many < -1e-3, "JSD(0.5)"
    for i, divergence in enumerate(("JSD(0.1)", "JSD(0.5)", "JSD(0.9)"), 2):
        off, error = map(float, rows["128 drawn"][i].split(" ± "))
        assert 0 < error < 4e-4 and abs(off) < 1e-3, divergence
