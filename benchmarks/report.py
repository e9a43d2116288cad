"""Turns the benchmarks' JSON into report.md and PNG plots beside it; ``python benchmarks/report.py FILE.json``."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

OURS = "kdkernels"
PLOTTED = "JSD(0.9)"

# (shapes, loss, operand, logits): at most so many times the bare GEMMs, from SMALLEST tokens on
LIMITS = {
    ("cpu", "JSD(0.9)", "bfloat16", OURS): 1.08,
    ("cpu", "JSD(0.9)", "float32", OURS): 1.05,
    ("cpu", "TSD-KD", "bfloat16", OURS): 1.10,
    ("cpu", "VCRD", "bfloat16", OURS): 1.10,
    **{
        ("cpu-avx2", loss, operand, OURS): 0.80
        for loss in ("JSD(0.9)", "TSD-KD")
        for operand in ("float32", "bfloat16")
    },
    ("gpu", "JSD(0.9)", "bfloat16", OURS): 1.30,
    ("gpu", "TSD-KD", "bfloat16", OURS): 1.30,
    ("gpu", "JSD(0.9)", "bfloat16", OURS + ", bf16 logits"): 1.20,
    ("gpu", "TSD-KD", "bfloat16", OURS + ", bf16 logits"): 1.20,
}
SMALLEST = {"cpu": 1024, "cpu-avx2": 512, "gpu": 16384}  # tokens from which a limit holds
LONGEST = {"cpu": 256, "cpu-avx2": 256, "gpu": 512}  # tokens a response


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def load(path: Path) -> dict:
    return json.loads(path.read_text())


def save(path: Path, data: dict) -> None:
    replace(path, json.dumps(data, indent=4))


def replace(path: Path, text: str) -> None:
    """At no time is half of it there."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    new.replace(path)


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
    shapes, rows = data["shapes"], []
    kind = shapes if shapes in SMALLEST else shapes.split("-")[0]
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
        rounds = sorted({c["rounds"] for c in grouped[name]})
        rounds = " or ".join(map(str, rounds)) or "0"  # the fewer of slow peers
        multiplied = {c.get("bare_gemms_operand", c["operand"]) for c in grouped[name]}
        widened = multiplied - {c["operand"] for c in grouped[name]}
        of = "".join(f" of {operand} operands, torch has nothing faster here" for operand in widened)
        floor = f"Bare GEMMs{of}: {'; '.join(words) or 'not timed'}. Medians of {rounds} rounds in turns."
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


def curves(pyplot, found: list[dict]):
    """Time, ratio to the bare GEMMs and peak memory of one loss in bf16 against N."""
    lines = defaultdict(dict)
    for c in sorted(found, key=lambda c: (c["tokens"], -c["response"])):
        if c["loss"] == PLOTTED and c["operand"] == "bfloat16":
            lines[c["implementation"]][c["tokens"]] = c  # of the usual responses, not the overlong one
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    quantities = {"full_s": "seconds", "ratio": "x bare GEMMs", "extra_mib": "MiB beyond inputs and gradients"}
    for axis, (quantity, label) in zip(axes, quantities.items(), strict=True):
        for name, points in lines.items():
            width = 2.5 if name.startswith(OURS) else 1.2
            axis.plot(list(points), [c[quantity] for c in points.values()], "o-", label=name, lw=width)
        axis.set(xlabel="N tokens", ylabel=label, xscale="log", yscale="linear" if quantity == "ratio" else "log")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    return figure, f"{PLOTTED}, forward and backward, bf16, trained head: {found[0]['models']}"


def bars(pyplot, found: list[dict]):
    """Ratio to the bare GEMMs and peak memory of every implementation in the case that has most of them."""
    by_case = defaultdict(lambda: defaultdict(list))
    for c in found:
        by_case[c["case"]][c["loss"]].append(c)
    case = max(by_case, key=lambda case: max(map(len, by_case[case].values())))
    losses = {loss: cs for loss, cs in by_case[case].items() if len(cs) > 1}
    sizes = [len(cs) + 1 for cs in losses.values()]
    options = {"figsize": (12, 1 + 0.3 * sum(sizes)), "height_ratios": sizes, "layout": "constrained"}
    figure, axes = pyplot.subplots(len(losses), 2, sharex="col", sharey="row", squeeze=False, **options)
    for (left, right), (loss, cs) in zip(axes, losses.items(), strict=True):
        cs = sorted(cs, key=lambda c: -c["ratio"])
        colours = ["tab:blue" if c["implementation"].startswith(OURS) else "darkgrey" for c in cs]
        for axis, quantity, shown in ((left, "ratio", "%.2f"), (right, "extra_mib", "%.0f")):
            drawn = axis.barh([c["implementation"] for c in cs], [c[quantity] for c in cs], color=colours)
            axis.bar_label(drawn, fmt=shown, padding=3, fontsize=8)
            axis.margins(x=0.12)
        left.axvline(1, color="black", lw=0.8)
        left.set_title(loss, fontsize=10, loc="left")
    axes[-1][0].set_xlabel("time, forward and backward, x bare GEMMs")
    axes[-1][1].set_xlabel("memory, MiB beyond inputs and gradients")
    return figure, case


def plots(data: dict, folder: Path) -> str:
    """kdkernels and the peers: against N if they were measured at more than one; a sentence without matplotlib."""
    by_models, peers = defaultdict(list), defaultdict(set)
    for c in cells(data):
        if c["trained"] and " in the memory of " not in c["implementation"]:
            by_models[c["models"]].append(c)
            if not c["implementation"].startswith(OURS):
                peers[c["models"]].add(c["tokens"])
    if not peers:
        return ""
    try:
        import matplotlib
    except ImportError:
        return "No plots: matplotlib is not installed here.\n"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    out = []
    for models, tokens in peers.items():
        figure, title = (curves if len(tokens) > 1 else bars)(pyplot, by_models[models])
        figure.suptitle(title)
        file = "".join(x if x.isalnum() else "-" for x in models.lower()) + ".png"
        figure.savefig(folder / file, dpi=110)
        pyplot.close(figure)
        out.append(f"![{title}]({file})\n")
    return "\n".join(out) + "\n"


def render(data: dict, folder: Path, plotted: bool = True) -> str:
    """Markdown; plots, if any, are written to ``folder``."""
    about = (
        "Forward, backward and both, timed in one process in turns; gradients checked against fp64 before anything is "
        "timed. Logits have the operands' dtype on CPUs and fp32 on GPUs unless the name says otherwise. Extra memory "
        "is beyond inputs and returned gradients, the fp32 accumulator of dW included; on CPUs it is what becomes "
        "resident (fresh processes: under Overheads). TFLOP/s and GB/s: what the bare GEMMs and three sweeps must do, "
        "divided by the time taken (benchmarks/gemms.py). A batch has two rows of N / 2 tokens.\n"
    )
    parts = [f"# Benchmarks: {data['machine_info']['machine']}, {data['shapes']} shapes\n", environment(data), about]
    if data.get("left"):
        count = f"{data['left']} of {data['left'] + len(data['benchmarks']) + len(data['refused'])}"
        parts.append(f"**Ended before its end: {count} measurements had not been made.**\n")
    parts += [
        limits(data),
        plots(data, folder) if plotted else "",
        "## Every case\n",
        case_tables(data),
        overheads(data),
    ]
    return "\n".join(part for part in parts if part)


def write(path: Path, plotted: bool = True) -> Path:
    """report.md beside the JSON."""
    out = path.with_name("report.md")
    replace(out, render(load(path), path.parent, plotted))
    return out


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
