"""Registers and shared memory of every kernel variant, compiled ahead of time: no GPU needed.

    python -m kdkernels.rows.triton_resources > docs/triton-resources.md

A variant is what one call of a backend function launches, recorded instead of launched. Not for a process that
interprets (TRITON_INTERPRET=1). On a GPU, for compute-sanitizer, every variant can be launched once instead:

    compute-sanitizer --tool racecheck python -m kdkernels.rows.triton_resources launch
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..divergences import JSD, ForwardKL, ReverseKL, SkewKL
from . import triton as backend
from .interface import Coefficients
from .operators import NAMES, Operators

TARGETS = (80, 90, 100)
VOCABULARY = 151936
_POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int64: "*i64",
}  # fmt: skip
_KINDS = (ForwardKL(), ReverseKL(), JSD(0.9), SkewKL(0.1))  # one for every place of the mixture
_KERNELS = [
    backend.kernels.statistics_kernel, backend.kernels.candidates_kernel, backend.kernels.divergence_kernel,
    backend.kernels.scatter_kernel, backend.kernels.gradient_kernel,
]  # fmt: skip
_FUNCTIONS = Operators(*(getattr(backend, name) for name in NAMES))  # tensors without memory would get the fake ones
_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_SOFTCAPS = {  # of (student, teacher)
    (False, False): "", (True, True): ", soft-cap",
    (True, False): ", soft-cap of the student", (False, True): ", soft-cap of the teacher",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
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


def every_call(call, rows: int, vocabulary: int) -> None:
    """``call(options, function of the backend, *arguments)`` for all that makes a variant, on the default device."""
    ids = torch.zeros(rows, 11, dtype=torch.int64)
    for temperature in (1.0, 2.0):
        tempered = ", tempered" if temperature != 1 else ""
        sides = {}
        for dtype, softcap in product((_F32, _BF16, _F16), (None, 30.0)):
            options = f"{_short(dtype)}{', soft-cap' if softcap else ''}{tempered}"
            logits = torch.zeros(rows, vocabulary, dtype=dtype)
            sides[dtype, softcap] = call(options, _FUNCTIONS.statistics, logits, 1.0, softcap, temperature, 10, ids)
        for ((dtype, softcap), s), ((t_dtype, t_softcap), t) in product(sides.items(), sides.items()):
            if t_dtype not in (dtype, _F32):  # chunked.py promotes the teacher's to the student's
                continue
            options = f"{_short(dtype)}{' beside fp32 of the teacher' if t_dtype != dtype else ''}"
            options += f"{_SOFTCAPS[softcap is not None, t_softcap is not None]}{tempered}"
            for kind in (None, *_KINDS) if s is t else _KINDS:
                named, center = f"{options}, {kind.name}" if kind else options, None
                if kind:
                    center = call(named, _FUNCTIONS.divergence, s, t, kind, temperature)[1]
                c = Coefficients(torch.zeros(3, rows), ids, torch.zeros(rows, 11))
                for out_dtype in (_F32, _BF16, _F16) if dtype == _F32 else (dtype,):
                    out = s.logits.view(out_dtype)[:, :vocabulary]
                    name = f"{named}, out {_short(out_dtype)}"
                    call(name, _FUNCTIONS.gradient_, s, t if kind else None, kind, temperature, center, c, out)


@functools.cache
def variants() -> tuple[Variant, ...]:
    """Every kernel variant that the engine can ask for, for a 151936-word vocabulary."""
    found: list[Variant] = []
    with torch.device("meta"):
        every_call(functools.partial(_record, found), 1024, VOCABULARY)
    # calls that differ in an option launch the same variant of the kernels that do not have it
    distinct = {_key(v): v for v in reversed(found)}.values()
    return tuple(sorted(reversed(distinct), key=lambda v: _KERNELS.index(v.kernel)))


def _key(variant: Variant) -> tuple:
    """What Triton compiles a kernel anew for."""
    kinds = {k: v.dtype if isinstance(v, Tensor) else v for k, v in variant.arguments.items()}
    constants = {k: v for k, v in kinds.items() if k.isupper() or not isinstance(v, (int, float))}
    return variant.kernel, variant.warps, *((k, str(v)) for k, v in constants.items())


def _short(dtype: torch.dtype) -> str:
    return _POINTERS[dtype][1:]


def _record(found: list[Variant], options: str, function, *arguments):
    """Calls a function of the backend and keeps what it launches instead of launching it."""

    def launch(kernel, programs, warps, **kernel_arguments):
        asked = options.partition(", out")[0] if kernel is backend.kernels.scatter_kernel else options
        name = f"{kernel.__name__.removesuffix('_kernel')}: {asked}"
        found.append(Variant(name, kernel, warps, kernel_arguments))

    with mock.patch.object(backend, "_launch", launch):
        return function(*arguments)


def cubin(variant: Variant, capability: int) -> tuple[bytes, int]:
    """Machine code for GPUs of this compute capability, and the bytes of shared memory a program takes."""
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
    return compiled.asm["cubin"], compiled.metadata.shared


def dump(code: bytes, option: str) -> str:
    """What the cuobjdump that comes with Triton says about a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def _resources(index: int, capability: int) -> Resources:
    code, shared = cubin(variants()[index], capability)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump(code, "-res-usage")).groups()
    return Resources(int(registers), int(stack), shared)


def measure(wanted=lambda variant: True) -> dict[Variant, list[Resources]]:
    """The wanted variants compiled for every target, by as many processes as there are CPUs."""
    chosen = [i for i, variant in enumerate(variants()) if wanted(variant)]
    jobs = list(product(chosen, TARGETS))
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("spawn")) as pool:
        results = pool.map(_resources, *zip(*jobs, strict=True), chunksize=8)
        found = dict(zip(jobs, results, strict=True))
    return {variants()[i]: [found[i, target] for target in TARGETS] for i in chosen}


def table(resources: dict[Variant, list[Resources]]) -> str:
    """Markdown: a line per variant; registers a thread and shared bytes a program on each target."""
    lines = ["| kernel: variant | warps |" + "".join(f" sm_{t} registers / shared |" for t in TARGETS)]
    lines += ["|---|---|" + "---|" * len(TARGETS)]
    for variant, each in resources.items():
        cells = [f"{r.registers} / {r.shared}{f' ({r.stack} bytes of stack)' if r.stack else ''}" for r in each]
        lines.append(f"| {variant.name} | {variant.warps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def document(resources: dict[Variant, list[Resources]]) -> str:
    """docs/triton-resources.md."""
    spilling = [v.name for v, each in resources.items() if any(r.stack for r in each)]
    return f"""# Registers and shared memory of every Triton kernel variant

Compiled ahead of time by triton {triton.__version__} for {VOCABULARY} words: registers a thread, shared
bytes a program. Variants that spill: {", ".join(spilling) or "none"}.

{table(resources)}"""


def launch(device: str, rows: int = 3, vocabulary: int = 5003) -> None:
    """Every variant once, on zeros: two blocks and a part of one in every row."""
    with torch.device(device):
        every_call(lambda options, function, *arguments: function(*arguments), rows, vocabulary)


if __name__ == "__main__":
    if sys.argv[1:] == ["launch"]:
        launch("cuda")
        torch.cuda.synchronize()
    else:
        print(document(measure()))
