"""Launches of kernels, past Triton's JIT where it has compiled what is asked for.

The JIT's own ``kernel[grid](...)`` takes 10 to 13 microseconds. Half of them describe the launch in text, by which the
JIT finds what it compiled, and prepare what hooks would get. Here compiled kernels are kept under what the JIT
specialises on, which its own binder says for every launch: type, constant and alignment of each argument. So the key is
as fine as the JIT's, whatever its rules are. The options that ``JITFunction.run`` adds are in ``_key``. The one thing
that is left out is its check that globals have not changed: these kernels read none.
"""

from __future__ import annotations

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

# Tritons whose JITFunction.run was read and does what is here. With others it launches itself.
_READ = ("3.6.0", "3.7.0", "3.7.1", "3.8.0", "3.9.0")


class Launch:
    """Launches so many programs of a kernel, on the device of its first argument.

    Arguments come by position, in the order of the kernel's parameters: with names Triton's JIT takes a third longer.
    Multiply-adds are fused where the kernel says so.
    """

    def __init__(self, kernel):
        self.kernel = kernel
        # only arguments with a stride, which are rows of logits, may have gaps between their rows
        names = kernel.arg_names
        found = [(place, name.removesuffix("_ptr")) for place, name in enumerate(names) if name.endswith("_ptr")]
        self.contiguous = [(place, name) for place, name in found if f"{name}_stride" not in names]
        # false in the interpreter, too
        self.direct = isinstance(kernel, JITFunction) and triton.__version__ in _READ
        self.compiled: dict[tuple, CompiledKernel] = {}

    def __call__(self, programs: int, warps: int, *arguments) -> None:
        if programs == 0:
            return
        for place, name in self.contiguous:
            tensor = arguments[place]
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name}: expected a contiguous tensor, got strides {tensor.stride()}")
        with torch.cuda.device_of(arguments[0]):
            key = self._key(warps, arguments) if self.direct and not self._hooked() else None
            found = self.compiled.get(key)
            if found:
                stream = driver.active.get_current_stream(key[0])
                found.run(programs, 1, 1, stream, found.function, found.packed_metadata, None, None, None, *arguments)
                return
            found = self.kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=False)
            if key and isinstance(found, CompiledKernel):  # None where a hook wanted no compilation
                self.compiled[key] = found

    def _key(self, warps: int, arguments: tuple) -> tuple:
        """All that decides which compiled kernel the JIT would launch."""
        device = driver.active.get_current_device()
        _, specialization, _ = self.kernel.device_caches[device][-1](*arguments)
        compilation = knobs.compilation
        options = compilation.instrumentation_mode, getattr(compilation, "fpsan_homomorphic_casts", None)
        return device, warps, knobs.runtime.debug, options, tuple(specialization)

    def _hooked(self) -> bool:
        """Whether somebody wants to hear of launches or changes how kernels are compiled: the JIT tells them."""
        runtime = knobs.runtime
        watched = (runtime.launch_enter_hook, runtime.launch_exit_hook)
        return bool(
            self.kernel.pre_run_hooks
            or any(hook is not None and getattr(hook, "calls", True) for hook in watched)
            or getattr(runtime, "add_stages_inspection_hook", None)
        )
