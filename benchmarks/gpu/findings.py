"""What the steps of a GPU day share: where they run, until when, clocks, and what they found, a line of JSON each.

day.py says in the environment which step this is, where its findings go and how many seconds it has. The report
(summary.py) is written anew after every finding, so that a run that is ended has one of all it found.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import summary
import torch
from measure import timed

STEP = os.environ.get("GPU_DAY_STEP", "")
FOLDER = Path(os.environ.get("GPU_DAY_FOLDER", "."))
DRY = os.environ.get("GPU_DAY_DRY") == "1"  # tiny shapes on a CPU: every line, no figures
DEVICE = "cpu" if DRY else "cuda"
VOCABULARY, STUDENT, TEACHER = (1003, 48, 64) if DRY else (151936, 1536, 5120)
BEGUN = 0.85  # share of a step's seconds after which it begins nothing new
_DEADLINE = time.monotonic() + BEGUN * float(os.environ.get("GPU_DAY_SECONDS", "600"))


def left() -> float:
    """Seconds in which something new may begin."""
    return _DEADLINE - time.monotonic()


def record(kind: str, *, folder: Path = FOLDER, step: str = STEP, **fields) -> None:
    line = json.dumps({"step": step, "kind": kind, **fields}, default=str)
    with (folder / summary.FINDINGS).open("ab", buffering=0) as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # some steps are several processes
        file.write(line.encode() + b"\n")
        summary.write(folder)
    if kind not in ("plan", "begun", "ended"):
        print(f"[{kind}]", ", ".join(f"{name}: {value}" for name, value in fields.items()), flush=True)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def attempt(what: str) -> Iterator[None]:
    """What fails in it is a finding, and the step goes on; unless the GPU's context is gone, which nothing survives."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        reason = (str(error).splitlines() or [""])[0][:300]
        record("error", what=what, error=f"{type(error).__name__}: {reason}")
        if "CUDA error" in str(error):
            raise SystemExit(3) from error
    finally:
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def milliseconds(call: Callable[[], object], rounds: int = 7) -> float:
    """Median, after two calls that warm up. No cache holds what a call works on: its matrices are far larger."""
    rounds, warm = (1, 0) if DRY else (rounds, 2)
    seconds = [timed(DEVICE, call)[0] for _ in range(warm + rounds)]
    return median(seconds[warm:]) * 1e3
