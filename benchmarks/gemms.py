"""The bare GEMMs: the products no implementation can do without, on the same operands, and what they count.

Student logits, teacher logits, dX, and dW with a trained head, over chunks of 512 to 4096 rows, the fastest taken.
Outputs are in the operands' dtype and in memory that is touched already; a chunk's dW overwrites that of the chunk
before. That is less than any implementation has to do.

Where torch crawls through 16-bit products (a CPU without units for them) the yardstick is the same products of fp32
operands, which are ready beforehand.

Axes: N tokens, C rows of a chunk, V vocabulary, H hidden.
"""

from __future__ import annotations

import torch
from cases import Batch, Case
from torch import Tensor

from kdkernels.compute import gemm, memory

ROWS = (512, 1024, 2048, 4096)


def candidates(tokens: int) -> list[int]:
    """Chunk sizes worth trying: no chunk larger than the batch."""
    return sorted({min(rows, tokens) for rows in ROWS})


def yardstick(operand: torch.dtype, device: str) -> torch.dtype:
    """Of the bare GEMMs: the operands' own dtype, if torch can multiply it in reasonable time."""
    crawls = device == "cpu" and operand.itemsize < 4 and gemm.torch_crawls(operand)
    return torch.float32 if crawls else operand


class BareGemms:
    """Called with a batch of the same shapes and the rows of a chunk, multiplies."""

    def __init__(self, batch: Batch):
        device = batch.weight_s.device
        self.dtype = yardstick(batch.weight_s.dtype, device.type)
        self.weights = [weight.detach().to(self.dtype) for weight in (batch.weight_s, batch.weight_t)]
        self.d_x = torch.zeros_like(batch.hidden_s.detach().flatten(0, 1), dtype=self.dtype)
        self.d_w = None
        if batch.weight_s.requires_grad:
            self.d_w = memory.empty(batch.weight_s.shape, self.dtype, device).zero_()
        for z in self._logits(batch, max(candidates(batch.tokens))):
            z.zero_()

    def _logits(self, batch: Batch, rows: int) -> list[Tensor]:
        """Of student and teacher, [C, V], in the memory that kdkernels uses as well."""
        sizes = [((rows, len(batch.weight_s)), self.dtype)] * 2
        return memory.matrices(sizes, batch.weight_s.device)

    @torch.no_grad()
    def __call__(self, batch: Batch, rows: int, teacher: bool) -> None:
        x_s, x_t = (hidden.flatten(0, 1).to(self.dtype) for hidden in (batch.hidden_s, batch.hidden_t))
        w_s, w_t = self.weights
        z_s, z_t = self._logits(batch, rows)
        for first in range(0, len(x_s), rows):
            chunk = slice(first, min(first + rows, len(x_s)))
            z = z_s[: chunk.stop - first]
            torch.mm(x_s[chunk], w_s.t(), out=z)
            if teacher:
                torch.mm(x_t[chunk], w_t.t(), out=z_t[: chunk.stop - first])
            torch.mm(z, w_s, out=self.d_x[chunk])
            if self.d_w is not None:
                torch.mm(z.t(), x_s[chunk], out=self.d_w)


def flops(case: Case, teacher: bool) -> int:
    """Of the bare GEMMs: 2 per multiply-add, whatever an implementation really does."""
    student = 2 * case.tokens * case.models.vocabulary * case.models.student
    other = 2 * case.tokens * case.models.vocabulary * case.models.teacher if teacher else 0
    return student * (3 if case.trained else 2) + other


def bytes_moved(case: Case, teacher: bool, rows: int) -> int:
    """Main-memory traffic of chunks of ``rows`` with logits in the operands' dtype, each operand once per product.

    Every chunk reads the student's weights twice (logits, dX), the teacher's once, and reads and writes dW. Logits are
    written once and read by three sweeps; the gradient overwrites the student's, and two products read it.
    """
    m, size = case.models, case.dtype.itemsize
    chunks = -(-case.tokens // rows)
    weights = chunks * m.vocabulary * (m.student * (4 if case.trained else 2) + (m.teacher if teacher else 0))
    hidden = case.tokens * (m.student * (3 if case.trained else 2) + (m.teacher if teacher else 0))
    products = 2 if case.trained else 1
    logits = case.tokens * m.vocabulary * (1 + 3 + 1 + products + (4 if teacher else 0))
    return size * (weights + hidden + logits)
