"""benchmarks/gpu: a dry run of every step, and what happens to steps that fail, hang or lack something."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parent.parent
GPU = ROOT / "benchmarks/gpu"
sys.path[:0] = [str(GPU), str(GPU.parent)]
import day  # noqa: E402
import kernels  # noqa: E402
import speed  # noqa: E402
import summary  # noqa: E402

del sys.path[:2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, str(GPU / "day.py"), "--dry", *arguments]


def test_dry_run(tmp_path):
    """Every step runs and finds something, without the extension (-p no_extension) where the tests are collected."""
    plugins = {"PYTEST_ADDOPTS": "-p no_extension", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command("--out", str(tmp_path)), env=ENVIRONMENT | plugins, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found = summary.Findings(summary.load(tmp_path))
    names = [step.name for step in day.steps(dry=True)]
    assert [f["step"] for f in found.of("ended")] == names and not any(f["problem"] for f in found.of("ended"))
    assert set(names) - {"counters"} == {f["step"] for f in found.found if f["kind"] not in ("plan", "begun", "ended")}
    assert not found.of("error") and not any(f["failed"] for f in found.of("check"))
    assert sum(f["cases"] for f in found.of("random")) == 1 and len(found.of("check")) >= 18

    losses = {(c["loss"], c["implementation"], c["trained"]) for c in found.of("cell")}
    for loss in ("JSD(0.9)", "TSD-KD"):
        assert {
            (loss, name, trained) for name in ("kdkernels", "kdkernels, bf16 logits") for trained in (True, False)
        } <= losses
        assert (loss, "kdkernels in 4096 MiB", True) in losses
    assert {("VCRD", "kdkernels", True), ("cross-entropy", "kdkernels", True)} <= losses
    predictions = found.of("prediction")
    assert len(predictions) >= 5 and all(f["predicted_ms"] > 0 and f["predicted_ratio"] > 1 for f in predictions)
    named = {(c["loss"], c["implementation"]) for c in found.of("cell", "refused")}
    assert {("JSD(0.9)", peer) for peer in ("eager PyTorch", "torch.compile", "checkpointed chunks")} <= named
    assert {f["name"] for f in found.of("sweep")} >= {"statistics", "divergence", "gradient", "gradient, 11 ids"}
    assert all(f["launches"] > 5 and f["span_ms"] > 0 for f in found.of("timeline"))

    text = (tmp_path / "report.md").read_text()
    assert str(ROOT) not in text and done.stdout.endswith(text + "\n")
    assert text.count("| not measured |") == len(summary.TARGETS)  # tiny shapes have no target
    for name in names:
        assert re.search(rf"\| {name} \| ok, \d+ s \|", text), name
    collected = (tmp_path / "logs/tests.txt").read_text()
    for name in day.TESTED:
        assert f"tests/{name}::" in collected, name
    assert "[native" not in collected and "[eager" not in collected


def test_a_report_is_there_whenever_it_is_killed(tmp_path):
    """After every finding; and the step under way ends with the day."""
    findings, seen = tmp_path / summary.FINDINGS, []
    with subprocess.Popen(
        command("speed", "--out", str(tmp_path)), env=ENVIRONMENT, stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None and len(seen) < 2:
            seen = summary.Findings(summary.load(tmp_path)).of("cell")
            time.sleep(0.02)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGTERM)
    assert process.returncode == 143 and children
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    text = (tmp_path / "report.md").read_text()
    assert text == summary.render(summary.load(tmp_path))
    assert "| speed | under way, or ended with the run |" in text and "| JSD(0.9) | kdkernels |" in text
    with findings.open("a") as file:
        file.write('{"step": "speed", "ki')  # killed within a line
    assert summary.render(summary.load(tmp_path)) == text


def findings_of(folder: Path, *steps: day.Step, limit: float = 60.0) -> tuple[int, dict[str, str], summary.Findings]:
    """Status, how each step ended, and what was found."""
    status = day.Day(folder, limit).main(list(steps))
    found = summary.Findings(summary.load(folder))
    return status, {f["step"]: f["problem"] for f in found.of("ended")}, found


def python(name: str, *codes: str, limit: float = 30.0, **options) -> day.Step:
    return day.Step(name, limit, [[sys.executable, "-c", code] for code in codes], **options)


def test_steps_fail_alone(tmp_path, capsys):
    """What a command started ends with it."""
    late = tmp_path / "late"
    child = f"import time; time.sleep(4); open({str(late)!r}, 'w')"
    slow = f"import subprocess, sys; print('began', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    unsound = (
        "import sys; sys.path[0] = 'benchmarks/gpu'; from findings import record; record('check', name='x', failed='y')"
    )
    began = time.monotonic()
    status, ended, found = findings_of(
        tmp_path,
        python("slow", slow, "pass", limit=1.5),
        python("wrong", "import sys; print('why'); sys.exit(3)"),
        python("unsound", unsound),
        day.Step("no tool", 30, [["no-such-tool"]]),
        python("no module", "pass", needs=("no_such_module",)),
        python("good", "import os; print(os.environ['THERE'])", environment={"THERE": "yes"}, quoted=True),
        python("counted", "print('a 1'); print('b   2')", kept=("b",)),
    )
    assert status == 1
    assert ended.pop("no module").startswith("not here: no_such_module")
    assert ended == {
        "slow": "not done within its 1.5 seconds",
        "wrong": "status 3",
        "unsound": "errors or failed checks",
        "no tool": "not here: no-such-tool",
        "good": "",
        "counted": "",
    }
    assert {f["step"]: f["last"] for f in found.of("output")} == {"slow": "began", "wrong": "why", "good": "yes"}
    assert [f["lines"] for f in found.of("counters")] == ["b 2"]
    assert "- **x**: y" in (tmp_path / "report.md").read_text() and "== good: ok" in capsys.readouterr().out
    time.sleep(max(0, began + 6 - time.monotonic()))
    assert not late.exists()


def test_steps_that_run_again(tmp_path):
    """Their findings are replaced, those of other steps kept."""
    findings_of(tmp_path, python("a", "print(1)", quoted=True), python("b", "print(2)", quoted=True))
    _, _, found = findings_of(tmp_path, python("b", "print(3)", quoted=True), python("c", "print(4)", quoted=True))
    assert {f["step"]: f["last"] for f in found.of("output")} == {"a": "1", "b": "3", "c": "4"}
    assert len(found.of("ended")) == 3 and summary.steps(found).count("| ok, ") == 3


def test_no_step_begins_without_time(tmp_path):
    status, ended, _ = findings_of(tmp_path, python("late", "pass"), limit=day.LEAST / 2)
    assert status == 1 and ended == {"late": "no time left"}


def test_it_fits_nine_minutes():
    limits = {step.name: step.limit for step in day.steps()}
    assert list(limits)[:3] == ["ceilings", "correctness", "speed"]
    assert sum(limit for name, limit in limits.items() if name not in ("tests", *CHECK[1:])) <= day.LIMIT - 60
    assert sum(limits[name] for name in CHECK) <= 290


CHECK = ("tests", "compile", "memcheck", "racecheck")


def test_make_gpu_check():
    done = subprocess.run(["make", "-n", "gpu-check"], cwd=ROOT, capture_output=True, text=True)
    assert f"benchmarks/gpu/day.py {' '.join(CHECK)}" in done.stdout
    last = {step.name: step for step in day.steps()}
    assert last["memcheck"].environment == day.UNCACHED and last["racecheck"].commands[0][-1] == "shared"


@pytest.mark.parametrize("name", day.TESTED)
def test_its_tests_force_no_backend_that_may_not_be_there(name):
    """What may not be left out unseen: tests of other files take part in the interpreter only by choice."""
    assert "native" not in (Path(__file__).parent / name).read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["day.py"])
    with pytest.raises(SystemExit, match=r"no GPU here.* --dry"):
        day.main()


def test_unknown_steps_are_named(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["day.py", "--dry", "sped"])
    with pytest.raises(SystemExit):
        day.main()
    assert "expected some of ceilings, correctness, speed" in capsys.readouterr().err


def test_targets():
    def cell(models: str, tokens: int, loss: str, implementation: str, seconds: float) -> dict:
        shared = {"kind": "cell", "step": "speed", "case": f"{models} {tokens}", "trained": True, "extra_mib": 600.0}
        named = {"models": models, "tokens": tokens, "loss": loss, "implementation": implementation}
        return shared | named | {"full_s": seconds, "ratio": seconds / 0.1}

    both = ("kdkernels", "kdkernels, bf16 logits")
    found = [
        cell(summary.QWEN, 16384, loss, name, s) for loss, s in (("JSD(0.9)", 0.12), ("TSD-KD", 0.127)) for name in both
    ]
    found += [cell(summary.LLAMA, tokens, "JSD(0.9)", both[1], s) for tokens, s in ((8192, 0.057), (1024, 0.0091))]
    found += [
        cell(summary.QWEN, 8192, "JSD(0.9)", name, s)
        for name, s in (("TRL GKD", 0.2), (summary.WITHIN + "TRL GKD", 0.1))
    ]
    found.append(cell(summary.LLAMA, 1024, "JSD(0.9)", "TRL GKD", 0.008))  # a peer's, which is no merit of ours
    shown = summary.targets(summary.Findings(found))
    verdicts = [line.split("|")[-2].strip() for line in shown.splitlines()[4:]]
    assert verdicts == [
        "holds",
        "holds",
        "holds",
        "**missed**",
        "**missed**",
        "**missed**",
        "holds",
        "holds",
        "**missed**",
        "holds",
    ]
    assert "| 0.5 | 1 x its time |" in shown


def test_sweeps_are_timed_over_padded_rows(monkeypatch):
    """As the buffers of a call are on a GPU."""
    strides, backend = [], kernels.backend_for(torch.device("cpu"), torch.float32)

    def statistics(x, *options):
        strides.append(x.stride(0))
        return backend.statistics(x, *options)

    monkeypatch.setattr("kdkernels.compute.memory.padded", lambda columns, device: -(-columns // 64) * 64)
    monkeypatch.setattr(kernels, "DEVICE", "cpu")
    seen = SimpleNamespace(statistics=statistics, divergence=backend.divergence)
    monkeypatch.setattr(kernels, "backend_for", lambda *_: seen)
    kernels.sweeps(torch.float32, 100, 2)
    assert strides == [128, 128]


def test_what_has_a_target_is_measured():
    """The cases of the day ask for what the targets look for."""
    asked = speed.CASES["targets"]
    measured = {(c.models.name, c.tokens, loss, name) for c in asked for loss in c.losses for name in c.implementations}
    for loss in ("JSD(0.9)", "TSD-KD"):
        for name in ("kdkernels", "kdkernels, bf16 logits"):
            assert (summary.QWEN, 16384, loss, name) in measured
    assert {(summary.LLAMA, n, "JSD(0.9)", "kdkernels") for n in (8192, 1024)} <= measured
