"""The Triton backend under the checks of the other backends (test_rows.py) and its own (triton_rows.py).

Where there is no GPU the kernels run in Triton's interpreter, which has to be chosen before they are imported, so they
get a process of their own. It takes milliseconds for a block, hence a choice of test_rows.py. On a GPU all of it:

    KDKERNELS_TEST_BACKENDS=triton python -m pytest tests/test_rows.py tests/triton_rows.py tests/test_example.py
"""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

import kdkernels as kd
from kdkernels.rows import backend_for, dispatch

# One line per choice; bf16 outputs are left out because the interpreter truncates what a GPU rounds.
CHOICE = """
    statistics and fp32 and 0.7 and (None or 30.0) and not 0.25
    top_k_is_exact and fp32 and (97 or ties-3001)
    divergence_and_gradient and fp32 and 0.7 and (forward or jsd.9 or skl)
    scale_and_softcap and 30.0 and (reverse or srkl)
    sizes and fp32
    bad_row and word1024
    identical and 0.7
    symmetric and 0.1
    room_between and fp32
    real_vocabulary
    one_word
    only_one_side
    infinite_says
    transformed_logits
    large_logits
"""


def test_the_kernels_compute_what_the_reference_says():
    environment = os.environ | {"KDKERNELS_TEST_BACKENDS": "triton"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5"]
    command += [f"tests/{name}.py" for name in ("test_rows", "triton_rows", "test_example")]
    if not torch.cuda.is_available():
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        lines = [f"({line})" for line in CHOICE.strip().splitlines()]
        command += ["-k", " or ".join([*lines, "triton_rows.py", "test_example.py"])]
    run = subprocess.run(command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True)
    print(run.stdout[-3000:])
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", run.stdout)[1])
    assert passed > 100 and "skipped" not in run.stdout


def test_a_gpu_without_triton_is_told_why_it_is_slow(monkeypatch, caplog):
    monkeypatch.delenv("KDKERNELS_BACKEND", raising=False)
    monkeypatch.setitem(sys.modules, "kdkernels.rows.triton", None)
    monkeypatch.setattr(dispatch, "_warned", set())
    with caplog.at_level(logging.WARNING, logger="kdkernels"):
        chosen = [backend_for(torch.device("cuda"), torch.float32) for _ in range(2)]
    assert all(each.__name__.endswith("eager") for each in chosen)
    assert len(caplog.records) == 1
    assert "eager backend on cuda: triton: it does not load" in caplog.text


def test_info_knows_it():
    reason = kd.info()["backends"]["triton"]
    assert reason == "ok" if torch.cuda.is_available() else reason == "it runs on cuda, not on cpu"
