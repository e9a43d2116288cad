"""The native row kernels use the threads that torch allows, and as many or few give the same bits."""

import subprocess
import sys

import pytest
import torch
from test_rows import Weights, distribution, engine_gradient

COUNT = """
import os, torch
import kdkernels as kd
torch.set_num_threads({threads})
before = len(os.listdir("/proc/self/task"))
kd.entropy(kd.Logits(torch.randn(64, 1000)))
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("threads", [1, 3])
def test_threads_are_those_torch_allows(threads):
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(threads=threads)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == threads - 1, done.stderr


def test_the_number_of_threads_does_not_matter(monkeypatch):
    monkeypatch.setenv("KDKERNELS_BACKEND", "native")
    x_s, x_t = distribution("normal", 37, 2049)
    weights, before, found = Weights.random(37, 2049), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            found.append(engine_gradient(weights, x_s, x_t, "jsd.9", 0.7))
    finally:
        torch.set_num_threads(before)
    for value, gradient in found[1:]:
        assert torch.equal(value, found[0][0]) and torch.equal(gradient, found[0][1])
    assert found[0][1].norm() > 0
