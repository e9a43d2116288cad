"""Registers and shared memory of every kernel variant, compiled ahead of time: no GPU needed.

    python -m kdkernels.rows.triton_resources > docs/triton-resources.md

A variant is what one call of a backend function launches, so this file follows the launchers by itself.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from ..divergences import JSD, ForwardKL, ReverseKL, SkewKL
from . import triton as backend
from .interface import Coefficients, Rows

TARGETS = (80, 90, 100)
VOCABULARY = 151936
_POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64"
}  # fmt: skip
_KINDS = (ForwardKL(), ReverseKL(), JSD(0.9), SkewKL(0.1))  # one for every place of the mixture
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Variant:
    """A kernel as it would be launched: ``arguments`` by parameter name, tensors without memory."""

    name: str
    kernel: object
    warps: int
    arguments: dict


@dataclass(frozen=True)
class Resources:
    """Per thread: registers and bytes of stack (spills); per program: bytes of shared memory."""

    registers: int
    stack: int
    shared: int


def variants() -> list[Variant]:
    """Every kernel variant of a 151936-word vocabulary."""
    found: list[Variant] = []
    with torch.device("meta"):
        for dtype, softcap, temperature in product((_F32, _BF16, _F16), (None, 30.0), (1.0, 2.0)):
            options = f"{_short(dtype)}{', soft-cap' if softcap else ''}{', tempered' if temperature != 1 else ''}"
            rows = _record(found, options, backend.statistics, _logits(dtype), 1.0, softcap, temperature, 10, None)
            if temperature == 1:
                ids = torch.empty(1024, 11, dtype=torch.int64)
                _record(found, f"{options}, ids", backend.statistics, _logits(dtype), 1.0, softcap, 1.0, 10, ids)
            for kind in _KINDS:
                if temperature == 1:
                    _record(found, f"{options}, {kind.name}", backend.divergence, rows, rows, kind, 1.0)
                _gradients(found, f"{options}, {kind.name}", rows, kind, temperature)
            if temperature == 1:
                _gradients(found, options, rows, None, 1.0)
    return list({(v.name): v for v in found}.values())


def _gradients(found: list[Variant], options: str, rows: Rows, kind, temperature: float) -> None:
    center = rows.stats[:, 0]
    for dtype, ids in product({_F32: (_F32, _BF16, _F16)}.get(rows.logits.dtype, (rows.logits.dtype,)), (0, 11)):
        words = torch.empty(1024, ids, dtype=torch.int64)
        c = Coefficients(torch.empty(3, 1024), words, torch.empty(1024, ids))
        out = rows.logits.new_empty((1024, VOCABULARY * rows.logits.itemsize // dtype.itemsize), dtype=dtype)
        name = f"{options}, out {_short(dtype)}{', ids' if ids else ''}"
        _record(found, name, backend.gradient_, rows, rows, kind, temperature, center, c, out[:, :VOCABULARY])


def _logits(dtype: torch.dtype) -> Tensor:
    return torch.empty(1024, VOCABULARY, dtype=dtype)


def _short(dtype: torch.dtype) -> str:
    return _POINTERS[dtype][1:]


def _record(found: list[Variant], options: str, function, *arguments):
    """Calls a function of the backend and keeps what it launches instead of launching it."""

    def launch(kernel, programs, warps, **kernel_arguments):
        name = f"{kernel.__name__.removesuffix('_kernel')}: {options}"
        found.append(Variant(name, kernel, warps, kernel_arguments))

    with mock.patch.object(backend, "_launch", launch):
        return function(*arguments)


def compile_variant(variant: Variant, capability: int) -> Resources:
    """Compiles for a GPU of this compute capability and reads what the cubin says it uses."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(variant.kernel.arg_names):
        value = variant.arguments[name]
        if name.isupper() or value is None:
            signature[name], constants[name] = "constexpr", getattr(value, "value", value)
            continue
        if isinstance(value, Tensor):
            signature[name], aligned = _POINTERS[value.dtype], True
        else:
            signature[name], aligned = ("fp32", False) if isinstance(value, float) else ("i32", value % 16 == 0)
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": variant.warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _usage(compiled.asm["cubin"])
    return Resources(registers, stack, compiled.metadata.shared)


def _usage(cubin: bytes) -> tuple[int, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def table(resources: dict[tuple[str, int], Resources], warps: dict[str, int]) -> str:
    """Markdown: a line per variant, registers and shared bytes per target."""
    lines = ["| kernel: variant | warps |" + "".join(f" sm_{t} registers / shared |" for t in TARGETS)]
    lines += ["|---|---|" + "---|" * len(TARGETS)]
    for name, count in warps.items():
        cells = [resources[name, target] for target in TARGETS]
        text = "".join(f" {r.registers} / {r.shared}{f' SPILLS {r.stack}' if r.stack else ''} |" for r in cells)
        lines.append(f"| {name} | {count} |{text}")
    return "\n".join(lines)


def main() -> None:
    everything = variants()
    resources = {(v.name, target): compile_variant(v, target) for v in everything for target in TARGETS}
    print("# Registers per thread and shared memory per program of every Triton kernel variant\n")
    print(f"Compiled ahead of time for {VOCABULARY} words; none uses the stack, so nothing spills.\n")
    print(table(resources, {v.name: v.warps for v in everything}))


if __name__ == "__main__":
    main()
