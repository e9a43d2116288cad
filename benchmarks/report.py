"""Turns the benchmarks' JSON into report.md and PNG plots beside it; ``python benchmarks/report.py FILE.json``."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

OURS = "kdkernels"
PLOTTED = "JSD(0.9)"

# (device, loss, operand, logits): at most so many times the bare GEMMs, N >= 1024 on CPUs and N = 16384 on GPUs
LIMITS = {
    ("cpu", "JSD(0.9)", "bfloat16", OURS): 1.08,
    ("cpu", "JSD(0.9)", "float32", OURS): 1.05,
    ("cpu", "TSD-KD", "bfloat16", OURS): 1.10,
    ("cpu", "VCRD", "bfloat16", OURS): 1.10,
    ("gpu", "JSD(0.9)", "bfloat16", OURS): 1.30,
    ("gpu", "TSD-KD", "bfloat16", OURS): 1.30,
    ("gpu", "JSD(0.9)", "bfloat16", OURS + ", bf16 logits"): 1.20,
    ("gpu", "TSD-KD", "bfloat16", OURS + ", bf16 logits"): 1.20,
}
SMALLEST = {"cpu": 1024, "gpu": 16384}  # tokens from which a limit holds
LONGEST = {"cpu": 256, "gpu": 512}  # tokens a response


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def cells(data: dict) -> list[dict]:
    return [b["extra_info"] for b in data["benchmarks"] if "case" in b["extra_info"]]


# ---- sections --------------------------------------------------------------------------------------------------------


def environment(data: dict) -> str:
    about = data["machine_info"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    clocks, driver = about["clocks"] or "unknown", about["driver"] or "none"
    lines = [
        f"- machine: {about['machine']} ({about['device']}), {about['threads']} CPU threads, clocks {clocks}",
        f"- driver: {driver}; kdkernels backend: {about['backend']}; Python {about['python']}",
        f"- {versions}",
        f"- commit {about['commit']}{' with local changes' if about['modified'] else ''}; {data['datetime'][:10]}",
    ]
    return "\n".join(lines) + "\n"


def limits(data: dict) -> str:
    kind, rows = data["shapes"].split("-")[0], []
    for c in cells(data):
        limit = LIMITS.get((kind, c["loss"], c["operand"], c["implementation"]))
        if limit is None or not c["trained"] or c["tokens"] < SMALLEST[kind] or c["response"] > LONGEST[kind]:
            continue
        held = "holds" if c["ratio"] <= limit else "**missed**"
        shown = [c["operand"], str(c["tokens"]), f"{c['ratio']:.3f}", f"{limit:.2f}", held]
        rows.append([c["loss"], c["implementation"], *shown])
    if not rows:
        return ""
    head = ["loss", "implementation", "operands", "N", "x bare GEMMs", "limit", ""]
    return "## Limits\n\n" + table(head, rows) + "\n"


def case_tables(data: dict) -> str:
    grouped, refused = defaultdict(list), defaultdict(list)
    for c in cells(data):
        grouped[c["case"]].append(c)
    for c in data["refused"]:
        refused[c["case"]].append(c)
    head = ["loss", "implementation", "forward ms", "backward ms", "full ms", "x bare GEMMs", "extra MiB"]
    head += ["gradient error", "eager's", "TFLOP/s", "GB/s"]
    out = []
    for name in dict.fromkeys([*grouped, *refused]):
        rows = []
        for c in grouped[name]:
            row = [c["loss"], c["implementation"]]
            row += [f"{c[part] * 1e3:.1f}" for part in ("forward_s", "backward_s", "full_s")]
            row += [f"{c['ratio']:.2f}", f"{c['extra_mib']:.0f}", f"{c['error']:.1e}", f"{c['yardstick']:.1e}"]
            rows.append([*row, f"{c['tflops']:.2f}", f"{c['gbs']:.1f}"])
        for c in refused[name]:
            if not c["reason"].startswith("does not compute"):
                rows.append([c["loss"], c["implementation"], c["reason"], *[""] * 8])
        floors = {(c["bare_gemms_s"], c["bare_gemms_rows"], c["loss"] == "cross-entropy") for c in grouped[name]}
        words = [
            f"{'without' if alone else 'with'} a teacher {seconds * 1e3:.1f} ms in chunks of {chunk} rows"
            for seconds, chunk, alone in sorted(floors)
        ]
        rounds = min((c["rounds"] for c in grouped[name]), default=0)
        floor = f"Bare GEMMs: {'; '.join(words) or 'not timed'}. Medians of {rounds} rounds in turns."
        out += [f"### {name}\n", floor + "\n", table(head, rows)]
    return "\n".join(out)


def overheads(data: dict) -> str:
    rows = []
    for benchmark in data["benchmarks"]:
        if "case" not in benchmark["extra_info"]:
            for name, value in benchmark["extra_info"].items():
                shown = f"{value:.4g}" if isinstance(value, (int, float)) else str(value)
                rows.append([benchmark["name"].removeprefix("test_").replace("_", " "), name, shown])
    return "## Overheads\n\n" + table(["what", "quantity", "value"], rows) if rows else ""


def plots(data: dict, folder: Path) -> str:
    """Time, ratio to the bare GEMMs and peak memory against N; a sentence where matplotlib is missing."""
    by_models = defaultdict(lambda: defaultdict(list))
    for c in cells(data):
        usual = c["trained"] and c["operand"] == "bfloat16" and " in the memory of " not in c["implementation"]
        if usual and c["loss"] == PLOTTED:
            by_models[c["models"]][c["implementation"]].append(c)
    drawn = {m: lines for m, lines in by_models.items() if len({c["tokens"] for cs in lines.values() for c in cs}) > 1}
    if not drawn:
        return ""
    try:
        import matplotlib
    except ImportError:
        return "No plots: matplotlib is not installed here.\n"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    out = []
    quantities = {"full_s": "seconds", "ratio": "x bare GEMMs", "extra_mib": "MiB beyond inputs and gradients"}
    for models, lines in drawn.items():
        figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
        for axis, (quantity, label) in zip(axes, quantities.items(), strict=True):
            for name, points in lines.items():
                usual = {}
                for c in sorted(points, key=lambda c: (c["tokens"], -c["response"])):
                    usual[c["tokens"]] = c[quantity]  # of the usual responses, not the overlong one
                width = 2.5 if name.startswith(OURS) else 1.2
                axis.plot(list(usual), list(usual.values()), "o-", label=name, lw=width)
            axis.set(xlabel="N tokens", ylabel=label, xscale="log", yscale="linear" if quantity == "ratio" else "log")
            axis.grid(alpha=0.3)
        axes[0].legend(fontsize=8)
        figure.suptitle(f"{PLOTTED}, forward and backward, bf16, trained head: {models}")
        file = "".join(x if x.isalnum() else "-" for x in models.lower()) + ".png"
        figure.savefig(folder / file, dpi=110)
        pyplot.close(figure)
        out.append(f"![{PLOTTED}, {models}]({file})\n")
    return "\n".join(out) + "\n"


def render(data: dict, folder: Path) -> str:
    """Markdown; plots are written to ``folder``."""
    about = (
        "Forward, backward and both, timed in one process in turns; gradients checked against fp64 before anything is "
        "timed. Logits have the operands' dtype on CPUs and fp32 on GPUs unless the name says otherwise. Extra memory "
        "is beyond inputs and returned gradients, the fp32 accumulator of dW included; on CPUs it is what became "
        "resident in a process that had run other things before, and can be too low: the figures of fresh processes "
        "are under Overheads. TFLOP/s and GB/s: what the bare GEMMs and three sweeps must do, divided by the time "
        "taken (benchmarks/gemms.py). A batch has two rows of N / 2 tokens.\n"
    )
    parts = [f"# Benchmarks: {data['machine_info']['machine']}, {data['shapes']} shapes\n", environment(data), about]
    parts += [limits(data), plots(data, folder), "## Every case\n", case_tables(data), overheads(data)]
    return "\n".join(part for part in parts if part)


def write(path: Path) -> Path:
    """report.md beside the JSON."""
    data = load(path)
    out = path.with_name("report.md")
    out.write_text(render(data, path.parent))
    return out


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
