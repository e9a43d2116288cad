"""Fixtures of the engine's tests (the files beside this one): backends, poisoned memory, warnings as errors."""

import os
from pathlib import Path

# Threads that spin while they wait make small tensors ten times slower where the cores are shared. torch reads it once.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or no product of a GPU is deterministic

os.environ.pop("PYTEST_XDIST_WORKER", None)  # a pytest that a test starts is no worker, whatever this one is

import random

import pytest
import torch
from backends import BACKENDS, PRECISIONS

from kdkernels.compute import memory

HERE = Path(__file__).parent
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ON_GPU = torch.cuda.is_available()  # some of PyTorch's operators are not deterministic there: they warn
# Triton's interpreter computes with NumPy, which remarks on infinities and NaN, and on how Triton 3.6 takes integers.
STRICT = pytest.mark.filterwarnings(
    "error",
    *(f"ignore::{kind}:triton.runtime.interpreter" for kind in ("RuntimeWarning", "DeprecationWarning")),
    *(["ignore:.*deterministic.*:UserWarning"] if ON_GPU else []),
)


@pytest.fixture(autouse=True)
def no_launcher():
    """Takes away what engines and trainers of other tests, and of fixtures that many tests share, leave in the
    environment: they would take this process for one that a launcher started (DeepSpeed wants a LOCAL_RANK, with which
    accelerate makes a rank of the process, and says so by a RANK).
    """
    forget_launcher()
    yield
    forget_launcher()


def forget_launcher() -> None:
    for name in LAUNCHER:
        os.environ.pop(name, None)


def of_the_engine(path: Path) -> bool:
    return path.parent == HERE


def pytest_addoption(parser):
    parser.addoption("--share", metavar="I/N", help="one of N disjoint random choices of the tests, in random order")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if of_the_engine(item.path):
            item.add_marker(STRICT, append=False)  # a test's own filters win
    if config.getoption("--share"):
        share, shares = map(int, config.getoption("--share").split("/"))
        random.Random(0).shuffle(items)
        items[:] = items[share::shares]


@pytest.fixture(autouse=True)
def poisoned_memory(request, monkeypatch):
    """Fresh tensors hold NaN (integers: the largest), so that reading what nobody wrote shows."""
    if not of_the_engine(request.path):
        yield
        return
    monkeypatch.setattr(memory, "_SMALLEST", 1 << 60)  # a block would hold old logits, not NaN
    # what torch.utils.deterministic.fill_uninitialized_memory needs
    torch.use_deterministic_algorithms(True, warn_only=ON_GPU)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Forces one backend after the other: one that cannot run raises, it is never skipped."""
    monkeypatch.setenv("KDKERNELS_BACKEND", request.param)
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        yield request.param


@pytest.fixture(params=PRECISIONS, ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def dtype(request, monkeypatch) -> torch.dtype:
    """The operands' dtype, on each backend that computes with it."""
    monkeypatch.setenv("KDKERNELS_BACKEND", request.param[0])
    return request.param[1]
