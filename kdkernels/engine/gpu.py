"""A small model of a GPU, from which chunks get their size: how fast it multiplies 16-bit matrices and moves bytes.

All of it is computed, nothing was measured on a GPU; docs/gpu-defaults.md has what comes of it (predict.py). C rows
(tokens) of a chunk, V vocabulary entries and a hidden size H cost

    logits, dX     2 C V H operations, and reading 2 V H bytes of weights
    dW             2 C V H operations, and reading and writing 8 V H bytes of fp32 sums

so with fewer rows than ``bandwidth_rows`` = operations a byte, reading weights dominates, and with fewer than four
times that many, adding to dW: a chunk has these. Twice as many would gain 2 to 4 % of a call and take twice the memory.

Axes: C student rows of a chunk, T teacher rows, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch

HIDDEN, HIDDEN_SUMS = 0.15, 0.3  # of its time a traffic costs that is hidden behind arithmetic; that of dW's sums
TILE = 128  # rows of a product's tile: a chunk with a few rows more costs a whole one
_SHARE_OF_MEMORY = 1 / 16  # of the GPU's: no default budget is larger
_REACHED_FLOPS, _REACHED_BANDWIDTH = 0.71, 0.90  # of the data sheet's: 700 TFLOP/s and 3.0 TB/s of an H100
KNOWN = {  # 16-bit FLOP/s and bytes/s of the data sheets, by a part of the GPU's name; the first that fits
    "A100": (312e12, 2.04e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "GH200": (989e12, 4.0e12),
    "H200": (989e12, 4.8e12),
    "B200": (2250e12, 8.0e12),
}
CARDS = {  # by the names of plans: the part of the name, FLOP/s, bytes/s, bytes
    "a100-40g": ("A100", 312e12, 1.555e12, 40 * 10**9),
    "a100-80g": ("A100", *KNOWN["A100"], 80 * 10**9),
    "h100": ("H100", *KNOWN["H100"], 80 * 10**9),
    "h200": ("H200", *KNOWN["H200"], 141 * 10**9),
    "b200": ("B200", *KNOWN["B200"], 180 * 10**9),
}
_FLOPS_A_CLOCK = {8: 2048, 9: 4096, 10: 8192}  # of a multiprocessor, by major capability; consumer cards have less
_H100 = KNOWN["H100"]


class Gpu(NamedTuple):
    name: str
    flops: float  # 16-bit operations a second that products reach
    bandwidth: float  # bytes a second
    memory: int  # bytes

    @classmethod
    def of(cls, properties) -> Gpu:
        """Of torch.cuda.get_device_properties: a known name's figures, else computed from clocks and sizes."""
        rates = next((rates for part, rates in KNOWN.items() if part in properties.name), None) or _computed(properties)
        return cls.reached(properties.name, *rates, properties.total_memory)

    @classmethod
    def reached(cls, name: str, flops: float, bandwidth: float, memory: int) -> Gpu:
        """From the rates of a data sheet."""
        return cls(name, flops * _REACHED_FLOPS, bandwidth * _REACHED_BANDWIDTH, memory)

    @classmethod
    def named(cls, card: str) -> Gpu:
        """One of CARDS."""
        return cls.reached(*CARDS[card])

    @property
    def bandwidth_rows(self) -> float:
        """Rows that a product of 16-bit weights computes in the time in which these are read."""
        return self.flops / self.bandwidth

    @property
    def limit(self) -> int:
        """Bytes that no default budget exceeds."""
        return int(self.memory * _SHARE_OF_MEMORY)

    def rows(self, products: Products) -> ChunkRows:
        """Student and teacher rows of a chunk: as few as keep products from waiting for weights and sums."""
        least = self.bandwidth_rows * (4 if products.d_weight else 2)
        student = _tiles(least * max(1, 4 // products.logits_bytes))  # as many bytes buy more rows of narrow logits
        # Bytes that more rows save: of two buffers whose costs fall as own / C and other / T, those of the best sizes
        # are as the roots.
        own = products.student * (HIDDEN * 2 * (1 + products.d_hidden) + HIDDEN_SUMS * 8 * products.d_weight)
        other = products.teacher * HIDDEN * 2
        ideal = math.sqrt(other / own) if own and other else 0.25
        return ChunkRows(student, _tiles(student / math.ceil(1 / min(1.0, ideal))))


class Products(NamedTuple):
    """What a call multiplies. Hidden sizes are 0 where the logits are given."""

    student: int
    teacher: int
    d_hidden: bool
    d_weight: bool
    logits_bytes: int


class ChunkRows(NamedTuple):
    """Tokens of a chunk, and of the teacher's part of it."""

    student: int
    teacher: int


def _tiles(rows: float) -> int:
    return max(1, math.ceil(rows / TILE)) * TILE


def _computed(properties) -> tuple[float, float]:
    """FLOP/s and bytes/s from clocks (kHz) and sizes; those of an H100 for a PyTorch or a driver that tells none."""
    clock, memory_clock = (getattr(properties, name, 0) for name in ("clock_rate", "memory_clock_rate"))
    if not clock or not memory_clock:
        return _H100
    a_clock = _FLOPS_A_CLOCK.get(properties.major, max(_FLOPS_A_CLOCK.values()))
    if properties.minor and properties.major == 8:
        a_clock /= 2
    flops = properties.multi_processor_count * clock * 1e3 * a_clock
    return flops, 2 * memory_clock * 1e3 * properties.memory_bus_width / 8


@cache
def this(index: int) -> Gpu:
    return Gpu.of(torch.cuda.get_device_properties(index))


def _of(device: torch.device) -> Gpu:
    return this(torch.cuda.current_device() if device.index is None else device.index)


def wanted(device: torch.device, products: Products) -> ChunkRows | None:
    """Rows of a chunk on this device; None where it is no GPU."""
    return _of(device).rows(products) if device.type == "cuda" else None


def allowance(device: torch.device) -> int:
    """Bytes that no default budget exceeds: a share of the GPU's memory, and half of what is free.

    What is free is known to the driver, nothing waits for the GPU. It is the one thing here that is not the same for
    every call of a kind.
    """
    limit = _of(device).limit
    if torch.cuda.is_current_stream_capturing():  # the driver may not be asked
        return limit
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(limit, (torch.cuda.mem_get_info(device)[0] + unused) // 2)


def info(index: int) -> dict[str, object]:
    """What the model says of a GPU: rows of fp32 logits with and without a gradient of weights, and the limit."""
    gpu = this(index)
    trained, frozen = (gpu.rows(Products(1, 1, True, trains, 4)).student for trains in (True, False))
    return {
        "gpu": gpu.name, "flops": gpu.flops, "bandwidth": gpu.bandwidth, "limit": gpu.limit,
        "rows": trained, "rows_frozen": frozen,
    }  # fmt: skip
