"""Who computes the losses: kdkernels, and everything else people use. One small class each.

``missing(case, loss, device)`` says why it cannot run (empty: it can), ``forward(batch, loss)`` gives the scalar loss
whose ``backward()`` fills the gradients, ``reduction(loss)`` what it is a mean of where the objective has another.
"""

from __future__ import annotations

import importlib
from functools import cache, partial

import torch
from cases import TINY, Batch, Case, Loss
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kdkernels as kd


class Implementation:
    name: str
    losses: tuple[str, ...] | None = None  # None: all
    module: str | None = None  # to be imported
    devices: tuple[str, ...] = ("cpu", "cuda")
    softcap = True  # supports one
    compiles = False  # the first call is not what later calls are
    exact = False  # has to be as accurate as eager PyTorch; others are let through up to verify.PEER_LIMIT

    def reduction(self, loss: Loss) -> str | None:
        return "tokens" if not loss.by_response else None

    def missing(self, case: Case, loss: Loss, device: str) -> str:
        if self.losses is not None and loss.name not in self.losses:
            return f"does not compute {loss.name}"
        if device not in self.devices:
            return f"does not run on {device}"
        if case.models.softcap and not self.softcap:
            return "has no soft-cap"
        if self.module is not None:
            try:
                importlib.import_module(self.module)
            except Exception as error:  # a broken installation counts as missing, by name
                return f"missing ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
        return ""

    def forward(self, batch: Batch, loss: Loss) -> Tensor:
        raise NotImplementedError


def left_out_of_the_dry_run(case: Case) -> str:
    """Compiling takes longer than all the rest of it."""
    return "left out of the dry run" if case.models is TINY else ""


# ---- kdkernels -------------------------------------------------------------------------------------------------------


def heads(batch: Batch, loss: Loss) -> tuple[kd.Head, kd.Head | None]:
    student = kd.Head(batch.hidden_s, batch.weight_s, softcap=batch.softcap)
    return student, kd.Head(batch.hidden_t, batch.weight_t, softcap=batch.softcap) if loss.teacher else None


class Ours(Implementation):
    exact = True

    def __init__(self, name: str = "kdkernels", logits: torch.dtype | None = None, memory_budget: int | None = None):
        self.name, self.logits, self.memory_budget = name, logits, memory_budget

    def reduction(self, loss: Loss) -> None:
        return None

    def forward(self, batch: Batch, loss: Loss) -> Tensor:
        options = {"memory_budget": self.memory_budget, "logits_dtype": self.logits}
        if not loss.teacher:
            options["target"] = batch.target
        if loss.authors != "none":
            options["from_teacher"] = torch.tensor([True, loss.authors == "teacher"])
        return loss.objective()(*heads(batch, loss), batch.layout, **options).loss


class PerToken(Implementation):
    """The functions that return one value per token and recompute the logits in the backward."""

    name, exact = "kdkernels per token", True
    losses = ("cross-entropy", "forward KL", "JSD(0.9)", "SKL")

    def forward(self, batch: Batch, loss: Loss) -> Tensor:
        student, teacher = heads(batch, loss)
        if teacher is None:
            return kd.cross_entropy(student, batch.target).mean()
        divergence = {"forward KL": kd.ForwardKL(), "JSD(0.9)": kd.JSD(0.9), "SKL": kd.SkewKL(0.1)}[loss.name]
        return kd.divergence(student, teacher, divergence).mean()


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------


def logits(hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
    """The full logits, multiplied in the operands' dtype and widened to at least fp32, as models do it."""
    z = hidden @ weight.t()
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def value(loss: Loss, batch: Batch, responses: list[int], softcap: float | None) -> Tensor:
    """The formula of some responses' tokens: of each response, or of all tokens together if that is the same mean."""
    slices = batch.responses
    if loss.by_response:
        groups = [[slices[i]] for i in responses]
        authors = [batch.authors[i] for i in responses]
    else:
        groups, authors = [[slices[i] for i in responses]], [True]

    def side(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        flat = hidden.flatten(0, 1)
        whole = len(responses) == len(slices)
        z = logits(flat if whole else torch.cat([flat[slices[i]] for i in responses]), weight, softcap)
        sizes = [sum(s.stop - s.start for s in group) for group in groups]
        return list(z.split(sizes))

    z_s = side(batch.hidden_s, batch.weight_s)
    z_t = side(batch.hidden_t, batch.weight_t) if loss.teacher else z_s
    target = [torch.cat([batch.target.flatten()[s] for s in group]) for group in groups]
    return loss.formula(z_s, z_t, authors, target)


class Eager(Implementation):
    name = "eager PyTorch"

    def forward(self, batch: Batch, loss: Loss) -> Tensor:
        return value(loss, batch, list(range(len(batch.lengths))), batch.softcap)


class Compiled(Eager):
    """torch.compile of the very same, for losses that need no loop over responses: it would unroll that."""

    name, compiles = "torch.compile", True

    def missing(self, case: Case, loss: Loss, device: str) -> str:
        if loss.by_response:
            return "would unroll the loop over responses"
        return super().missing(case, loss, device) or left_out_of_the_dry_run(case)

    def forward(self, batch: Batch, loss: Loss) -> Tensor:
        return _compiled(loss)(batch, list(range(len(batch.lengths))), batch.softcap)


@cache
def _compiled(loss: Loss):
    torch._dynamo.config.recompile_limit = 64  # beyond it, it would run eager PyTorch without a word: 8 shapes
    return torch.compile(partial(value, loss), dynamic=False)


class Checkpointed(Implementation):
    """What people write themselves: one response at a time, its logits recomputed in the backward."""

    name = "checkpointed chunks"

    def forward(self, batch: Batch, loss: Loss) -> Tensor:
        reduction = self.reduction(loss)
        total, whole = 0.0, loss.count(batch.lengths, batch.authors, reduction)
        for i, length in enumerate(batch.lengths):
            share = loss.count([length], [batch.authors[i]], reduction) / whole
            total = total + share * checkpoint(value, loss, batch, [i], batch.softcap, use_reentrant=False)
        return total


# ---- other libraries -------------------------------------------------------------------------------------------------


class LigerChunked(Implementation):
    """Chunks of 1024 tokens; asked for the soft loss only (its default adds half a hard one)."""

    losses, module, softcap = ("JSD(0.9)",), "liger_kernel.chunked_loss", False

    def __init__(self, compiled: bool):
        self.compiles = compiled
        self.name = "Liger JSD, compiled" if compiled else "Liger JSD"

    def missing(self, case: Case, loss: Loss, device: str) -> str:
        dry = left_out_of_the_dry_run(case) if self.compiles else ""
        return super().missing(case, loss, device) or dry

    def forward(self, batch: Batch, loss: Loss) -> Tensor:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.9, compiled=self.compiles)
        flat = (batch.hidden_s.flatten(0, 1), batch.weight_s, batch.hidden_t.flatten(0, 1), batch.weight_t)
        return module(*flat, batch.target.flatten())


class LigerTriton(Implementation):
    name, losses, module, softcap = "Liger Triton JSD", ("JSD(0.9)",), "liger_kernel.transformers.functional", False
    devices = ("cuda",)

    def forward(self, batch: Batch, loss: Loss) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_jsd

        flat = (batch.hidden_s.flatten(0, 1), batch.weight_s, batch.hidden_t.flatten(0, 1), batch.weight_t)
        return liger_fused_linear_jsd(*flat, jsd_beta=0.9)


class TrlGkd(Implementation):
    """GKDTrainer's loss on the logits in the models' dtype, as the trainer calls it."""

    name, losses, module = "TRL GKD", ("JSD(0.9)",), "trl.experimental.gkd"
    softcap = False

    def forward(self, batch: Batch, loss: Loss) -> Tensor:
        from trl.experimental.gkd import GKDTrainer

        z_s, z_t = batch.hidden_s @ batch.weight_s.t(), batch.hidden_t @ batch.weight_t.t()
        return GKDTrainer.generalized_jsd_loss(z_s, z_t, labels=batch.target, beta=0.9)


class TrlChunked(Implementation):
    """DistillationTrainer's loss from hidden states, 256 rows at a time."""

    name, losses, module = "TRL chunked JSD", ("JSD(0.9)",), "trl.trainer.distillation_trainer"

    def forward(self, batch: Batch, loss: Loss) -> Tensor:
        from trl.trainer.distillation_trainer import _chunked_divergence_loss as chunked

        operands = batch.hidden_s, batch.hidden_t, batch.weight_s, batch.weight_t
        caps = {f"{who}_final_logit_softcapping": batch.softcap for who in ("student", "teacher")}
        return chunked(*operands, torch.ones_like(batch.target), beta=0.9, **caps)[0]


class TorchCrossEntropy(Implementation):
    name, losses, softcap = "torch linear_cross_entropy", ("cross-entropy",), False

    def missing(self, case: Case, loss: Loss, device: str) -> str:
        if not hasattr(torch.nn.functional, "linear_cross_entropy"):
            return f"missing (torch {torch.__version__} does not have it)"
        return super().missing(case, loss, device)

    def forward(self, batch: Batch, loss: Loss) -> Tensor:
        # Without options it materialises all logits. Its own choice is N H / V rows a chunk: on a CPU with 256 tokens
        # that is one row, and twenty times slower than 256.
        hidden = batch.hidden_s.flatten(0, 1)
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=None if hidden.is_cuda else 256)
        return torch.nn.functional.linear_cross_entropy(hidden, batch.weight_s, batch.target.flatten(), options=options)


class CutCrossEntropy(Implementation):
    name, losses, module = "cut-cross-entropy", ("cross-entropy",), "cut_cross_entropy"
    compiles = True

    def missing(self, case: Case, loss: Loss, device: str) -> str:
        dry = left_out_of_the_dry_run(case) if device == "cpu" else ""  # there it is a torch.compile
        return super().missing(case, loss, device) or dry

    def forward(self, batch: Batch, loss: Loss) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if batch.hidden_s.is_cuda else "torch_compile"
        hidden = batch.hidden_s.flatten(0, 1)
        return linear_cross_entropy(hidden, batch.weight_s, batch.target.flatten(), softcap=batch.softcap, impl=impl)


IMPLEMENTATIONS: dict[str, Implementation] = {
    each.name: each
    for each in (
        Ours(),
        Ours("kdkernels, bf16 logits", torch.bfloat16),
        Ours("kdkernels, fp32 logits", torch.float32),
        PerToken(),
        Eager(),
        Compiled(),
        Checkpointed(),
        LigerChunked(compiled=True),
        LigerChunked(compiled=False),
        LigerTriton(),
        TrlGkd(),
        TrlChunked(),
        TorchCrossEntropy(),
        CutCrossEntropy(),
    )
}
IN_THE_MEMORY_OF = "kdkernels in the memory of "  # and a peer's name: with that peer's extra peak as memory_budget
