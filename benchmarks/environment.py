"""Where a measurement was made: device, driver, clocks, versions, commit. Names no host and no path."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from pathlib import Path

import torch

import kdkernels as kd

PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "trl", "transformers", "pytest-benchmark")


def _output(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip() if done.returncode == 0 else ""


def versions() -> dict[str, str]:
    out = {}
    for package in PACKAGES:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = "missing"
    return out


def clocks(device: str) -> str:
    if device == "cuda":
        return _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader").split("\n")[0]
    found = re.search(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
    return f"{found[1]} MHz" if found else ""


def cpu() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1].strip() if found else platform.machine()


def machine(device: str) -> str:
    """The name of the results' folder: the GPU, or instruction set and threads."""
    if device == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    return f"{kd.info()['cpu_isa'] or 'no-extension'}-{torch.get_num_threads()}-threads"


def describe(device: str) -> dict:
    on_gpu = device == "cuda"
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    sources = ("../kdkernels", "../csrc", "../python_bindings")
    return {
        "machine": machine(device),
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "cpu": cpu(),
        "driver": _output(*query).split("\n")[0] if on_gpu else "",
        "clocks": clocks(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions(),
        "backend": kd.info()["devices"].get(device, "none"),
        "commit": _output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "modified": bool(_output("git", "status", "--porcelain", "--", *sources)),
    }
