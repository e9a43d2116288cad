"""The examples' folder, for imports from it; one thread, no network."""

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
sys.path.append(str(EXAMPLES))
import_module("stand_ins").DEVICE = torch.device("cpu")  # what is compared with full logits in fp64


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small lose more to threads waiting for a busy core than they win."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
