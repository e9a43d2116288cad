"""What make gpu-check would run, on a machine that cannot run it."""

import importlib.util
import itertools
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import gpu_check
import pytest
import torch
from gpu_check import Step


def collected(*options: str) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no_extension"]
    tests = str(Path(__file__).parent)
    environment = os.environ | {"KDKERNELS_TEST_BACKENDS": "triton", "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, *gpu_check.TESTS, *options], cwd=gpu_check.ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


def test_its_tests_are_found_without_the_extension():
    some = collected("--share=1/2")
    assert len(some) > 350
    for name in gpu_check.FILES:
        assert any(name in line for line in some), name
    assert not any("[native" in line or "[eager" in line for line in some)


def test_the_shares_are_all_tests(request):
    hooks = request.config.pluginmanager.getplugin(str(Path(__file__).with_name("conftest.py")))
    every, shares = [SimpleNamespace(path=Path("/elsewhere"), number=i) for i in range(11)], []
    for share in ("0/3", "1/3", "2/3", ""):
        items = list(every)
        hooks.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda name, share=share: share), items)
        shares.append([item.number for item in items])
    assert sorted(itertools.chain(*shares[:3])) == shares[3] == list(range(11))
    assert [len(each) for each in shares[:3]] == [4, 4, 3] and shares[0] != [0, 3, 6, 9]


@pytest.mark.parametrize("name", gpu_check.FILES)
def test_its_tests_force_no_backend_that_may_not_be_there(name):
    """What may not be left out unseen: tests of other files take part in the interpreter only by choice."""
    assert "native" not in (Path(__file__).parent / name).read_text()


def test_it_fits_five_minutes():
    steps = gpu_check.steps()
    assert [step.name for step in steps] == ["tests", "compile", "memcheck", "racecheck"]
    assert sum(step.limit for step in steps) <= 290
    assert steps[2].environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert steps[3].commands[0][-1] == "shared"


def test_a_step_has_its_own_limit_and_the_others_run(tmp_path, capsys):
    """What a command started ends with it."""
    late = tmp_path / "late"
    child = f"import time; time.sleep(4); open({str(late)!r}, 'w')"
    slow = f"import subprocess, sys; print('began', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    steps = [
        Step("slow", 1.5, [[sys.executable, "-c", slow], [sys.executable, "-c", "pass"]]),
        Step("wrong", 30, [[sys.executable, "-c", "import sys; print('why'); sys.exit(3)"]]),
        Step("absent", 30, [["no-such-tool"]]),
        Step("good", 30, [[sys.executable, "-c", "import os; print(os.environ['THERE'])"]], {"THERE": "yes"}),
    ]
    began = time.monotonic()
    assert gpu_check.main(steps) == 1
    out = capsys.readouterr().out
    for line in ("began", "== slow: not done within its 1.5 seconds", "why\n== wrong: status 3", "yes\n== good: ok"):
        assert line in out
    assert "== absent: no-such-tool is not on this machine's PATH" in out
    time.sleep(max(0, began + 6 - time.monotonic()))
    assert not late.exists()
    assert gpu_check.main(steps[3:]) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    assert "no GPU here" in gpu_check.missing()


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "hypothesis" else object())
    assert "lacks hypothesis; another Python: make gpu-check PY=" in gpu_check.missing()
