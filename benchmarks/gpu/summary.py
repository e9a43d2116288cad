"""report.md of a GPU day, from its findings (findings.jsonl): steps, targets, then every figure.

python benchmarks/gpu/summary.py FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

BENCHMARKS = Path(__file__).parents[1]
if str(BENCHMARKS) not in sys.path:
    sys.path.insert(0, str(BENCHMARKS))
import report  # noqa: E402

FINDINGS = "findings.jsonl"
QWEN, LLAMA = "Qwen2.5 1.5B / 14B", "Llama 3 8B / 8B"
JSD = "JSD(0.9)"
OURS = report.OURS
WITHIN = OURS + " in the memory of "


def load(folder: Path) -> list[dict]:
    """What was written completely: a run may have been ended within a line."""
    path, out = folder / FINDINGS, []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            out.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return out


class Findings:
    def __init__(self, found: list[dict]):
        self.found = found

    def of(self, *kinds: str) -> list[dict]:
        return [f for f in self.found if f["kind"] in kinds]

    def cells(self, **wanted) -> list[dict]:
        return [c for c in self.of("cell") if all(c[key] == value for key, value in wanted.items())]


# ---- targets ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """``figure`` finds its value, None where that was not measured."""

    what: str
    limit: float
    figure: Callable[[Findings], float | None]
    unit: str = ""


def _smallest(key: str, **wanted) -> Callable[[Findings], float | None]:
    """Of our own: a peer reaches no target of ours."""

    def figure(found: Findings) -> float | None:
        cells = found.cells(trained=True, **wanted)
        return min((c[key] for c in cells if c["implementation"].startswith(OURS)), default=None)

    return figure


def _headline(loss: str, implementation: str) -> dict:
    return {"models": QWEN, "tokens": 16384, "loss": loss, "implementation": implementation}


def _beside_jsd(implementation: str) -> Callable[[Findings], float | None]:
    def figure(found: Findings) -> float | None:
        both = [_smallest("full_s", **_headline(loss, implementation))(found) for loss in ("TSD-KD", JSD)]
        return None if None in both else both[0] / both[1]

    return figure


def _beside_peers(found: Findings) -> float | None:
    """The largest of our time in a peer's memory over the peer's, N >= 1024."""
    ratios = []
    for ours in found.of("cell"):
        if ours["implementation"].startswith(WITHIN) and ours["tokens"] >= 1024:
            same = {key: ours[key] for key in ("case", "loss")}
            peer = found.cells(implementation=ours["implementation"].removeprefix(WITHIN), **same)
            ratios += [ours["full_s"] / each["full_s"] for each in peer]
    return max(ratios, default=None)


TARGETS = (
    *(
        Target(f"{loss}, {name}, N = 16384, {QWEN}", limit, _smallest("ratio", **_headline(loss, name)), "x bare GEMMs")
        for (kind, loss, _, name), limit in report.LIMITS.items()
        if kind == "gpu"
    ),
    *(
        Target(f"TSD-KD beside the JSD, {name}, N = 16384, {QWEN}", 1.05, _beside_jsd(name), "x")
        for name in (OURS, OURS + ", bf16 logits")
    ),
    Target(f"JSD, N = 8192, {LLAMA}, H100", 0.058, _smallest("full_s", models=LLAMA, tokens=8192, loss=JSD), "s"),
    Target(f"JSD, N = 8192, {LLAMA}", 700, _smallest("extra_mib", models=LLAMA, tokens=8192, loss=JSD), "MiB"),
    Target(f"JSD, N = 1024, {LLAMA}, H100", 0.009, _smallest("full_s", models=LLAMA, tokens=1024, loss=JSD), "s"),
    Target("slowest beside a peer, in its memory", 1.0, _beside_peers, "x its time"),
)


def targets(found: Findings) -> str:
    rows = []
    for target in TARGETS:
        value = target.figure(found)
        verdict = "not measured" if value is None else "holds" if value <= target.limit else "**missed**"
        shown = "" if value is None else f"{value:.4g}"
        rows.append([target.what, shown, f"{target.limit:g} {target.unit}", verdict])
    return "## Targets\n\n" + report.table(["what", "measured", "at most", ""], rows)


# ---- everything else -------------------------------------------------------------------------------------------------


def steps(found: Findings) -> str:
    begun = {f["step"] for f in found.of("begun")}
    ended = {f["step"]: f for f in found.of("ended")}
    rows = []
    for step in (name for plan in found.of("plan") for name in plan["steps"]):
        state = "under way, or ended with the run" if step in begun else "not begun"
        if step in ended:
            state = f"{ended[step]['problem'] or 'ok'}, {ended[step]['seconds']:.0f} s"
        wrong = sum(f["step"] == step for f in found.of("error")) + len(_failed(found, step))
        rows.append([step, state, str(wrong or "")])
    return "## Steps\n\n" + report.table(["step", "", "errors and failed checks"], rows)


def _failed(found: Findings, step: str) -> list[dict]:
    return [f for f in found.of("check") if f["step"] == step and f["failed"]]


def correctness(found: Findings) -> str:
    checks, cases = found.of("check"), sum(f["cases"] for f in found.of("random"))
    wrong = [f"- **{c['name']}**: {c['failed']}" for c in checks if c["failed"]]
    wrong += [f"- error in {e['step']}, {e['what']}: {e['error']}" for e in found.of("error")]
    passed = sum(not c["failed"] for c in checks)
    lines = [f"{passed} checks at full size passed, {len(checks) - passed} failed; {cases} random cases.", *wrong]
    return "## Correctness\n\n" + "\n".join(lines) + "\n"


def speed(found: Findings) -> str:
    data = {"benchmarks": [{"extra_info": c} for c in found.of("cell")], "refused": found.of("refused")}
    return "## Losses\n\n" + report.case_tables(data) if found.of("cell", "refused") else ""


def plain(found: Findings, kind: str, title: str) -> str:
    """A table of all findings of a kind, a column for each of their fields."""
    rows = [{k: v for k, v in f.items() if k not in ("kind", "step")} for f in found.of(kind)]
    head = list(dict.fromkeys(name for row in rows for name in row))
    shown = [[_shown(row.get(name, "")) for name in head] for row in rows]
    return f"## {title}\n\n" + report.table(head, shown) if rows else ""


def _shown(value) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{_shown(v)} {k}" for k, v in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|").replace("\n", "<br>")


def about(found: Findings) -> str:
    for f in found.of("environment"):
        versions = ", ".join(f"{name} {version}" for name, version in f["versions"].items() if version != "missing")
        where = f"{f['device']}, driver {f['driver'] or 'none'}, clocks {f['clocks'] or 'unknown'}"
        commit = f"commit {f['commit']}{' with local changes' if f['modified'] else ''}"
        return f"{where}; backend {f['backend']}; Python {f['python']}, {versions}; {commit}.\n"
    return "The machine is not known yet.\n"


def render(found: Iterable[dict]) -> str:
    found = Findings(list(found))
    parts = ["# A GPU day\n", about(found), steps(found), targets(found), correctness(found), speed(found)]
    tables = {
        "prediction": "Predicted and measured",
        "bandwidth": "Bandwidth", "rate": "Products of squares", "product": "Products of the headline shape",
        "alignment": "Rows that are not aligned", "dX error": "Error of dX", "sweep": "Sweeps", "tuned": "Tuned sizes",
        "timeline": "Timelines", "counters": "Hardware counters", "output": "What the other commands said last",
    }  # fmt: skip
    parts += [plain(found, kind, title) for kind, title in tables.items()]
    return "\n".join(part for part in parts if part)


def write(folder: Path) -> Path:
    path = folder / "report.md"
    report.replace(path, render(load(folder)))
    return path


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
