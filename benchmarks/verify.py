"""Whether the numbers that are timed are right: gradients against fp64 on a sub-sample of the very run that is timed.

d loss / d hidden of the two short responses is computed in fp64 over the whole vocabulary, and by eager PyTorch in the
operands' dtype, which is the yardstick. For dW, which sums over all tokens and chunks, there is an identity: with
dz = d loss / d logits, dX = dz W and dW = dz^T X, so X^T dX = dW^T W whatever the loss; it is checked on a few random
directions.

Axes: n sampled tokens, N tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from cases import Batch, Loss
from torch import Tensor

ENTRIES = 256  # of the vocabulary at a time: their fp64 copy stays in the cache
PEER_LIMIT = 0.5  # a peer's error is its own affair, and shown; above this it computes something else
ULPS = 4


@dataclass(frozen=True)
class Check:
    error: float  # norm-relative error of dX on the sample
    yardstick: float  # of eager PyTorch in the operands' dtype
    consistency: float | None  # of X^T dX = dW^T W; None with a frozen head
    wrong: str  # why it is not timed; empty if it is


def sample(batch: Batch) -> list[int]:
    """The short response of each row."""
    return [len(batch.lengths) // 2 - 1, len(batch.lengths) - 1]


def _rows(batch: Batch, hidden: Tensor) -> Tensor:
    flat = hidden.detach().flatten(0, 1)
    return torch.cat([flat[batch.responses[i]] for i in sample(batch)])


def _product(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x @ weight.T in ``dtype``, a few vocabulary entries at a time."""
    x, weight = x.to(dtype), weight.detach()
    return torch.cat([x @ block.to(dtype).t() for block in weight.split(ENTRIES)], -1)


def consistency(batch: Batch) -> float:
    """Relative distance of X^T dX M and dW^T W M for a random M [H, 8]."""
    x, d_x = (t.detach().flatten(0, 1).float() for t in (batch.hidden_s, batch.hidden_s.grad))
    m = torch.randn(x.shape[1], 8, generator=torch.Generator().manual_seed(0)).to(x.device)
    left = x.t() @ (d_x @ m)
    blocks = zip(batch.weight_s.grad.split(ENTRIES), batch.weight_s.detach().split(ENTRIES), strict=True)
    right = sum(d.float().t() @ (w.float() @ m) for d, w in blocks)
    return ((left - right).norm() / left.norm()).item()


class Truth:
    """fp64 gradients and eager PyTorch's errors of one batch, computed once per loss."""

    def __init__(self, batch: Batch):
        self.batch = batch
        self.products: dict[torch.dtype, list[Tensor]] = {}  # of the sampled tokens, student and teacher
        self.known: dict[tuple[str, str | None], tuple[Tensor, float]] = {}

    def gradient(self, loss: Loss, reduction: str | None, dtype: torch.dtype) -> Tensor:
        """d loss / d hidden [n, H] of the sampled responses with logits multiplied in ``dtype``."""
        batch = self.batch
        if dtype not in self.products:
            sides = ((batch.hidden_s, batch.weight_s), (batch.hidden_t, batch.weight_t))
            self.products[dtype] = [_product(_rows(batch, x), weight, dtype) for x, weight in sides]
        lengths, authors = ([values[i] for i in sample(batch)] for values in (batch.lengths, batch.authors))
        wide = torch.promote_types(dtype, torch.float32)

        def logits(product: Tensor) -> list[Tensor]:
            z = product.to(wide)
            z = z if batch.softcap is None else batch.softcap * torch.tanh(z / batch.softcap)
            return list(z.split(lengths if reduction != "tokens" else [sum(lengths)]))

        product_s, product_t = self.products[dtype]
        product_s = product_s.detach().requires_grad_()
        z_s, z_t = logits(product_s), logits(product_t)
        target = _rows(batch, batch.target[..., None])[:, 0]
        target = list(target.split([len(z) for z in z_s]))
        share = loss.count(lengths, authors, reduction) / loss.count(batch.lengths, batch.authors, reduction)
        (d_z,) = torch.autograd.grad(share * loss.formula(z_s, z_t, authors, target), product_s)
        blocks = zip(d_z.split(ENTRIES, -1), batch.weight_s.detach().split(ENTRIES), strict=True)
        return sum(d.to(wide) @ block.to(wide) for d, block in blocks).to(dtype).double()

    def of(self, loss: Loss, reduction: str | None) -> tuple[Tensor, float]:
        key = (loss.name, reduction)
        if key not in self.known:
            truth = self.gradient(loss, reduction, torch.float64)
            if not truth.norm() > 0:
                raise AssertionError(f"{loss.name}: its gradient is zero, a check against it would check nothing")
            eager = self.gradient(loss, reduction, self.batch.hidden_s.dtype)
            self.known[key] = truth, ((eager - truth).norm() / truth.norm()).item()
        return self.known[key]

    def check(self, loss: Loss, reduction: str | None, exact: bool) -> Check:
        """Of the gradients that the batch holds now."""
        batch = self.batch
        truth, yardstick = self.of(loss, reduction)
        error = ((_rows(batch, batch.hidden_s.grad).double() - truth).norm() / truth.norm()).item()
        trained = batch.weight_s.requires_grad
        balance = consistency(batch) if trained else None
        eps = torch.finfo(batch.hidden_s.dtype).eps
        limit = max(2 * yardstick, ULPS * eps) if exact else PEER_LIMIT
        wrong = ""
        if not error <= limit:
            wrong = f"wrong: gradient error {error:.1e}, allowed {limit:.1e} (eager PyTorch has {yardstick:.1e})"
        elif trained and not balance <= (max(2 * eps, 1e-3) if exact else PEER_LIMIT):
            wrong = f"wrong: dW does not belong to dX, relative distance {balance:.1e}"
        return Check(error, yardstick, balance, wrong)
