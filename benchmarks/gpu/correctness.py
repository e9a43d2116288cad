"""Step 2: the row kernels at full size against the specification (kdkernels/reference.py) in fp64, then random cases.

    correctness.py 3 14      this process's share, the third of 14: what takes the time is compiling

The yardstick is the specification in fp32 on the same device: a kernel's error may be three times that, or 5e-6, and
what rounding its output adds; of a value, 4 ulp of a log-probability near 1 nat as well, which a divergence of nearly
equal distributions is less than. `make test` has the rest of what kernels promise, at sizes that an interpreter bears.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from findings import DEVICE, DRY, VOCABULARY, attempt, dtype_name, left, record
from torch import Tensor

import kdkernels as kd
from kdkernels import reference
from kdkernels.kernels import Coefficients, backend_for

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
DIVERGENCES = (kd.JSD(0.9), kd.ForwardKL(), kd.ReverseKL(), kd.SkewKL(0.1), kd.SkewReverseKL(0.1))
ODD = 997 if DRY else 151665
IDS = 11
NATS = 4 * torch.finfo(F32).eps


@dataclass(frozen=True)
class Case:
    """Rows of logits of both models, random coefficients of every term, and how they are transformed."""

    divergence: kd.divergences.Divergence = DIVERGENCES[0]
    entries: int = VOCABULARY
    rows: int = 1 if DRY else 5
    dtype: torch.dtype = F32
    out: torch.dtype = F32
    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0
    spread: float = 3.0  # standard deviation of the logits
    seed: int = 0

    @property
    def name(self) -> str:
        changed = {"T": self.temperature, "soft-cap": self.softcap, "scale": self.scale, "spread": self.spread}
        options = "".join(f", {key} {value:g}" for key, value in changed.items() if value is not None)
        dtypes = f"{dtype_name(self.dtype)} to {dtype_name(self.out)}"
        return f"{self.divergence.name}, {self.rows} x {self.entries}, {dtypes}{options}"

    def draw(self) -> tuple[Tensor, Tensor, Coefficients]:
        g = torch.Generator(device=DEVICE).manual_seed(self.seed)
        x_s, x_t = (
            (self.spread * torch.randn(self.rows, self.entries, device=DEVICE, generator=g)).to(self.dtype)
            for _ in "st"
        )
        ids = torch.randint(0, self.entries, (self.rows, IDS), device=DEVICE, generator=g)
        ids[:, 3] = ids[:, 2]
        dense, scatter = (torch.randn(*size, device=DEVICE, generator=g) for size in ((3, self.rows), ids.shape))
        return x_s, x_t, Coefficients(dense, ids, scatter)

    def kernels(self, x_s: Tensor, x_t: Tensor, c: Coefficients) -> tuple[Tensor, Tensor]:
        """Value and gradient, which lies over a copy of the logits."""
        backend, x = backend_for(x_s.device, self.dtype), x_s.clone()
        s, t = (backend.statistics(z, self.scale, self.softcap, self.temperature, 1, None) for z in (x, x_t))
        value, sums = backend.divergence(s, t, self.divergence, self.temperature)
        out = x.view(self.out)[:, : self.entries]
        backend.gradient_(s, t, self.divergence, self.temperature, sums, c, out)
        return value, out

    def specification(self, x_s: Tensor, x_t: Tensor, c: Coefficients, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        z_s, z_t = (self._z(x.to(dtype)) for x in (x_s, x_t))
        dense, scatter = (x.to(dtype) for x in (c.dense[..., None], c.scatter))
        gradient = dense[0] * reference.divergence_gradient(z_s, z_t, self.divergence, self.temperature)
        gradient += dense[1] * reference.entropy_gradient(z_s) + dense[2] * z_s.softmax(-1)
        gradient = gradient.scatter_add(-1, c.ids, scatter) * self.scale
        if self.softcap is not None:
            gradient *= 1 - (z_s / self.softcap).square()
        return reference.divergence(z_s, z_t, self.divergence, self.temperature), gradient

    def _z(self, x: Tensor) -> Tensor:
        z = x * self.scale
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def check(self) -> dict[str, float]:
        """Errors; AssertionError where one is too large."""
        drawn = self.draw()
        got = self.kernels(*drawn)
        truth, yardstick = (self.specification(*drawn, dtype) for dtype in (F64, F32))
        found = {}
        for name, x, exact, eager in zip(("value", "gradient"), got, truth, yardstick, strict=True):
            if name == "value":
                rounding = NATS * len(exact) ** 0.5 / float(exact.norm())
            else:
                rounding = torch.finfo(self.out).eps if self.out != F32 else 0.0
            found[name] = within(x, exact, max(3 * relative(eager, exact), 5e-6) + rounding, name)
        return found


def relative(x: Tensor, truth: Tensor) -> float:
    return float((x.double() - truth.double()).norm() / truth.double().norm())


def within(x: Tensor, truth: Tensor, allowed: float, name: str) -> float:
    error = relative(x, truth)
    assert error <= allowed, f"{name}: error {error:.1e}, allowed {allowed:.1e}"  # NaN fails, and so does a truth of 0
    return error


def statistics(entries: int, dtype: torch.dtype) -> dict[str, float]:
    """A peaked row, one with masked entries, one with ties; the top k to the bit."""
    g = torch.Generator(device=DEVICE).manual_seed(entries)
    x = (3 * torch.randn(4, entries, device=DEVICE, generator=g)).to(dtype)
    x[1, entries // 3] += 30
    x[2, ::7] = -float("inf")
    x[3] = x[3].round()
    ids, k = torch.randint(0, entries, (4, 3), device=DEVICE, generator=g), 2 if DRY else 20
    rows = backend_for(x.device, dtype).statistics(x, 1.0, None, 0.7, k, ids)
    z, top = x.double(), x.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(rows.top_indices, top.indices[:, :k]), "top k"
    assert torch.equal(rows.top_values, top.values[:, :k]), "values of the top k"
    assert torch.equal(rows.gathered, x.float().gather(-1, ids)), "entries at ids"
    tempered = ((z - z.amax(-1, keepdim=True)) / 0.7).logsumexp(-1)
    pairs = {
        "lse": (rows.lse, z.logsumexp(-1)),
        "entropy": (rows.entropy, reference.entropy(z)),
        "tempered": (rows.stats[:, 3], tempered),
    }
    return {name: within(x, exact, 2e-6, name) for name, (x, exact) in pairs.items()}


def in_place() -> dict[str, int]:
    """fp16 gradients over fp32 logits, with more rows than the GPU holds at once: no warp overtakes another."""
    case, rounds = Case(rows=2 if DRY else 528, out=F16), 2 if DRY else 30
    drawn = case.draw()
    wide = Case(rows=case.rows).kernels(*drawn)[1].to(F16)
    differ = sum(not torch.equal(case.kernels(*drawn)[1], wide) for _ in range(rounds))
    assert differ == 0, f"{differ} of {rounds} runs differ from a gradient that lies over nothing unread"
    return {"runs": rounds}


def beyond_32_bits() -> dict[str, int]:
    rows = 3 if DRY else 16384  # 2.5e9 logits
    x = torch.randn(rows, VOCABULARY, device=DEVICE, dtype=BF16)
    found, last = backend_for(x.device, BF16).statistics(x, 1.0, None, 1.0, 3, None), x[-3:]
    within(found.lse[-3:], last.double().logsumexp(-1), 1e-6, "lse")
    top = last.float().sort(dim=-1, descending=True, stable=True).indices[:, :3]
    assert torch.equal(found.top_indices[-3:], top), "top k"
    return {"logits": x.numel()}


def repeatable() -> dict[str, int]:
    """The same bits again and on another stream, and no sync."""
    torch.manual_seed(0)
    entries, length, budget = (50, 2, None) if DRY else (5003, 128, 12 * 2**20)
    hidden, weight = (
        torch.randn(2, length, 64, device=DEVICE).to(BF16),
        torch.randn(entries, 64, device=DEVICE).to(BF16),
    )
    layout = kd.Layout.from_mask(torch.ones(2, length, dtype=torch.bool))
    teacher, tokens = kd.Head(torch.randn_like(hidden), torch.randn_like(weight)), torch.tensor(3, device=DEVICE)

    def gradients(objective) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        number = tokens if objective.reduction == "tokens" else None
        objective(kd.Head(*leaves), teacher, layout, denominator=number, memory_budget=budget).loss.backward()
        return [x.grad for x in leaves]

    objectives = (kd.GKD(), kd.TSDKD(), kd.GKD(reduction="tokens"))
    for objective in objectives:
        first, again = gradients(objective), gradients(objective)
        assert all(map(torch.equal, first, again)), f"{objective}: other bits the second time"
        if DEVICE == "cuda":
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                gradients(objective)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            with torch.cuda.stream(torch.cuda.Stream()):
                other = gradients(objective)
            torch.cuda.synchronize()
            assert all(map(torch.equal, first, other)), f"{objective}: other bits on another stream"
    return {"objectives": len(objectives)}


def checks() -> Iterator[tuple[str, Callable[[], dict]]]:
    for entries, dtype in ((VOCABULARY, F32), (VOCABULARY, BF16), (ODD, F32), (97, F16)):
        yield f"statistics, {entries} entries, {dtype_name(dtype)}", partial(statistics, entries, dtype)
    wide = [Case(divergence, out=BF16) for divergence in DIVERGENCES]
    narrow = [Case(divergence, dtype=BF16, out=BF16) for divergence in DIVERGENCES[:2]]
    others = [Case(entries=ODD), Case(DIVERGENCES[3], ODD, temperature=0.7)]
    others += [
        Case(divergence, out=BF16, temperature=0.7, softcap=30.0) for divergence in (DIVERGENCES[0], DIVERGENCES[3])
    ]
    for case in [*wide, *narrow, *others]:
        yield case.name, case.check
    yield "gradient in place", in_place
    yield "rows beyond 2^31 entries", beyond_32_bits
    yield "the same bits, no sync", repeatable


def random_case(seed: int) -> Case:
    choose = random.Random(seed).choice
    dtype = choose([F32, F32, BF16, F16])
    return Case(
        choose(DIVERGENCES), choose([2, 127, 300] if DRY else [2, 127, 128, 1003, 2048, 2049, 4099, 50257, VOCABULARY]),
        choose([3] if DRY else [7, 17]), dtype, choose([F32, BF16]) if dtype == F32 else dtype,
        choose([1.0, 1.0, 0.7]), choose([None, None, 30.0]), choose([1.0, 0.25]), choose([0.01, 1.0, 3.0, 10.0]), seed,
    )  # fmt: skip


def main(share: int, shares: int) -> None:
    failures = 0

    def run(name: str, check: Callable[[], dict], quiet: bool = False) -> None:
        nonlocal failures
        try:
            found = check()
        except AssertionError as error:
            failures += 1
            record("check", name=name, failed=str(error))
        else:
            if not quiet:
                record("check", name=name, failed="", **found)

    for name, check in list(checks())[share::shares]:
        with attempt(name):
            run(name, check)
    cases, seed = 0, share * 10**6
    while left() > 0 and failures < 10 and not (DRY and cases == 1):
        cases, seed = cases + 1, seed + 1
        with attempt(f"random case {seed}"):
            case = random_case(seed)
            run(f"random {case.name}, seed {seed}", case.check, quiet=True)
    record("random", share=share, cases=cases)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
