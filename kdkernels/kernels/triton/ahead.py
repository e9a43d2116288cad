"""Kernels compiled ahead of their launch, by several processes, with a GPU or without one.

``noted`` runs a call and notes what Triton's JIT would compile for it: the signature, constants (None among them) and
alignments that a launch asks for. Nothing is compiled or launched, and what the kernels would write stays as it was.
``compiled`` has several processes compile what was noted, into Triton's cache, where a launch finds it. Without a GPU,
``stand_in`` says for which one to compile. None of this works in a process that interprets (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from . import pairs, statistics

_KERNELS = {name: each for module in (statistics, pairs) for name, each in vars(module).items() if "_kernel" in name}


@dataclass(frozen=True)
class Specialisation:
    """One compilation: of ``kernel`` (its name) with ``data``, Triton's own record of it, for ``capability`` (90)."""

    kernel: str
    capability: int
    data: str


@dataclass(frozen=True)
class Compiled:
    """Machine code and bytes of shared memory per program, or Triton's error where it did not compile."""

    cubin: bytes = b""
    shared: int = 0
    error: str = ""


class StandIn:
    """Answers what Triton's JIT asks a GPU's driver: it knows a compute capability and launches nothing."""

    def __init__(self, capability: int):
        self.capability, self.utils = capability, self

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # kernels cache what they compiled by device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 99 * 1024}  # the least of any GPU from Ampere on

    def load_binary(self, name: str, code: bytes, shared: int, device: int) -> tuple:
        return None, None, 0, 0, 1024

    def unload_module(self, module) -> None:
        pass

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        return lambda *arguments: None


@contextmanager
def stand_in(capability: int) -> Iterator[None]:
    """Has Triton compile for GPUs of this compute capability (90: Hopper), whether there is one or not."""
    before = driver._active
    driver.set_active(StandIn(capability))
    try:
        yield
    finally:
        driver.set_active(before)


def noted(call: Callable[[], object]) -> dict[Specialisation, None]:
    """What ``call()`` would have the JIT compile, each once, in order, without what this process has compiled."""
    found = {}

    def note(*, fn, compile, **_) -> bool:
        capability = driver.active.get_current_target().arch
        found[Specialisation(fn.jit_function.fn.__name__, capability, compile["specialization_data"])] = None
        return True  # tells the JIT to stop here

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = note
        call()
    return found


def _compile(wanted: Specialisation) -> Compiled:
    there = torch.cuda.is_available() and driver.active.get_current_target().arch == wanted.capability
    with nullcontext() if there else stand_in(wanted.capability):
        try:
            kernel = _KERNELS[wanted.kernel].preload(wanted.data)
            kernel.run  # noqa: B018 - to ask for it compiles the launcher, loads the code, checks its shared memory
            return Compiled(kernel.asm["cubin"], kernel.metadata.shared)
        except Exception as error:
            return Compiled(error="".join(traceback.format_exception_only(error)))


def compiled(wanted: Iterable[Specialisation]) -> dict[Specialisation, Compiled]:
    """Compiles all of them in as many processes as there are CPUs; a stand-in serves for GPUs that are not there."""
    wanted = list(wanted)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        return dict(zip(wanted, pool.map(_compile, wanted, chunksize=4), strict=True))
