"""Step 7: one call in torch's profiler: which kernels take how long, launches, how long the GPU waits between them."""

from __future__ import annotations

import time
from collections import Counter

import torch
from cases import LOSSES, QWEN, TINY, Case, batches
from findings import DEVICE, DRY, attempt, record
from measure import clear
from peers import IMPLEMENTATIONS
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MOST = 12  # kernels that are listed


def call(batch, name: str, loss: str) -> float:
    """Milliseconds until the call returns, the device still at work: what Python and the launches take."""
    clear(batch)
    began = time.perf_counter()
    IMPLEMENTATIONS[name].forward(batch, LOSSES[loss]).backward()
    return (time.perf_counter() - began) * 1e3


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def events(name: str, loss: str, batch) -> list:
    """What ran on the device (in the dry run: the outermost operators), in the order in which it began."""
    kind = DeviceType.CUDA if DEVICE == "cuda" else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if DEVICE == "cuda" else [])]
    with profile(activities=activities) as profiled:
        call(batch, name, loss)
        synchronize()
    found = [e for e in profiled.events() if e.device_type == kind and e.cpu_parent is None]
    return sorted(found, key=lambda e: e.time_range.start)


def timeline(name: str, loss: str, batch) -> None:
    for _ in range(2):
        host = call(batch, name, loss)
        synchronize()
    found = events(name, loss, batch)
    end, idle, times = found[0].time_range.start, 0.0, Counter()
    for event in found:
        idle += max(0.0, event.time_range.start - end)
        end = max(end, event.time_range.end)
        times[event.name[:80]] += event.time_range.elapsed_us() / 1e3
    span = (end - found[0].time_range.start) / 1e3
    figures = {"host_ms": host, "span_ms": span, "idle_ms": idle / 1e3, "launches": len(found)}
    record("timeline", loss=loss, implementation=name, **figures, kernels_ms=dict(times.most_common(MOST)))


if __name__ == "__main__":
    shape = (TINY, 64, (), ()) if DRY else (QWEN, 16384, (), ())
    (batch,) = batches(Case(*shape, response=32 if DRY else 512), DEVICE, 1)
    for loss in ("JSD(0.9)", "TSD-KD", "cross-entropy"):
        for name in ("kdkernels", "kdkernels, bf16 logits"):
            with attempt(f"{loss}, {name}"):
                timeline(name, loss, batch)
