"""The matrix products around the row kernels, and who computes them.

    logits   = hidden @ weight.T
    d hidden = d logits @ weight
    d weight = sum over chunks of d logits.T @ hidden

With 16-bit operands, logits may be asked for in fp32, and the sum over chunks is always in fp32. On CPUs the table
``_WHO`` decides whose products are used: torch's or those of csrc/.

Axes: C tokens of a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from . import fp16, memory

_WIDENED_ENTRIES = 1024  # vocabulary entries that are widened to fp32 at a time
_ADDED_ENTRIES = 512  # entries whose 16-bit products are added to fp32 sums at a time, so that these stay in the cache


class Torch:
    """torch's products. They round to the operands' dtype."""

    name = "torch"  # in kd.info()

    def workspace(self, width: int, operand: torch.dtype, logits: torch.dtype, trained: bool) -> tuple[int, int]:
        """Bytes that products with weights [V, width] take beside their outputs: fixed ones, and those for each token.

        They cover the products for logits and, if ``trained``, those for gradients.
        """
        if operand != logits or (trained and operand == torch.float16):
            return _WIDENED.workspace(width, operand, logits, trained)
        return _ADDED_ENTRIES * width * 4 if trained and operand.itemsize < 4 else 0, 0

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        """out [C, V] = hidden [C, H] @ weight [V, H].T + bias [V], in out's dtype: the operands' or wider.

        A wider ``out`` is for accuracy: with bf16 logits the gradient of a JSD is off by 4 to 23 %. torch's CPU
        products have no fp32 output for 16-bit operands. So the operands are widened, which takes about twice the time.
        """
        if out.dtype != hidden.dtype:
            _WIDENED.project(hidden, weight, bias, out)
        elif bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(bias, hidden, weight.t(), out=out)

    def extend(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        """out [C, V] += hidden [C, R] @ weight [V, R].T, in out's dtype: the operands' or wider."""
        if out.dtype != hidden.dtype:
            _WIDENED.extend(hidden, weight, out)
        else:
            out.addmm_(hidden, weight.t())

    def multiply(self, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """a @ b, in ``dtype``: theirs, or a wider one for what is still to be added to."""
        return torch.mm(a, b) if dtype in (None, a.dtype) else _WIDENED.multiply(a, b, dtype)

    def add(self, a: Tensor, b: Tensor, out: Tensor, first: bool) -> None:
        """out += a @ b, or out = a @ b if it is the ``first``; all of one dtype."""
        torch.mm(a, b, out=out) if first else out.addmm_(a, b)

    def add_column_sums(self, dz: Tensor, powers: Tensor | None, out: Tensor) -> None:
        """out [V] += the sum of the rows of dz [C, V], each times its power (fp16.py) if there are any; in out's dtype.

        On CPUs some entries at a time, because torch makes a wide copy of dz there.
        """
        step = _ADDED_ENTRIES if out.device.type == "cpu" else len(out)
        for first in range(0, len(out), step):
            entries = slice(first, first + step)
            part = dz[:, entries]
            out[entries] += part.sum(0, dtype=out.dtype) if powers is None else powers @ part.to(out.dtype)

    def accumulate(self, a: Tensor, b: Tensor, sums: Tensor, out: Tensor, first: bool, last: bool) -> None:
        """sums += a @ b in fp32, or sums = a @ b if it is the ``first``; if it is the ``last``, out = sums, rounded.

        The product is written to ``out`` and added from there, some entries at a time: adding all at once would make an
        fp32 copy of it. Products of fp16 operands may be too large for fp16, where many tokens push an entry the same
        way. So these operands are widened.
        """
        if out.dtype == torch.float16:
            _WIDENED.accumulate(a, b, sums, out, first, last)
            return
        torch.mm(a, b, out=out)
        for start in range(0, len(out), _ADDED_ENTRIES):
            entries = slice(start, start + _ADDED_ENTRIES)
            if first:
                sums[entries] = out[entries]
            else:
                sums[entries] += out[entries]
        if last:
            out.copy_(sums)


class Widened(Torch):
    """Products of 16-bit operands in fp32, for CPUs on which torch's 16-bit products are slow.

    The operands are widened some entries at a time. There, torch's own products run at 0.8 (dX), 5 (dW) and 12 GFLOP/s
    (logits), and its fp32 products at 60 to 90. torch also widens whole operands: 816 MiB beside a budget of 384.
    """

    name = "torch in fp32"

    def workspace(self, width: int, operand: torch.dtype, logits: torch.dtype, trained: bool) -> tuple[int, int]:
        # Fixed: the widened weights of a step, and their gradient. Each token: its hidden state or dX, and its logits
        # or dz of a step.
        itemsize = max(4, logits.itemsize)
        return (1 + trained) * _WIDENED_ENTRIES * width * itemsize, (width + _WIDENED_ENTRIES) * itemsize

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        dtype = torch.promote_types(out.dtype, torch.float32)
        hidden, narrow = hidden.to(dtype), out.dtype != dtype
        some = hidden.new_empty(len(out) if narrow else 0, _WIDENED_ENTRIES)
        for entries, wide in _widened(weight, dtype):
            z = some[:, : len(wide)] if narrow else out[:, entries]
            if bias is None:
                torch.mm(hidden, wide.t(), out=z)
            else:
                torch.addmm(bias[entries].to(dtype), hidden, wide.t(), out=z)
            if narrow:
                out[:, entries] = z

    def extend(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        dtype = torch.promote_types(out.dtype, torch.float32)
        hidden, some = hidden.to(dtype), hidden.new_empty((len(out), _WIDENED_ENTRIES), dtype=dtype)
        for entries, wide in _widened(weight, dtype):
            z = torch.mm(hidden, wide.t(), out=some[:, : len(wide)])
            out[:, entries] = z.add_(out[:, entries])

    def multiply(self, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        sums = torch.zeros(len(a), b.shape[1], device=a.device)
        for (_, columns), (_, rows) in zip(_widened(a.t()), _widened(b), strict=True):
            sums.addmm_(columns.t(), rows)
        return sums.to(dtype or a.dtype)

    def add(self, a: Tensor, b: Tensor, out: Tensor, first: bool) -> None:
        b, some = b.float(), torch.empty(_WIDENED_ENTRIES, b.shape[1], device=a.device)
        for entries, wide in _widened(a):
            product = torch.mm(wide, b, out=some[: len(wide)])
            out[entries] = product if first else product.add_(out[entries])

    def accumulate(self, a: Tensor, b: Tensor, sums: Tensor, out: Tensor, first: bool, last: bool) -> None:
        b = b.float()
        for entries, wide in _widened(a):
            sums[entries].addmm_(wide, b, beta=0 if first else 1)
        if last:
            out.copy_(sums)


def _widened(matrix: Tensor, dtype: torch.dtype = torch.float32) -> Iterator[tuple[slice, Tensor]]:
    """The rows of a matrix in ``dtype``, some at a time. All are written to one place, because fresh memory each time
    would leave the allocator with holes."""
    place = torch.empty_like(matrix[:_WIDENED_ENTRIES], dtype=dtype)
    for first in range(0, len(matrix), _WIDENED_ENTRIES):
        rows = slice(first, min(first + _WIDENED_ENTRIES, len(matrix)))
        yield rows, place[: rows.stop - first].copy_(matrix[rows])


class TensorCores(Torch):
    """Products of 16-bit operands on a GPU, summed and written in fp32.

    torch.mm and addmm take ``out_dtype`` together with ``out`` since torch 2.8, and an addend of that dtype since 2.10.
    """

    def workspace(self, width: int, operand: torch.dtype, logits: torch.dtype, trained: bool) -> tuple[int, int]:
        if logits == torch.float64:
            return super().workspace(width, operand, logits, trained)
        # dX in fp32; with fp16 also each token's hidden state times its power, in fp32 and rounded (WeightGradient)
        return 0, (6 if operand == torch.float16 else 4) * width if trained else 0

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        if out.dtype != torch.float32:  # the operands', or fp64 beside an fp64 student
            super().project(hidden, weight, bias, out)
            return
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
        if bias is not None:
            out += bias

    def extend(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        if out.dtype != torch.float32:
            super().extend(hidden, weight, out)
        else:
            torch.addmm(out, hidden, weight.t(), out_dtype=out.dtype, out=out)

    def multiply(self, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """a @ b, written in fp32 and then rounded to ``dtype``.

        For few rows and many entries cuBLAS computes several partial sums. torch by default lets it round them to the
        output's dtype before they are added.
        """
        sums = a.new_empty(len(a), b.shape[1], dtype=torch.float32)
        return torch.mm(a, b, out_dtype=sums.dtype, out=sums).to(dtype or a.dtype)

    def accumulate(self, a: Tensor, b: Tensor, sums: Tensor, out: Tensor, first: bool, last: bool) -> None:
        if first:
            torch.mm(a, b, out_dtype=sums.dtype, out=sums)
        else:
            torch.addmm(sums, a, b, out_dtype=sums.dtype, out=sums)
        if last:
            out.copy_(sums)

    def add_column_sums(self, dz: Tensor, powers: Tensor | None, out: Tensor) -> None:
        if powers is None:
            super().add_column_sums(dz, powers, out)
            return
        largest = powers.amax()
        shares = (powers / largest).to(dz.dtype)
        out += largest * torch.mm(shares[None], dz, out_dtype=out.dtype, out=out.new_empty(1, len(out)))[0]


class Native(Torch):
    """The products of csrc/gemm.h: of fp32, bf16 or fp16 operands, summed in fp32 and written in any of these."""

    name = "native"

    def workspace(self, width: int, operand: torch.dtype, logits: torch.dtype, trained: bool) -> tuple[int, int]:
        # The most that csrc/gemm_driver.h allocates. Each thread packs 32 KiB of weights and holds the fp32 sums of its
        # block:
        # - logits: 64 entries of every token; hidden states are widened to fp32, once for all threads;
        # - dW: 96 entries of up to 2048 of the width, and 256 packed tokens of these entries; all threads share the
        #   packed hidden states;
        # - dX: all threads together hold its sums; those that have the same tokens pack 256 entries of each.
        threads, padded = torch.get_num_threads(), width + 63
        fixed, row = threads * 32 * 1024, threads * 256 + (4 * width if operand.itemsize < 4 else 0)
        if trained:
            fixed += threads * 96 * 4 * (min(padded, 2048) + 256)
            row = threads * 256 + min(threads, math.ceil(width / 128)) * 1024 + 4 * padded
        return fixed, row

    def project(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
        rows = None if bias is None else bias.contiguous().expand(out.shape)
        torch.ops.kdkernels.gemm_(hidden, weight.t(), rows, out)

    def extend(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        torch.ops.kdkernels.gemm_(hidden, weight.t(), out, out)

    def multiply(self, a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        out = a.new_empty(len(a), b.shape[1], dtype=dtype)
        torch.ops.kdkernels.gemm_(a, b, None, out)
        return out

    def add(self, a: Tensor, b: Tensor, out: Tensor, first: bool) -> None:
        torch.ops.kdkernels.gemm_(a, b, None if first else out, out)

    def accumulate(self, a: Tensor, b: Tensor, sums: Tensor, out: Tensor, first: bool, last: bool) -> None:
        torch.ops.kdkernels.gemm_(a, b, None if first else sums, out if last else sums)


_TORCH, _TENSOR_CORES, _NATIVE, _WIDENED = Torch(), TensorCores(), Native(), Widened()

_F32, _BF16, _F16 = torch.float32, torch.bfloat16, torch.float16
_BY_RULE = "by rule, not measured"
# Who multiplies on CPUs, and why. The first line counts whose traits the CPU has (Backend.traits(): none without the
# native backend) and whose dtypes have the operands'. Measurements are of logits / dX / dW with 512 tokens and a width
# of 896: GFLOP/s on two threads, or shares of the peak, which registers_only() measures.
_WHO: tuple[tuple[set[str], set[torch.dtype], Torch, str], ...] = (
    ({"amx_bf16"}, {_BF16}, _TORCH, f"oneDNN multiplies bf16 with matrix tiles (AMX): {_BY_RULE}"),
    ({"amx_fp16"}, {_F16}, _TORCH, f"oneDNN multiplies fp16 with matrix tiles (AMX): {_BY_RULE}"),
    ({"intel"}, {_F32}, _TORCH, f"MKL takes the widest vectors of Intel's CPUs: {_BY_RULE}"),
    ({"arm"}, {_F32}, _TORCH, f"torch's libraries are made for Arm's CPUs: {_BY_RULE}"),
    ({"portable"}, {_F32}, _TORCH, f"torch's libraries have more than four lanes: {_BY_RULE}"),
    ({"avx512_bf16"}, {_F32}, _NATIVE, "419 / 449 / 374 against 180 / 201 / 208: MKL takes AVX2 on CPUs not Intel's"),
    ({"avx512_bf16"}, {_BF16}, _NATIVE, "913 / 919 / 933 against oneDNN's 815 / 732 / 764"),
    ({"avx512_bf16"}, {_F16}, _NATIVE, "widened while packed, at the speed of fp32; torch has no units for fp16"),
    ({"avx512"}, {_F32}, _NATIVE, "as with bf16 units: MKL takes AVX2 on CPUs not Intel's"),
    ({"avx512"}, {_BF16, _F16}, _NATIVE, "widened while packed, at the speed of fp32; torch has no units for them"),
    ({"avx2"}, {_F32}, _NATIVE, "84 / 86 / 89 % of the peak; MKL 75 / 85 / 96 (Zen 4), 31 / 47 / 39 (Zen 3)"),
    ({"avx2"}, {_BF16}, _NATIVE, "widened while packed: 93 / 95 / 89 % of fp32's peak; torch 6 / 0.4 / 2 (Zen 3)"),
    ({"avx2"}, {_F16}, _NATIVE, "widened while packed: 89 / 87 / 85 % of fp32's peak; torch 7 / 0.4 / 2 (Zen 3)"),
    ({"arm"}, {_BF16, _F16}, _NATIVE, f"widened while packed, at a speed near fp32's: {_BY_RULE}"),
    ({"portable"}, {_BF16, _F16}, _WIDENED, "1.0 to 1.2 times the time of fp32, four lanes of SSE2 2.7 to 3.2 times"),
    (set(), {_BF16, _F16}, _TORCH, "the native backend does not run, and oneDNN has units for them"),
    (set(), {_BF16, _F16}, _WIDENED, "the native backend does not run, and torch has no units for them"),
)


def who_multiplies(traits: frozenset[str], operand: torch.dtype) -> tuple[Torch, str]:
    """Whose products of operands of this dtype a CPU gets, and why."""
    narrow = operand.itemsize < 4
    for needed, operands, who, why in _WHO:
        if needed <= traits and operand in operands and not (who is _TORCH and narrow and torch_crawls(operand)):
            return who, why
    return _TORCH, "nobody else multiplies them"


def products(traits: frozenset[str], device: torch.device, operand: torch.dtype) -> Torch:
    """Who multiplies operands of this dtype, on a CPU with these traits."""
    if device.type == "cpu":
        return who_multiplies(traits, operand)[0]
    return _TENSOR_CORES if device.type == "cuda" and operand.itemsize < 4 else _TORCH


def torch_crawls(operand: torch.dtype) -> bool:
    """Whether torch multiplies CPU operands of this 16-bit dtype without units made for it, 5 to 100 times slower than
    fp32. Not cached, because anyone may switch oneDNN off."""
    return not (torch.backends.mkldnn.enabled and _has_units(operand))


@cache
def _has_units(operand: torch.dtype) -> bool:
    """Whether oneDNN multiplies CPU operands of this 16-bit dtype. torch asks the same before it hands them over.

    For bf16 the CPU needs AVX-512, for fp16 more than that, which only today's Xeons have.
    """
    name = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}.get(operand)
    asked = name and getattr(torch.ops.mkldnn, name, None)  # not in every build of torch
    return bool(asked and asked())


def column_sums_row(vocabulary: int) -> int:
    """Bytes that ``add_column_sums`` takes for each token."""
    return 4 * min(_ADDED_ENTRIES, vocabulary)


class WeightGradient:
    """The gradient of a head's weights: dW [V, H] = sum over chunks of dz.T @ hidden.

    Weights beyond ``vocabulary`` (padding) get 0. With 16-bit operands the sum needs ``accumulator``, a buffer [V, H]
    in fp32, the only one outside the memory budget. A single chunk of bf16 operands does without it. The gradient is
    ``gradient`` times ``factor``, which is 1 except with fp16 operands (fp16.py).
    """

    def __init__(self, products: Torch, weight: Tensor, vocabulary: int, chunks: int):
        self.products, self.chunks, self.added = products, chunks, 0
        self.gradient = memory.empty(weight.shape, weight.dtype, weight.device)
        self.real = self.gradient  # without the padding
        if vocabulary < weight.shape[0]:
            self.gradient[vocabulary:] = 0
            self.real = self.gradient[:vocabulary]
        self.factor: Tensor | float = 1.0
        summed = weight.dtype.itemsize < 4 and (chunks > 1 or weight.dtype == torch.float16)
        self.accumulator = memory.empty(self.real.shape, torch.float32, weight.device) if summed else None

    def add(self, dz: Tensor, hidden: Tensor, powers: Tensor | None = None) -> None:
        """Adds dz.T @ hidden of a chunk; dz [C, V], hidden [C, H]. The last chunk completes ``gradient``.

        With fp16 operands, ``powers`` [C] are what the rows of dz still have to be multiplied with.
        """
        first, last = self.added == 0, self.added == self.chunks - 1
        self.added += 1
        if self.accumulator is None:
            self.products.add(dz.t(), hidden, self.real, first)
        elif powers is None:
            self.products.accumulate(dz.t(), hidden, self.accumulator, self.real, first, last)
        else:
            hidden = self._in_one_unit(hidden, powers, first)
            self.products.accumulate(dz.t(), hidden, self.accumulator, self.real, first, False)
            if last:
                self.factor = self.factor * fp16.normalized(self.accumulator)
                self.real.copy_(self.accumulator)

    def _in_one_unit(self, hidden: Tensor, powers: Tensor, first: bool) -> Tensor:
        """hidden * powers / unit, in hidden's dtype.

        The unit is the largest power so far; the sums are kept in it too. ``factor`` is the unit.
        """
        unit = powers.amax()
        if not first:
            unit = torch.maximum(unit, self.factor)
            if unit.device.type != "cpu" or unit != self.factor:  # saves a pass; a GPU would have to sync
                self.accumulator.mul_(self.factor / unit)
        self.factor = unit
        return (hidden * (powers / unit)[:, None]).to(hidden.dtype)
