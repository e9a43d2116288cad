"""Times every implementation of every loss of a case in turns with the bare GEMMs, after verifying what it computes."""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median_low as median  # of two rounds the one that nothing disturbed

import peers
import torch
from cases import LOSSES, Batch, Case, Loss, batches
from environment import clocks
from gemms import BareGemms, bytes_moved, candidates, flops, yardstick
from verify import Truth

from kdkernels.compute import memory

MIB = 2**20
FINALISTS, CLOSE = 2, 1.05  # chunk sizes of the bare GEMMs that are timed in turns: the fastest of one chunk each
SLOW = 3  # times the bare GEMMs: a peer beyond it has two rounds


@dataclass
class Cell:
    """One implementation of one loss: times, or why there are none."""

    loss: str
    implementation: str
    reason: str = ""  # missing, out of memory, wrong, no time
    times: list[tuple[float, float]] = field(default_factory=list)  # seconds of forward and backward of each round
    extra_info: dict = field(default_factory=dict)


def key(loss: str, implementation: str) -> str:
    return f"{implementation} | {loss}"


# ---- clocks and memory -----------------------------------------------------------------------------------------------


def resident(line: str) -> float:
    """VmRSS or VmHWM (the peak) of this process, in MiB."""
    for each in Path("/proc/self/status").read_text().splitlines():
        if each.startswith(line + ":"):
            return int(each.split()[1]) / 1024
    raise KeyError(line)


def keep_freed_blocks(below: int) -> None:
    """Smaller blocks stay resident when they are freed, larger ones do not (glibc; the default of both grows to this).

    What stays serves the next call unseen: without this, the checks' small blocks hid hundreds of MiB of a loss.
    """
    malloc = ctypes.CDLL(None)
    for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        malloc.mallopt(option, below)


class Peak:
    """Peak memory from here on, in MiB: of PyTorch's allocator on a GPU, resident on a CPU."""

    def __init__(self, device: str):
        self.device = device
        gc.collect()
        memory.release()  # the last call's blocks would hide what this one needs
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / MIB
        else:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            self.before = resident("VmRSS")

    def extra(self) -> float:
        now = torch.cuda.max_memory_allocated() / MIB if self.device == "cuda" else resident("VmHWM")
        return now - self.before


def timed(device: str, *steps) -> tuple[float, ...]:
    """Seconds of each step, one after the other: by events on a GPU, which no launch latency of ours enters."""
    if device == "cpu":
        marks = [time.perf_counter()]
        for step in steps:
            step()
            marks.append(time.perf_counter())
        return tuple(b - a for a, b in zip(marks, marks[1:], strict=False))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(steps) + 1)]
    torch.cuda.synchronize()
    events[0].record()
    for step, event in zip(steps, events[1:], strict=True):
        step()
        event.record()
    torch.cuda.synchronize()
    return tuple(a.elapsed_time(b) / 1e3 for a, b in zip(events, events[1:], strict=False))


def clear(batch: Batch) -> None:
    batch.hidden_s.grad = batch.weight_s.grad = None


def run(device: str, batch: Batch, implementation: peers.Implementation, loss: Loss) -> tuple[float, float]:
    """Seconds of forward and backward; the gradients stay in the batch."""
    clear(batch)
    out = []
    return timed(device, lambda: out.append(implementation.forward(batch, loss)), lambda: out.pop().backward())


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "allocate memory" in str(error)


def floor(bare: dict[tuple[int, bool], list[float]], loss: Loss) -> tuple[float, int]:
    """Median seconds of the bare GEMMs and the rows of a chunk at which they are the fastest."""
    return min((median(times), rows) for (rows, teacher), times in bare.items() if teacher == loss.teacher)


# ---- a case ----------------------------------------------------------------------------------------------------------


class CaseRun:
    def __init__(self, case: Case, device: str, deadline: float):
        self.case, self.device, self.deadline = case, device, deadline
        self.cells: dict[str, Cell] = {}
        self.batches = batches(case, device, 1 if device == "cpu" else 2)  # inputs rotate: no cache holds the last ones
        self.truth = Truth(self.batches[0])

    def measure(self) -> dict[str, Cell]:
        ready = []
        keep_freed_blocks(below=4 * MIB)
        for loss in (LOSSES[name] for name in self.case.losses):
            for name in self.case.implementations:
                cell = self.cells[key(loss.name, name)] = Cell(loss.name, name)
                implementation = self._implementation(name, loss, cell)
                if implementation and self._warm_up(implementation, loss, cell):
                    ready.append((cell, implementation, loss))
        keep_freed_blocks(below=32 * MIB)  # as glibc does by itself after a while
        bare = self._bare_gemms()
        self._rounds(bare, ready)
        self._summarise(bare, [cell for cell, _, _ in ready])
        return self.cells

    def _implementation(self, name: str, loss: Loss, cell: Cell) -> peers.Implementation | None:
        if name.startswith(peers.IN_THE_MEMORY_OF):
            peer = self.cells.get(key(loss.name, name.removeprefix(peers.IN_THE_MEMORY_OF)))
            if peer is None or "extra_mib" not in peer.extra_info:
                cell.reason = "that peer's memory is not known"
                return None
            budget = int(peer.extra_info["extra_mib"] * MIB)
            return peers.Ours(name, memory_budget=budget)
        implementation = peers.IMPLEMENTATIONS[name]
        cell.reason = implementation.missing(self.case, loss, self.device)
        if not cell.reason:
            crawls = yardstick(self.case.dtype, self.device) != self.case.dtype
            if crawls and not implementation.exact:
                cell.reason = "left out: its 16-bit products would take minutes, this CPU has no units for them"
            elif time.monotonic() > self.deadline:
                cell.reason = "no time left"
        return None if cell.reason else implementation

    def _warm_up(self, implementation: peers.Implementation, loss: Loss, cell: Cell) -> bool:
        """Runs once for the peak of memory and the check of the gradients; says whether to time it."""
        batch = self.batches[0]
        try:
            if implementation.compiles:
                run(self.device, batch, implementation, loss)
            clear(batch)
            peak = Peak(self.device)
            run(self.device, batch, implementation, loss)
            gradients = sum(t.grad.nbytes for t in (batch.hidden_s, batch.weight_s) if t.grad is not None) / MIB
            cell.extra_info["extra_mib"] = peak.extra() - gradients
            check = self.truth.check(loss, implementation.reduction(loss), implementation.exact)
        except Exception as error:
            if out_of_memory(error):
                cell.reason = "out of memory"
            elif implementation.exact:
                raise
            else:  # somebody else's
                cell.reason = f"failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            return False
        finally:
            clear(batch)
        cell.extra_info |= {"error": check.error, "yardstick": check.yardstick, "consistency": check.consistency}
        cell.reason = check.wrong
        return not check.wrong

    def _bare_gemms(self) -> dict[tuple[int, bool], list[float]]:
        """Seconds by rows of a chunk and with or without the teacher, of those that may be the fastest."""
        self.gemms, out = BareGemms(self.batches[0]), {}
        for teacher in sorted({LOSSES[name].teacher for name in self.case.losses}):
            per_row, sizes = {}, candidates(self.case.tokens)
            for rows in (sizes[0], *sizes):  # the first one again: the libraries are up then
                per_row[rows] = self._time_gemms(self.batches[0].first(rows), rows, teacher) / rows
            fastest = sorted(sizes, key=per_row.get)[:FINALISTS]
            out |= {(rows, teacher): [] for rows in fastest if per_row[rows] <= CLOSE * per_row[fastest[0]]}
        return out

    def _time_gemms(self, batch: Batch, rows: int, teacher: bool) -> float:
        return timed(self.device, lambda: self.gemms(batch, rows, teacher))[0]

    def _rounds(self, bare: dict, ready: list) -> None:
        start, count = time.monotonic(), 0
        while count < 3 or time.monotonic() < min(start + self.case.seconds, self.deadline):
            batch = self.batches[count % len(self.batches)]
            clear(batch)
            for (rows, teacher), seconds in bare.items():
                seconds.append(self._time_gemms(batch, rows, teacher))
            for cell, implementation, loss in ready:
                slow = count > 1 and not implementation.exact and sum(cell.times[0]) > SLOW * floor(bare, loss)[0]
                if not slow:
                    cell.times.append(run(self.device, batch, implementation, loss))
                    clear(batch)
            count += 1

    def _summarise(self, bare: dict, cells: list[Cell]) -> None:
        case, now = self.case, clocks(self.device)
        for cell in cells:
            loss = LOSSES[cell.loss]
            bare_seconds, rows = floor(bare, loss)
            forward, backward = (median(t) for t in zip(*cell.times, strict=True))
            seconds = [sum(times) for times in cell.times]
            full = median(seconds)
            work, traffic = flops(case, loss.teacher), bytes_moved(case, loss.teacher, rows)
            cell.extra_info |= {
                "case": case.name,
                "models": case.models.name,
                "hidden": [case.models.student, case.models.teacher],
                "vocabulary": case.models.vocabulary,
                "tokens": case.tokens,
                "response": case.response,
                "operand": case.operand,
                "trained": case.trained,
                "loss": cell.loss,
                "implementation": cell.implementation,
                "rounds": len(cell.times),
                "rounds_s": list(zip(seconds, bare[rows, loss.teacher], strict=False)),  # and of the bare GEMMs
                "forward_s": forward,
                "backward_s": backward,
                "full_s": full,
                "bare_gemms_s": bare_seconds,
                "bare_gemms_rows": rows,
                "bare_gemms_operand": str(self.gemms.dtype)[6:],
                "ratio": full / bare_seconds,
                "flops": work,
                "bytes": traffic,
                "tflops": work / full / 1e12,
                "gbs": traffic / full / 1e9,
                "clocks": now,
            }
