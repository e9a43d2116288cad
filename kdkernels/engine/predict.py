"""What the model of a GPU (gpu.py) predicts of a JSD with a trained head: computed from operations, bytes and counted
instructions, nothing measured.

    python -m kdkernels.engine.predict > docs/gpu-defaults.md

Axes: N tokens, C student rows of a chunk, T teacher rows, V vocabulary, H hidden.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from . import plan
from .gpu import HIDDEN, HIDDEN_SUMS, TILE, ChunkRows, Gpu, Products

MULTIPROCESSORS = {"A100": (108, 1.41e9), "H100": (132, 1.75e9), "H200": (132, 1.75e9), "B200": (148, 1.8e9)}  # and Hz
_CARDS = {"A100": "a100-80g", "H100": "h100", "H200": "h200", "B200": "b200"}
_ISSUED = 0.8  # share of the issue slots that a kernel of many warps fills
INSTRUCTIONS = 113  # per vocabulary entry, all sweeps of a JSD, in sm_90 code (docs/triton-resources.md, bf16 logits)
MODELS = ((1536, 5120, 151936), (4096, 4096, 128256), (2048, 4096, 32000), (2304, 3584, 256000), (3840, 5376, 262144))
_TOKENS = 16384


def known(name: str) -> Gpu:
    return Gpu.named(_CARDS[name])


@dataclass(frozen=True)
class Call:
    """A JSD of N tokens, forward and backward, bf16 operands, ``logits`` bytes a logit; ``budget`` in bytes.

    gpu: None is a CPU, whose seconds are not known. student, teacher: hidden sizes; 0: no teacher. trained: whether dW
    is wanted.
    """

    gpu: Gpu | None
    tokens: int
    student: int
    teacher: int
    vocabulary: int
    logits: int = 4
    budget: int | None = None
    trained: bool = True

    @cached_property
    def _costs(self) -> tuple[int, int, int]:
        """As Head.costs and loop.py have them: bytes whatever the chunk, of a student row, of a teacher row."""
        row = self.vocabulary * self.logits + 64
        fixed = 4 * min(self.tokens, 4096) * (math.ceil(self.vocabulary / 128) + 256) + self.tokens * plan.TOKEN_BYTES
        return fixed, row + 8 * self.student, (row + 2 * self.teacher) if self.teacher else 0

    @cached_property
    def planned_budget(self) -> int:
        if self.budget is not None:
            return self.budget
        sums = 4 * self.vocabulary * self.student if self.trained else 0
        return plan.default_budget(self._wanted, lambda: self.gpu.limit, *self._costs, self.tokens, sums)

    @property
    def _wanted(self) -> ChunkRows | None:
        products = Products(self.student, self.teacher, True, self.trained, self.logits)
        return self.gpu and self.gpu.rows(products)

    @cached_property
    def rows(self) -> ChunkRows:
        return ChunkRows(*plan.chunk_rows(self.planned_budget, *self._costs, self.tokens, self._wanted))

    @property
    def memory(self) -> int:
        """Bytes of logits and workspace; dW's fp32 sums, where there are several chunks, come on top."""
        fixed, row, teacher_row = self._costs
        return fixed + self.rows.student * row + self.rows.teacher * teacher_row

    def seconds(self) -> float:
        """Products and sweeps; dW's sums are rounded once, the scaling by a gradient of one costs nothing."""
        entries, pieces = self.vocabulary, _sizes(self.tokens, self.rows.student)
        total = 0.0
        for rows in pieces:
            total += self._product(rows, entries, self.student, self.logits)
            total += self._product(rows, self.student, entries, 4)
            if self.teacher:
                parts = _sizes(rows, self.rows.teacher)
                total += sum(self._product(n, entries, self.teacher, self.logits) for n in parts)
            if self.trained:
                total += self._add(rows, 2 if len(pieces) == 1 else 8)
        sums = 6 * entries * self.student / self.gpu.bandwidth if self.trained and len(pieces) > 1 else 0
        return total + sums + self._sweeps()

    def bare(self) -> float:
        """The four products alone with bf16 logits, in the best of four sizes of chunks, dW of each on its own."""
        return min(
            sum(
                self._product(n, self.vocabulary, self.student, 2) + self._product(n, self.vocabulary, self.teacher, 2)
                + self._product(n, self.student, self.vocabulary, 2) + self._add(n, 2)
                for n in _sizes(self.tokens, rows)
            )
            for rows in (512, 1024, 2048, 4096)
        )  # fmt: skip

    def _product(self, rows: int, columns: int, inner: int, out: int) -> float:
        computed = 2 * math.ceil(rows / TILE) * TILE * columns * inner / self.gpu.flops
        moved = (2 * inner * (rows + columns) + out * rows * columns) / self.gpu.bandwidth
        return max(computed, moved) + HIDDEN * min(computed, moved)

    def _add(self, rows: int, weight_bytes: int) -> float:
        computed = 2 * rows * self.vocabulary * self.student / self.gpu.flops
        moved = self.vocabulary * (weight_bytes * self.student + 2 * rows) / self.gpu.bandwidth
        return max(computed, moved) + HIDDEN_SUMS * min(computed, moved)

    def _sweeps(self) -> float:
        """Statistics of student and teacher, value, gradient: read once each, and twice, twice and written in bf16."""
        processors, clock = MULTIPROCESSORS[self.gpu.name]
        moved = (6 * self.logits + 2) / self.gpu.bandwidth
        return self.tokens * self.vocabulary * max(moved, INSTRUCTIONS / (processors * 128 * clock * _ISSUED))


_HEAD = f"""# Default chunks on GPUs

Computed by `python -m kdkernels.engine.predict`, a model of operations, bytes and counted instructions. **Nothing here
was measured on a GPU.** A JSD of {_TOKENS} tokens with a trained head, forward and backward, bf16 operands: rows
(tokens) of the student's chunks and the teacher's, memory of logits and workspace (dW's fp32 sums, 4 bytes a weight,
come on top), and time over that of the four bare products with bf16 logits; then that ratio with a `memory_budget` of
twice and four times the memory. `kd.info()["memory_budget"]` says what your GPU gets.

| GPU | student / teacher / vocabulary | logits | rows | memory | ratio | twice | four times |
|---|---|---|---|---|---|---|---|"""


def _sizes(tokens: int, rows: int) -> list[int]:
    return [each.stop - each.start for each in plan.split(0, tokens, rows, (), TILE)]


def _line(call: Call) -> str:
    twice, four = (replace(call, budget=k * call.memory) for k in (2, 4))
    ratios = [each.seconds() / call.bare() for each in (call, twice, four)]
    model = f"{call.student} / {call.teacher} / {call.vocabulary}"
    rows = f"{call.rows.student} / {call.rows.teacher}"
    figures = f"{call.memory / 1e9:.2f} GB | {ratios[0]:.2f} | {ratios[1]:.2f} | {ratios[2]:.2f}"
    return f"| {call.gpu.name} | {model} | {'fp32' if call.logits == 4 else 'bf16'} | {rows} | {figures} |"


def document() -> str:
    lines = [_HEAD]
    for name in _CARDS:
        for student, teacher, vocabulary in MODELS:
            for logits in (4, 2):
                lines.append(_line(Call(known(name), _TOKENS, student, teacher, vocabulary, logits)))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(document(), end="")
