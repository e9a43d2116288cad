"""What is measured: models, batches and losses.

Axes: N tokens, V vocabulary, H hidden, R responses, L length. A batch has two rows of N / 2 tokens, packed with
responses: row 0 was written by the teacher, row 1 by the student, as VCRD needs it (two prefixes, N / 2 tokens each).
The last response of a row is short, so that its gradient can be computed in fp64 (verify.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from unittest import mock

import torch
from torch import Tensor

import kdkernels as kd
from kdkernels import reference

SHORT = 16  # tokens of the last response of a row


@dataclass(frozen=True)
class Models:
    name: str
    student: int  # hidden sizes
    teacher: int
    vocabulary: int
    softcap: float | None = None


TINY = Models("tiny", 384, 512, 1003)
QWEN_SMALL = Models("Qwen2.5 0.5B / 1.5B", 896, 1536, 151936)
QWEN_WORDS = Models("Qwen2.5 0.5B / 1.5B, 32768 words", 896, 1536, 32768)
QWEN = Models("Qwen2.5 1.5B / 14B", 1536, 5120, 151936)
GEMMA = Models("Gemma2 2B / 9B", 2304, 3584, 256000, 30.0)
LLAMA = Models("Llama 3 1B / 8B", 2048, 4096, 128256)


# ---- losses ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """``objective`` is ours; ``formula(z_s, z_t, from_teacher, target)`` the same of lists of [L, V] logits."""

    name: str
    objective: Callable[[], torch.nn.Module]
    formula: Callable[..., Tensor]
    reduction: str = "responses"  # of the objective: "tokens", "prompts"
    by_response: bool = False  # the formula needs whole responses; else it is a mean of per-token values
    authors: str = "none"  # "teacher": all responses are the teacher's; "both": row 0 is, row 1 is not
    teacher: bool = True

    def count(self, lengths: list[int], authors: list[bool], reduction: str | None = None) -> int:
        """What the loss of these responses is divided by."""
        if (reduction or self.reduction) == "tokens":
            return sum(lengths)
        if self.reduction == "prompts":
            return max(sum(authors), len(authors) - sum(authors))
        return len(lengths)


def _gated(z_s, z_t, from_teacher, target):
    def of(s: Tensor, t: Tensor) -> Tensor:
        gate = reference.gate(reference.entropy(s), reference.entropy(t), 1.0)
        return (gate * reference.divergence(s, t, kd.JSD(0.9))).mean()

    return torch.stack([of(s, t) for s, t in zip(z_s, z_t, strict=True)]).mean()


def _tsd_kd(z_s, z_t, from_teacher, target):
    # The specification sorts, to be exact about ties; nobody who writes eager PyTorch would.
    with mock.patch.object(reference, "candidates", lambda z, k: z.topk(k).indices):
        return reference.tsd_kd(z_s, z_t)


LOSSES = {
    loss.name: loss
    for loss in (
        Loss("cross-entropy", kd.SFT, lambda s, t, w, y: reference.sft(s, y), reduction="tokens", teacher=False),
        Loss("forward KL", lambda: kd.GKD(0.0), lambda s, t, w, y: reference.gkd(s, t, 0.0)),
        Loss("JSD(0.9)", kd.GKD, lambda s, t, w, y: reference.gkd(s, t)),
        Loss("gated JSD", lambda: kd.TSDKD(k=1, indirect_weight=0.0, entropy_weight=0.0), _gated),
        Loss("SKL", kd.DistiLLM2, lambda s, t, w, y: reference.distillm2(s, t, [True] * len(s)), authors="teacher"),
        Loss("TSD-KD", kd.TSDKD, _tsd_kd, by_response=True),
        Loss(
            "VCRD",
            lambda: kd.VCRD(weighting="likelihood_ratio"),
            lambda s, t, w, y: reference.vcrd(s, t, w),
            reduction="prompts",
            by_response=True,
            authors="both",
        ),
    )
}
DISTILLATION = tuple(name for name in LOSSES if name != "cross-entropy")


# ---- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One set of inputs; every implementation of every loss on it is timed in turns with the bare GEMMs."""

    models: Models
    tokens: int
    losses: tuple[str, ...]
    implementations: tuple[str, ...]
    operand: str = "bfloat16"
    trained: bool = True
    response: int = 256
    seconds: float = 30.0  # of rounds, after the warm-up; at least 3 rounds

    @property
    def name(self) -> str:
        head = "trained" if self.trained else "frozen"
        return f"{self.models.name}, N {self.tokens}, {self.operand}, {head} head, responses of {self.response}"

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.operand)


@dataclass(frozen=True)
class Batch:
    hidden_s: Tensor  # [2, N / 2, H]
    weight_s: Tensor  # [V, H]
    hidden_t: Tensor
    weight_t: Tensor
    target: Tensor  # [2, N / 2]
    lengths: list[int]  # [R]
    authors: list[bool]  # [R] the teacher wrote it
    layout: kd.Layout
    softcap: float | None

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def first(self, tokens: int) -> Batch:
        """Hidden states of the first tokens only, for the bare GEMMs."""
        sides = {side: getattr(self, side).flatten(0, 1)[None, :tokens] for side in ("hidden_s", "hidden_t")}
        return replace(self, **sides)

    @property
    def responses(self) -> list[slice]:
        """Over the flattened tokens."""
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        return [slice(end - length, end) for end, length in zip(ends, self.lengths, strict=True)]


def row_lengths(tokens: int, response: int) -> list[int]:
    """Responses of ``response`` tokens that fill a row, the last one shortened by one of ``SHORT`` tokens."""
    full, rest = divmod(tokens, response)
    lengths = [response] * full + [rest] * (rest > 0)
    return [*lengths[:-1], lengths[-1] - SHORT, SHORT]


@torch.no_grad()
def plant(x_s: Tensor, w_s: Tensor, x_t: Tensor, w_t: Tensor, tokens: Tensor) -> None:
    """Gives the tokens that are checked the same 11 likeliest entries in both models, in other orders, clearly apart.

    Selections (top k, teacher's order, most uncertain tokens, opener) are discontinuous: near ties would let a rounding
    decide them. The student's raw logits there are 10, 10 + s, 10 + 2 s, ... with s of .5 and .6 at the two tokens of a
    short response that are the most uncertain, 1 elsewhere.
    """
    generator = torch.Generator().manual_seed(1)
    for i, token in enumerate(tokens.tolist()):
        ids = torch.randperm(len(w_s), generator=generator)[:11].to(w_s.device)
        order = torch.randperm(11, generator=generator)
        step = {5: 0.5, 11: 0.6}.get(i % SHORT, 1.0)
        for x, w, logits in ((x_s, w_s, 10.0 + step * torch.arange(11)), (x_t, w_t, 10.0 + order)):
            rows = w[ids].float()
            # the shortest x that has these logits
            x[token] = rows.t() @ torch.linalg.solve(rows @ rows.t(), logits.to(rows))


@lru_cache(maxsize=1)  # drawing them takes seconds on a CPU
def weights(models: Models, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Of student and teacher, for logits of standard deviation about 1 (2 with a soft-cap)."""
    torch.manual_seed(0)
    scale = 2.0 if models.softcap else 1.0
    empty = [torch.empty(models.vocabulary, h, dtype=dtype, device=device) for h in (models.student, models.teacher)]
    return [each.normal_(std=scale * each.shape[1] ** -0.5) for each in empty]


def batches(case: Case, device: str, count: int) -> list[Batch]:
    """``count`` batches over the same weights."""
    models, length = case.models, case.tokens // 2
    lengths = row_lengths(length, min(length, case.response))
    ids = torch.cat([torch.full((n,), i + 1) for i, n in enumerate(lengths)]).expand(2, -1)
    layout = kd.Layout.from_segments(ids)
    weight_s, weight_t = (each.detach() for each in weights(models, case.dtype, device))
    weight_s.requires_grad_(case.trained)
    torch.manual_seed(1)

    def hidden(width: int) -> Tensor:
        return torch.randn(2, length, width, device=device).to(case.dtype)

    checked = torch.cat([torch.arange(end - SHORT, end) for end in (length, 2 * length)])
    out = []
    for _ in range(count):
        target = torch.randint(models.vocabulary, (2, length), device=device)
        hidden_s, hidden_t = hidden(models.student), hidden(models.teacher)
        plant(hidden_s.flatten(0, 1), weight_s, hidden_t.flatten(0, 1), weight_t, checked)
        authors = [True] * len(lengths) + [False] * len(lengths)
        sides = (hidden_s.requires_grad_(), weight_s, hidden_t, weight_t)
        out.append(Batch(*sides, target, lengths * 2, authors, layout, models.softcap))
    return out


# ---- sets ------------------------------------------------------------------------------------------------------------

OURS = ("kdkernels",)
BOTH = ("kdkernels", "kdkernels, bf16 logits")
DENSE = ("eager PyTorch", "torch.compile", "checkpointed chunks")
LIGER = ("Liger JSD, compiled", "Liger JSD", "Liger Triton JSD")
TRL = ("TRL GKD", "TRL chunked JSD")
PEERS = (*DENSE, *LIGER, "TRL GKD", "torch linear_cross_entropy", "cut-cross-entropy")
ROOM = tuple(f"kdkernels in the memory of {name}" for name in ("torch.compile", *LIGER, "TRL GKD"))

THREE = ("JSD(0.9)", "TSD-KD", "VCRD")

SETS = {
    "tiny": [
        Case(TINY, 64, tuple(LOSSES), (*OURS, "kdkernels per token", *PEERS, "TRL chunked JSD"), "float32", seconds=0),
        Case(TINY, 128, THREE, (*OURS, "kdkernels, fp32 logits"), "bfloat16", response=64, seconds=0),
        Case(TINY, 64, ("JSD(0.9)",), OURS, "float32", trained=False, seconds=0),
    ],
    "cpu": [
        # the plan of the ten minutes: what has a limit comes first, and weights are drawn once for each dtype
        Case(QWEN_SMALL, 1024, ("JSD(0.9)",), OURS, "float32", seconds=0),
        Case(QWEN_SMALL, 1024, tuple(LOSSES), OURS, seconds=0),
        Case(QWEN_SMALL, 4096, THREE, OURS, seconds=0),
        Case(QWEN_SMALL, 256, ("cross-entropy", "JSD(0.9)"), (*OURS, *PEERS), seconds=0),
        Case(QWEN_SMALL, 1024, THREE, (*OURS, "kdkernels, fp32 logits"), trained=False, seconds=0),
        Case(QWEN_SMALL, 4096, ("TSD-KD",), OURS, response=2048, seconds=0),
    ],
    # CPUs on which torch crawls through 16-bit products: peers have fp32 operands
    "cpu-avx2": [
        Case(QWEN_SMALL, 512, ("JSD(0.9)", "TSD-KD"), OURS, "float32", seconds=0),
        Case(QWEN_SMALL, 512, ("JSD(0.9)", "TSD-KD"), OURS, seconds=0),
        Case(QWEN_SMALL, 256, ("cross-entropy", "JSD(0.9)"), (*OURS, *PEERS), "float32", seconds=0),
        Case(QWEN_SMALL, 512, ("JSD(0.9)",), (*OURS, "kdkernels, fp32 logits"), trained=False, seconds=0),
        Case(QWEN_SMALL, 512, ("JSD(0.9)",), OURS, "float16", seconds=0),
        Case(QWEN_SMALL, 2048, ("JSD(0.9)", "TSD-KD"), OURS, "float32", seconds=0),
    ],
    # make bench-compare: one loss at a time, so that the bare GEMMs of a round are those just before it
    "compare": [
        *(Case(QWEN_WORDS, 256, (name,), OURS, "float32", seconds=20) for name in ("JSD(0.9)", "TSD-KD")),
        *(Case(QWEN_WORDS, 256, (name,), OURS, seconds=20) for name in ("cross-entropy", *THREE)),
        Case(QWEN_WORDS, 256, ("JSD(0.9)",), ("kdkernels, fp32 logits",), trained=False, seconds=20),
    ],
    "readme": [Case(QWEN_SMALL, 512, ("cross-entropy", "JSD(0.9)", "TSD-KD"), (*OURS, *PEERS), seconds=0)],
    "trl": [
        Case(QWEN_WORDS, 512, ("JSD(0.9)",), (*OURS, *TRL), "float32", seconds=0),
        Case(QWEN_SMALL, 512, ("JSD(0.9)",), (*OURS, *TRL), seconds=0),
    ],
    "cpu-fp32": [Case(QWEN_SMALL, 4096, ("JSD(0.9)", "TSD-KD"), OURS, "float32", seconds=0)],
    "gpu": [
        # what is wanted most comes first: what has a limit, the frozen head, the other losses, the peers, other shapes
        Case(QWEN, 16384, ("JSD(0.9)", "TSD-KD"), BOTH, response=512, seconds=10),
        Case(QWEN, 16384, THREE, BOTH, trained=False, response=512, seconds=6),
        Case(QWEN, 16384, tuple(n for n in LOSSES if n not in ("JSD(0.9)", "TSD-KD")), BOTH, response=512, seconds=10),
        Case(QWEN, 16384, ("JSD(0.9)", "TSD-KD"), (*PEERS, *ROOM), response=512, seconds=15),
        *(Case(QWEN, n, ("JSD(0.9)", "TSD-KD"), BOTH, response=512, seconds=4) for n in (4096, 65536, 512, 2048)),
        Case(QWEN, 16384, ("JSD(0.9)", "TSD-KD"), BOTH, response=8192, seconds=4),
        Case(GEMMA, 8192, ("cross-entropy", *THREE), BOTH, response=512, seconds=6),
        Case(LLAMA, 8192, ("cross-entropy", *THREE), BOTH, response=512, seconds=6),
        Case(QWEN_SMALL, 8192, THREE, BOTH, response=512, seconds=4),
        Case(QWEN, 16384, ("cross-entropy", "VCRD"), PEERS, response=512, seconds=8),
        *(Case(QWEN, n, ("JSD(0.9)",), PEERS, response=512, seconds=6) for n in (4096, 65536)),
        *(Case(models, 8192, ("JSD(0.9)",), PEERS, response=512, seconds=6) for models in (GEMMA, LLAMA)),
        *(Case(QWEN, n, ("JSD(0.9)", "TSD-KD"), BOTH, response=512, seconds=4) for n in (8192, 32768)),
        Case(QWEN, 16384, THREE, LIGER, trained=False, response=512, seconds=6),
        *(Case(QWEN, n, ("JSD(0.9)", "TSD-KD"), PEERS, response=512, seconds=6) for n in (512, 2048, 8192, 32768)),
    ],
}
