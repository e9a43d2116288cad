"""Whether launches past Triton's JIT (kernels/triton/launch.py) run the very kernels that the JIT itself would.

    python tests/triton_launches.py

Nothing is compiled or launched: a stand-in for Triton's compiler returns another object for each compilation it is
asked for, and notes how the object is run. Prints, as a line of JSON, how many launches of each kernel were past the
JIT, how many compiled kernels there were, how many launches were not those of the JIT, and who is heard; status 1 if a
launch was another one.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))  # kdkernels, installed or not

import torch
import triton.compiler
from triton import knobs

from kdkernels.kernels.triton import ahead as triton_ahead
from kdkernels.kernels.triton import backend, scale

DRAWS = 300  # per kernel
LAUNCHES = (
    backend._statistics,
    backend._candidates,
    backend._divergence,
    backend._scatter,
    backend._gradient,
    scale._scale,
)
MEMORY = torch.zeros(64, dtype=torch.uint8)
assert MEMORY.data_ptr() % 16 == 0
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64)
INTEGERS = (1, 2, 16, 17, 5003, 16400, 2**31 - 1, 2**31, 2**31 + 16, 2**40)
CONSTANTS = (True, False, 2, 64, 128, "jsd", "none", "student")
NUMBERS = (None, 1.0, 0.5, 1)
MODES = {"instrumentation_mode": ("", "consan")}
if hasattr(knobs.compilation, "fpsan_homomorphic_casts"):  # since Triton 3.9
    MODES["fpsan_homomorphic_casts"] = (False, True)
OPTIONS = {"warps": (4, 8), "capability": (90, 80), "debug": (False, True), **MODES}
ran: list[tuple] = []


class Compiled(triton.compiler.CompiledKernel):
    """What the stand-in for the compiler returns."""

    function = packed_metadata = None

    def __init__(self):
        pass

    def __del__(self):
        pass

    def launch_metadata(self, *_):
        return "metadata"

    @property
    def run(self):
        return lambda *arguments: ran.append((self, *arguments))


def pointer(pick: random.Random) -> torch.Tensor:
    """Of any type, at an address that is divisible by 16 or by the size of a number alone."""
    dtype = pick.choice(DTYPES)
    return MEMORY.view(dtype)[pick.choice((0, 1)) :]


def drawn(name: str, place: int, constants: list[int], pick: random.Random):
    if place in constants:
        return pick.choice(CONSTANTS)
    if name.endswith("_ptr"):
        return pointer(pick) if place == 0 or pick.random() < 0.9 else None
    return pick.choice(INTEGERS) if pick.random() < 0.6 else pick.choice(NUMBERS)


def launched(launch, warps: int, arguments: list) -> tuple:
    """The compiled object, and all that it was run with."""
    before = len(ran)
    launch(3, warps, *arguments)
    assert len(ran) == before + 1
    return ran[-1]


def by_jit(kernel):
    """A launch as it would be without ours."""
    return lambda programs, warps, *a: kernel[(programs,)](*a, num_warps=warps, enable_fp_fusion=False)


def compared(launch: backend.Launch, pick: random.Random) -> tuple[int, int, int]:
    """Draws whose neighbours differ in one thing -> (launches past the JIT, compiled kernels, not those of the JIT)."""
    kernel, direct, wrong, objects = launch.kernel, 0, 0, set()
    arguments, options = [], {}
    for number in range(DRAWS):
        if number % 20 == 0:
            arguments = [drawn(n, i, kernel.constexprs, pick) for i, n in enumerate(kernel.arg_names)]
            options = {name: values[0] for name, values in OPTIONS.items()}
        elif pick.random() < 0.8:
            place = pick.randrange(len(arguments))
            arguments[place] = drawn(kernel.arg_names[place], place, kernel.constexprs, pick)
        else:
            option = pick.choice(list(OPTIONS))
            options[option] = pick.choice(OPTIONS[option])
        with knobs.runtime.scope(), knobs.compilation.scope(), triton_ahead.stand_in(options["capability"]):
            knobs.runtime.debug = options["debug"]
            for name in MODES:
                setattr(knobs.compilation, name, options[name])
            launched(launch, options["warps"], arguments)
            past = launched(launch, options["warps"], arguments)  # it is kept by now
            asked = launched(by_jit(kernel), options["warps"], arguments)
        direct += past[7:10] == (None, None, None)  # what hooks get
        objects.add(id(past[0]))
        same = past[0] is asked[0] and past[1:7] == asked[1:7]  # grid, stream, function and its metadata
        wrong += not (same and all(a is b for a, b in zip(past[10:], asked[10:], strict=True)))
    return direct, len(objects), wrong


def heard(launch: backend.Launch) -> dict[str, bool]:
    """Whether the JIT launches where somebody listens, and we do again afterwards."""
    arguments = [drawn(n, i, launch.kernel.constexprs, random.Random(0)) for i, n in enumerate(launch.kernel.arg_names)]
    found, calls = {}, []

    def past_jit() -> bool:
        return launched(launch, 4, arguments)[7] is None

    with triton_ahead.stand_in(90):
        past_jit()
        found["before"] = past_jit()
        for name in ("launch_enter_hook", "launch_exit_hook"):
            chain = getattr(knobs.runtime, name)
            chain.add(calls.append)
            found[name] = not past_jit()
            chain.remove(calls.append)
        launch.kernel.add_pre_run_hook(lambda *_, **__: calls.append("before"))
        found["pre_run_hooks"] = not past_jit() and calls == ["before"]
        launch.kernel.pre_run_hooks.clear()
        with knobs.runtime.scope():
            knobs.runtime.launch_enter_hook = calls.append
            found["a plain function"] = not past_jit()
        found["afterwards"] = past_jit()
        arguments[0] = MEMORY.view(torch.int16)
        found["noted"] = len(triton_ahead.noted(lambda: launch(3, 4, *arguments))) == 1
    return found


def main() -> int:
    triton.compiler.compile = lambda *_, **__: Compiled()
    pick, report = random.Random(0), {}
    for launch in LAUNCHES:
        launch.kernel.cache_key  # noqa: B018 - to ask for it finds the globals
        direct, objects, wrong = compared(launch, pick)
        report[launch.kernel.fn.__name__] = {
            "direct": direct, "kernels": objects, "wrong": wrong, "globals": len(launch.kernel.used_global_vals),
            "heard": heard(launch),
        }  # fmt: skip
    print(json.dumps({"triton": triton.__version__, "kernels": report}))
    return any(found["wrong"] for found in report.values())


if __name__ == "__main__":
    raise SystemExit(main())
