"""What row kernels take and give. Axes: C tokens of a chunk, V vocabulary, K candidates, J ids per token."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class Summary:
    """What ``stats`` and ``top_indices`` (Rows) say of each token."""

    stats: Tensor
    top_indices: Tensor

    @property
    def max(self) -> Tensor:
        return self.stats[:, 0]

    @property
    def log_sum(self) -> Tensor:
        return self.stats[:, 1]

    @property
    def entropy(self) -> Tensor:
        return self.stats[:, 2]

    @property
    def lse(self) -> Tensor:
        return self.max + self.log_sum

    @property
    def argmax(self) -> Tensor:
        return self.top_indices[:, 0]

    def log_prob(self, z: Tensor) -> Tensor:
        """log-probabilities of logits z [C, J] of these tokens."""
        return (z - self.stats[:, :1]) - self.stats[:, 1:2]


@dataclass(eq=False)
class Rows(Summary):
    """The logits of a chunk with their statistics; slicing takes tokens.

    ``logits`` [C, V] is what the lm_head GEMM wrote; z = softcap * tanh(scale * logits / softcap) is what everything
    else is computed from. ``stats`` [C, 4 or more], float32 (float64 for float64 logits): max z, log-sum of
    exp(z - max), entropy (nats), log-sum of exp((z - max) / temperature); what follows is the backend's own. max and
    log-sum stay apart because their sum, rounded, loses the entropy at |z| ~ 1e4.
    """

    logits: Tensor
    scale: float
    softcap: float | None
    stats: Tensor
    top_values: Tensor  # [C, K] largest z, descending, ties to the smaller index; K >= 1
    top_indices: Tensor  # [C, K]
    gathered: Tensor | None  # [C, J] z at the ids asked for

    def __getitem__(self, tokens: slice) -> Rows:
        if tokens == slice(0, self.stats.shape[0]):
            return self
        gathered = None if self.gathered is None else self.gathered[tokens]
        stats, values, indices = self.stats[tokens], self.top_values[tokens], self.top_indices[tokens]
        return Rows(self.logits[tokens], self.scale, self.softcap, stats, values, indices, gathered)


@dataclass(eq=False)
class Coefficients:
    """What multiplies each token's terms in the gradient

        d loss / dz = divergence * dD/dz + entropy * dH/dz + softmax * q + (scatter added at ids)

    ``dense`` [3, C] holds divergence, entropy and softmax; ``ids`` [C, S] and ``scatter`` [C, S] the sparse part,
    which carries the -1 of a cross-entropy and the Plackett-Luce gradient.
    """

    dense: Tensor
    ids: Tensor
    scatter: Tensor
