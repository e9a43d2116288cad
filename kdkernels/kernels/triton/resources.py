"""Registers, shared memory and instructions of the kernel variants that a call can launch; no GPU needed.

    python -m kdkernels.kernels.triton.resources > docs/triton-resources.md

On a GPU, for compute-sanitizer, every variant can be compiled by many processes and launched once instead (``shared``:
only what has shared memory, which is all that racecheck sees):

    python -m kdkernels.kernels.triton.resources compile
    compute-sanitizer --tool racecheck python -m kdkernels.kernels.triton.resources launch shared
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import triton

from ...compute import memory
from ...divergences import JSD, ForwardKL, ReverseKL, SkewKL
from ..interface import Coefficients
from . import backend
from .ahead import Compiled, Specialisation, compiled, noted, stand_in

TARGETS = (80, 90, 100)
COUNTED = 90
VOCABULARY = 151936
RAGGED = 151665  # a vocabulary for which the rows of a buffer are padded
_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
_DIVERGENCES = (ForwardKL(), ReverseKL(), JSD(0.9), SkewKL(0.1))  # one for every mixture that the kernels know
_ORDER = ("statistics", "candidates", "divergence", "scatter", "gradient")
_SOFTCAPS = {  # of (student, teacher)
    (False, False): "", (True, True): ", soft-cap",
    (True, False): ", soft-cap of the student", (False, True): ", soft-cap of the teacher",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Variant:
    """A kernel as it is launched; what the JIT compiles for it on each target."""

    name: str
    warps: int
    targets: dict[int, Specialisation]


@dataclass(frozen=True)
class Resources:
    """Per thread: registers and bytes of stack (spills); per program: bytes of shared memory."""

    registers: int
    stack: int
    shared: int


def every_call(call, rows: int, vocabulary: int) -> None:
    """``call(options, function of the backend, *arguments)`` for all that makes a variant, on the default device."""
    ids, none = (torch.zeros(rows, count, dtype=torch.int64) for count in (11, 0))
    for temperature in (1.0, 2.0):
        tempered = ", tempered" if temperature != 1 else ""
        rows_of = {}
        for dtype, softcap in product(_NAMES, (None, 30.0)):
            options = f"{_NAMES[dtype]}{', soft-cap' if softcap else ''}{tempered}"
            arguments = torch.zeros(rows, vocabulary, dtype=dtype), 1.0, softcap, temperature
            rows_of[dtype, softcap] = call(options, backend.BACKEND.statistics, *arguments, 10, ids)
            call(f"{options}, without ids", backend.BACKEND.statistics, *arguments, 1, None)
        for ((dtype, softcap), s), ((t_dtype, t_softcap), t) in product(rows_of.items(), rows_of.items()):
            if t_dtype not in (dtype, torch.float32):  # the chunk loop promotes the teacher's to the student's
                continue
            options = f"{_NAMES[dtype]}{' beside fp32 of the teacher' if t_dtype != dtype else ''}"
            options += f"{_SOFTCAPS[softcap is not None, t_softcap is not None]}{tempered}"
            for divergence in (None, *_DIVERGENCES) if s is t else _DIVERGENCES:
                named, sums = f"{options}, {divergence.name}" if divergence else options, None
                if divergence:
                    sums = call(named, backend.BACKEND.divergence, s, t, divergence, temperature)[1]
                for out_dtype in _NAMES if dtype == torch.float32 else (dtype,):
                    out = s.logits.view(out_dtype)[:, :vocabulary]
                    for each in (ids, none):
                        c = Coefficients(torch.zeros(3, rows), each, torch.zeros(each.shape))
                        name = f"{named}, out {_NAMES[out_dtype]}"
                        other = t if divergence else None
                        call(name, backend.BACKEND.gradient_, s, other, divergence, temperature, sums, c, out)


@functools.cache
def variants() -> tuple[Variant, ...]:
    """Every kernel variant that the engine can ask for, for a vocabulary of 151936."""
    each = [_named(target) for target in TARGETS]
    found = [
        Variant(name, json.loads(first.data)["options"]["num_warps"], dict(zip(TARGETS, (first, *others), strict=True)))
        for (first, name), *others in zip(each[0].items(), *each[1:], strict=True)
    ]
    return tuple(sorted(found, key=lambda v: _ORDER.index(v.name.partition(":")[0])))


def _named(target: int) -> dict[Specialisation, str]:
    """Calls that differ in an option launch the same variant of the kernels that do not have it: the first names it."""
    names = {}

    def call(options: str, function, *arguments):
        out = []
        for found in noted(lambda: out.append(function(*arguments))):
            kernel = found.kernel.removesuffix("_kernel")
            asked = options.partition(", out")[0] if kernel == "scatter" else options
            names.setdefault(found, f"{kernel}: {asked}")
        return out[0]

    with torch.device("meta"), stand_in(target):
        every_call(call, 1024, VOCABULARY)
    return names


def dump(code: bytes, option: str) -> str:
    """What the cuobjdump that comes with Triton says about a cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout


def measure(wanted=lambda variant: True, targets: tuple[int, ...] = TARGETS) -> dict[Variant, list[Resources]]:
    """The wanted variants compiled for each target.

    Raises:
        RuntimeError: some do not compile.
    """
    chosen = [variant for variant in variants() if wanted(variant)]
    jobs = [variant.targets[target] for variant in chosen for target in targets]
    done = compiled(jobs)
    _check(done)
    with ThreadPoolExecutor() as pool:
        results = iter(list(pool.map(_resources, [done[job] for job in jobs])))
    return {variant: [next(results) for _ in targets] for variant in chosen}


def _resources(compiled: Compiled) -> Resources:
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump(compiled.cubin, "-res-usage")).groups()
    return Resources(int(registers), int(stack), compiled.shared)


def _check(done: dict[Specialisation, Compiled]) -> None:
    failed = {wanted: each.error for wanted, each in done.items() if each.error}
    for wanted, error in failed.items():
        raise RuntimeError(f"{len(failed)} of {len(done)} variants do not compile; {wanted}: {error}")


def table(resources: dict[Variant, list[Resources]]) -> str:
    """Markdown: a line per variant; registers a thread and shared bytes a program on each target."""
    lines = ["| kernel: variant | warps |" + "".join(f" sm_{t} registers / shared |" for t in TARGETS)]
    lines += ["|---|---|" + "---|" * len(TARGETS)]
    for variant, each in resources.items():
        cells = [f"{r.registers} / {r.shared}{f' ({r.stack} bytes of stack)' if r.stack else ''}" for r in each]
        lines.append(f"| {variant.name} | {variant.warps} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- instructions per entry ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loop:
    """The instructions with which a thread handles its entries of one whole block."""

    entries: int
    instructions: list[str]

    @property
    def per_entry(self) -> float:
        return len(self.instructions) / self.entries


def whole_blocks(wanted: Specialisation, done: Compiled) -> Loop:
    """The first loop of a sweep's machine code; the second takes what is left of a row."""
    block, warps = getattr(backend, f"_{wanted.kernel.removesuffix('_kernel').upper()}")
    found = re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", dump(done.cubin, "-sass"))
    code = [(int(each[1], 16), each[2].strip()) for each in found]
    for last, (address, text) in enumerate(code):
        target = re.search(r"\bBRA.* 0x([0-9a-f]+)$", text)
        if target and int(target[1], 16) < address:
            first = next(i for i, (each, _) in enumerate(code) if each == int(target[1], 16))
            return Loop(block // (32 * warps), [text for _, text in code[first : last + 1]])
    raise RuntimeError(f"no loop in the code of {wanted}")


def loops() -> dict[tuple[str, str], tuple[Loop, Loop, Loop]]:
    """(logits, divergence) -> those of statistics, divergence and gradient of a plain loss with bf16 operands."""
    jobs: dict[tuple[str, str], list[Specialisation]] = {}
    with torch.device("meta"), stand_in(COUNTED):
        for dtype, divergence in product((torch.float32, torch.bfloat16), _DIVERGENCES):
            (logits,) = memory.matrices([((1024, RAGGED), dtype)], torch.device("meta"))
            out = logits.view(torch.bfloat16)[:, :RAGGED]
            c = Coefficients(torch.zeros(3, 1024), torch.zeros(1024, 0, dtype=torch.int64), torch.zeros(1024, 0))

            def call(logits=logits, divergence=divergence, c=c, out=out) -> None:
                s = backend.BACKEND.statistics(logits, 1.0, None, 1.0, 1, None)
                sums = backend.BACKEND.divergence(s, s, divergence, 1.0)[1]
                backend.BACKEND.gradient_(s, s, divergence, 1.0, sums, c, out)

            found = [each for each in noted(call) if each.kernel != "candidates_kernel"]
            jobs[_NAMES[dtype], divergence.name] = found
    done = compiled(dict.fromkeys(job for each in jobs.values() for job in each))
    _check(done)
    return {key: tuple(whole_blocks(job, done[job]) for job in each) for key, each in jobs.items()}


def counts(loops: dict[tuple[str, str], tuple[Loop, Loop, Loop]]) -> str:
    """Markdown: instructions per entry of each sweep. Statistics are taken of both models."""
    lines = ["| logits, divergence | statistics of a model | value | gradient | in all |", "|---|---|---|---|---|"]
    for (logits, divergence), each in loops.items():
        one, value, gradient = (loop.per_entry for loop in each)
        cells = " | ".join(f"{n:.1f}" for n in (one, value, gradient, 2 * one + value + gradient))
        lines.append(f"| {logits}, {divergence} | {cells} |")
    return "\n".join(lines)


def document(resources: dict[Variant, list[Resources]], counted: str) -> str:
    """docs/triton-resources.md."""
    spilling = [v.name for v, each in resources.items() if any(r.stack for r in each)]
    return f"""# Instructions, registers and shared memory of the Triton kernels

Compiled ahead of time by triton {triton.__version__}. sm_{COUNTED} instructions per entry of a row of {RAGGED}, in
the loop over whole blocks; bf16 gradients, no soft-cap, temperature 1:

{counted}

Registers a thread and shared bytes a program, {VOCABULARY} entries, of the usual variants: fp32 logits of both models,
fp32 or bf16 gradients, a soft-cap of both models or none. Of them spill: {", ".join(spilling) or "none"}.

{table(resources)}"""


def usual(variant: Variant) -> bool:
    """What a GPU runs unless asked otherwise."""
    return ": fp32" in variant.name and "fp16" not in variant.name and " of the " not in variant.name


def launch(device: str, rows: int = 3, vocabulary: int = 5003, shared: bool = False) -> None:
    """Every variant once, on zeros: two blocks and a part of one in every row. ``shared``: with shared memory alone."""

    def call(options: str, function, *arguments):
        return None if shared and function == backend.BACKEND.gradient_ else function(*arguments)

    with torch.device(device):
        every_call(call, rows, vocabulary)


if __name__ == "__main__":
    if sys.argv[1:] == ["compile"]:
        found = compiled(noted(lambda: launch("cuda")))
        _check(found)
        print(f"{len(found)} variants compiled")
    elif sys.argv[1:2] == ["launch"]:
        launch("cuda", shared=sys.argv[2:] == ["shared"])
        torch.cuda.synchronize()
    else:
        print(document(measure(usual), counts(loops())))
