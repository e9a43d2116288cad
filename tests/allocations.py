"""How many bytes are taken while a ``with`` block runs: torch's allocations, and memory that is resident."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile


class Allocations:
    """``peak``: the most bytes torch's CPU allocator held at a time beyond what it held before, inside operators too.

    Blocks of kdkernels.compute.memory are not torch's; conftest.py's poisoned memory has none.
    """

    def __enter__(self) -> Allocations:
        self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self.profile.__enter__()
        torch.empty(1)  # something must be seen
        return self

    def __exit__(self, *error) -> None:
        self.profile.__exit__(*error)
        events = [each for each in self.profile.profiler.kineto_results.events() if each.name() == "[memory]"]
        self.peak = held = 0
        for event in sorted(events, key=lambda each: each.start_ns()):
            held += event.nbytes()
            self.peak = max(self.peak, held)
        assert events, "nothing was seen"


class Resident:
    """``peak``: the most bytes of this process that were in memory at a time beyond those before, whoever took them.

    Small blocks may have been there already; Linux only (``measurable``).
    """

    measurable = Path("/proc/self/clear_refs").exists()

    def __enter__(self) -> Resident:
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
        self.before = self._read("VmRSS")
        return self

    def __exit__(self, *error) -> None:
        self.peak = self._read("VmHWM") - self.before

    @staticmethod
    def _read(key: str) -> int:
        return int(re.search(rf"{key}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
