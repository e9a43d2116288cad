"""The benchmarks: a dry run of the one-command report, what is refused, the report and the comparison."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import cases  # noqa: E402
import compare  # noqa: E402
import gemms  # noqa: E402
import measure  # noqa: E402
import peers  # noqa: E402
import report  # noqa: E402
import run  # noqa: E402

sys.path.remove(str(ROOT / "benchmarks"))

JSD = cases.LOSSES["JSD(0.9)"]


def run_of(*implementations: str, losses=("JSD(0.9)",), **options) -> measure.CaseRun:
    options = {"operand": "float32", "seconds": 0, **options}
    case = cases.Case(cases.TINY, 64, losses, implementations, **options)
    return measure.CaseRun(case, "cpu", time.monotonic() + 1e6)


def measured(*implementations: str, **options) -> list[measure.Cell]:
    return list(run_of(*implementations, **options).measure().values())


# ---- the dry run -----------------------------------------------------------------------------------------------------


def test_dry_run_of_the_gpu_report():
    command = ["make", "gpu-report", "DEVICE=cpu", "SHAPES=tiny", f"PYTHON={sys.executable}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    written = Path(next(line for line in reversed(done.stdout.splitlines()) if line.endswith("report.md")))
    data = report.load(written.with_name("tiny.json"))
    assert "node" not in data["machine_info"] and str(ROOT) not in json.dumps(data)

    found = {(c["loss"], c["implementation"]) for c in report.cells(data)}
    for loss in cases.LOSSES:
        assert {(loss, "kdkernels"), (loss, "eager PyTorch")} <= found
    for c in report.cells(data):
        assert 0 < c["error"] <= max(2 * c["yardstick"], 4 * torch.finfo(getattr(torch, c["operand"])).eps)
        assert c["full_s"] > 0 and c["ratio"] == pytest.approx(c["full_s"] / c["bare_gemms_s"])
        assert c["trained"] == (c["consistency"] is not None)
    reasons = {(c["loss"], c["implementation"]): c["reason"] for c in data["refused"]}
    assert reasons["JSD(0.9)", "torch.compile"] == "left out of the dry run"
    measured_or_named = set(reasons) | found
    assert {("JSD(0.9)", peer) for peer in cases.PEERS} <= measured_or_named

    extras = [b["extra_info"] for b in data["benchmarks"] if "case" not in b["extra_info"]]
    assert any("import_ms" in e for e in extras) and any("divergence_us" in e for e in extras)
    text = written.read_text()
    assert "| TSD-KD | kdkernels |" in text and "top_k_share_of_jsd" in text
    assert data["left"] == 0 and "before its end" not in text


def test_a_report_is_there_whenever_it_is_killed(tmp_path):
    """After every measurement; until then that nothing was measured yet."""
    command = [sys.executable, str(ROOT / "benchmarks/run.py"), "--device=cpu", "--shapes=tiny", f"--out={tmp_path}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    seen, path = [], tmp_path / "tiny.json"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True) as process:
        while process.poll() is None and (not seen or seen[-1] < 2):
            if path.exists():
                data = report.load(path)  # valid whenever it is read
                seen.append(len(data["benchmarks"]))
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    data, text = report.load(path), (tmp_path / "report.md").read_text()
    assert seen[0] == 0 and len(data["benchmarks"]) >= 2 and data["left"] > 50
    lefts = (data["left"], data["left"] + 1)  # the report is written after the JSON
    assert any(f"Ended before its end: {left} of " in text for left in lefts) and "top_k_share_of_jsd" in text


def test_the_limit_ends_what_is_under_way():
    began = time.monotonic()
    assert run.within(0.5, [sys.executable, "-c", "import time; time.sleep(60)"]) is None
    assert time.monotonic() - began < 50
    assert run.within(None, [sys.executable, "-c", "raise SystemExit(3)"]) == 3


def test_on_a_gpu_what_has_a_limit_comes_first():
    limited = {(loss, name) for kind, loss, operand, name in report.LIMITS if kind == "gpu"}
    first = cases.SETS["gpu"][0]
    assert limited == set(itertools.product(first.losses, first.implementations))
    assert first.tokens == report.SMALLEST["gpu"] and first.response <= report.LONGEST["gpu"] and first.trained


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_counts():
    case = cases.Case(cases.Models("", 3, 5, 7), 11, (), ())
    assert gemms.flops(case, teacher=True) == 2 * 11 * 7 * (3 * 3 + 5)
    frozen = cases.Case(cases.Models("", 3, 5, 7), 11, (), (), trained=False)
    assert gemms.flops(frozen, teacher=False) == 2 * 11 * 7 * 2 * 3
    more_chunks = gemms.bytes_moved(case, True, 4) - gemms.bytes_moved(case, True, 11)
    assert more_chunks == 2 * 2 * 7 * (4 * 3 + 5)  # two chunks more, two bytes a number


def test_bare_gemms_multiply_every_chunk():
    (batch,) = cases.batches(cases.Case(cases.TINY, 64, (), (), "float32"), "cpu", 1)
    bare = gemms.BareGemms(batch)
    bare(batch, 24, teacher=True)
    x, w = (t.detach() for t in (batch.hidden_s.flatten(0, 1), batch.weight_s))
    torch.testing.assert_close(bare.d_x, x @ w.t() @ w, rtol=1e-3, atol=1e-3)
    last = x[48:]
    torch.testing.assert_close(bare.d_w, (last @ w.t()).t() @ last, rtol=1e-3, atol=1e-3)


def test_short_responses_have_clear_selections():
    (batch,) = cases.batches(cases.Case(cases.TINY, 64, (), (), "float32"), "cpu", 1)
    assert batch.lengths == [16, 16] * 2
    z = batch.hidden_s.detach().flatten(0, 1)[16:32] @ batch.weight_s.detach().t()
    top = z.topk(11).values
    assert (top[:, :-1] - top[:, 1:]).min() > 0.4
    assert top[0, 0].item() == pytest.approx(20, abs=0.01)


# ---- what is refused -------------------------------------------------------------------------------------------------


class Wrong(peers.Ours):
    """Right but for a factor on its loss, or on one of its gradients."""

    def __init__(self, loss=1.0, weight=1.0):
        super().__init__("kdkernels")
        self.factors = loss, weight

    def forward(self, batch, loss):
        factor, of_weight = self.factors
        if of_weight != 1:
            batch.weight_s.register_hook(lambda grad: grad * of_weight)
        return factor * super().forward(batch, loss)


@pytest.mark.parametrize("factors", [{"loss": 1.001}, {"loss": 0.0}, {"weight": 1.01}, {"weight": 0.0}])
def test_wrong_numbers_are_not_timed(monkeypatch, factors):
    monkeypatch.setitem(peers.IMPLEMENTATIONS, "kdkernels", Wrong(**factors))
    (cell,) = measured("kdkernels")
    assert cell.reason.startswith("wrong") and cell.times == [] and "ratio" not in cell.extra_info


def test_right_numbers_are_timed():
    for cell in measured("kdkernels", "eager PyTorch", losses=("JSD(0.9)", "TSD-KD", "VCRD")):
        rounds = 3 if cell.implementation == "kdkernels" else 2
        assert cell.reason == "" and len(cell.times) >= rounds and cell.extra_info["ratio"] > 0


def test_a_frozen_head():
    run = run_of("kdkernels", trained=False)
    (cell,) = run.measure().values()
    assert cell.reason == "" and cell.extra_info["consistency"] is None
    assert run.gemms.d_w is None


class Failing(peers.Eager):
    name = "failing"

    def __init__(self, error: Exception):
        self.error = error

    def forward(self, batch, loss):
        raise self.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (ValueError("no such shape\nmore"), "failed: ValueError: no such shape"),
    ],
)
def test_a_peer_that_fails_is_a_cell(monkeypatch, error, reason):
    monkeypatch.setitem(peers.IMPLEMENTATIONS, "failing", Failing(error))
    failed, good = measured("failing", "kdkernels")
    assert failed.reason == reason and failed.times == []
    assert good.times


def test_a_missing_peer_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.delitem(sys.modules, "liger_kernel.chunked_loss", raising=False)
    (cell,) = measured("Liger JSD")
    assert cell.reason.startswith("missing (") and "liger_kernel" in cell.reason


def test_freed_memory_hides_nothing():
    measure.keep_freed_blocks(below=32 * measure.MIB)
    blocks = [torch.zeros(2**20) for _ in range(40)]  # 160 MiB in small blocks
    del blocks[:-1]  # stay resident beneath the last one
    peak = measure.Peak("cpu")
    used = torch.zeros(25 * 2**20)
    assert 95 < peak.extra() < 115
    assert len(used) and len(blocks)


def test_a_peers_memory_is_the_budget():
    run = run_of()
    run.cells[measure.key("JSD(0.9)", "Liger JSD")] = measure.Cell("", "", extra_info={"extra_mib": 12.5})
    name = peers.IN_THE_MEMORY_OF + "Liger JSD"
    assert run._implementation(name, JSD, measure.Cell("", "")).memory_budget == 12.5 * 2**20
    unknown = measure.Cell("", "")
    assert run._implementation(peers.IN_THE_MEMORY_OF + "TRL GKD", JSD, unknown) is None
    assert unknown.reason


# ---- report and comparison -------------------------------------------------------------------------------------------


@pytest.fixture
def stored() -> dict:
    """What a run leaves, by hand."""

    def cell(implementation: str, tokens: int, ratio: float) -> dict:
        bare = tokens * 1e-3
        return {
            "case": f"N {tokens}",
            "models": "some models",
            "tokens": tokens,
            "response": 256,
            "operand": "bfloat16",
            "trained": True,
            "loss": "JSD(0.9)",
            "implementation": implementation,
            "rounds": 5,
            "forward_s": ratio * bare,
            "backward_s": 0.0,
            "full_s": ratio * bare,
            "bare_gemms_s": bare,
            "bare_gemms_rows": 512,
            "bare_gemms_operand": "float32" if tokens == 4096 else "bfloat16",
            "ratio": ratio,
            "extra_mib": 300.0,
            "error": 1e-3,
            "yardstick": 1e-3,
            "tflops": 1.0,
            "gbs": 2.0,
        }

    rows = [cell("kdkernels", 1024, 1.07), cell("kdkernels", 4096, 1.09), cell("eager PyTorch", 1024, 7.0)]
    about = {"machine": "m", "device": "d", "threads": 2, "clocks": "", "driver": "", "backend": "native"}
    about |= {"python": "3", "versions": {"torch": "2"}, "commit": "abc", "modified": False}
    oom = {"case": "N 4096", "loss": "JSD(0.9)", "implementation": "eager PyTorch", "reason": "out of memory"}
    return {
        "machine_info": about,
        "datetime": "2026-01-01T00:00:00",
        "shapes": "cpu",
        "benchmarks": [{"name": "test_loss", "extra_info": row} for row in rows]
        + [{"name": "test_import", "extra_info": {"import_ms": 40.0}}],
        "refused": [oom],
    }


def test_report_of_stored_numbers(stored, tmp_path):
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(stored))
    written = report.write(path)
    text = written.read_text()
    assert written == tmp_path / "report.md"
    assert "| JSD(0.9) | kdkernels | bfloat16 | 1024 | 1.070 | 1.08 | holds |" in text
    assert "| JSD(0.9) | kdkernels | bfloat16 | 4096 | 1.090 | 1.08 | **missed** |" in text
    assert text.count("Bare GEMMs of float32 operands, torch has nothing faster here: with a teacher 4096.0 ms") == 1
    assert "| JSD(0.9) | eager PyTorch | out of memory |" in text and "| import | import_ms | 40 |" in text


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("peers_at", "title"), [([1024], "N 1024"), ([1024, 4096], "JSD(0.9), forward and backward")])
def test_plots(stored, tmp_path, peers_at, title):
    pytest.importorskip("matplotlib")
    eager = stored["benchmarks"][2]["extra_info"]
    more = [eager | {"case": f"N {tokens}", "tokens": tokens} for tokens in peers_at[1:]]
    stored["benchmarks"] += [{"name": "test_loss", "extra_info": row} for row in more]
    text = report.render(stored, tmp_path)
    assert f"![{title}" in text and "](some-models.png)" in text
    assert (tmp_path / "some-models.png").stat().st_size > 10_000


def test_no_plots_without_matplotlib(stored, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "No plots: matplotlib is not installed here." in report.render(stored, tmp_path)
    assert not list(tmp_path.iterdir())


def drawn(random, names=7, rounds=10, slower=1.0, of_a_round=0.03, of_a_process=0.015) -> compare.Rounds:
    """What a process measures on a machine that is twice as slow now and then, where whole processes differ too."""

    def round_of(ours):
        machine = random.choice([0.1, 0.2])
        return [machine * part * math.exp(random.gauss(0, of_a_round)) for part in (ours, 1.0)]

    shifts = [math.exp(random.gauss(0, of_a_process)) for _ in range(names)]
    return {f"row {n}": [round_of(0.7 * slower * shift) for _ in range(rounds)] for n, shift in enumerate(shifts)}


def test_comparison_is_silent_on_unchanged_code_and_hears_a_tenth():
    random, silent, heard = Random(0), 0, []
    for _ in range(100):
        stored = [drawn(random) for _ in range(compare.PROCESSES)]
        silent += compare.compare(stored, lambda: drawn(random))[1]
        table, good = compare.compare(stored, lambda: drawn(random, slower=1.1))
        assert not good
        heard.append(table.count("**slower**"))
    assert silent >= 99 and sum(heard) > 0.9 * 7 * 100


def test_comparison_asks_further_processes_before_it_says_slower():
    stored = [{"a": [[1.0, 1.0]], "b": [[1.0, 1.0]]}] * 3
    outcomes = [{"a": [[a * 2, 2.0]], "b": [[1.01, 1.0]]} for a in (1.2, 0.86)]
    left = list(outcomes)
    table, good = compare.compare(stored, lambda: left.pop(0))
    assert good and not left and "| a | 1.000 | 1.030 |  |" in table
    table, good = compare.compare(stored, lambda: outcomes[0])
    assert not good and table.count("**slower**") == 1 and "| a | 1.000 | 1.200 | **slower** |" in table
    table, good = compare.compare(stored, lambda: {"a": [[1.0, 1.0]]})
    assert not good and "| b | 1.000 | inf | **slower** |" in table


def test_rounds_are_pairs_with_the_bare_gemms():
    (cell,) = measured("kdkernels")
    pairs = cell.extra_info["rounds_s"]
    assert len(pairs) == len(cell.times) and [ours for ours, _ in pairs] == [sum(times) for times in cell.times]
    assert cell.extra_info["bare_gemms_s"] in [bare for _, bare in pairs]


def test_without_units_for_16_bits_the_yardstick_is_fp32(monkeypatch):
    monkeypatch.setattr(gemms.gemm, "torch_crawls", lambda operand: True)
    ours, peer = measured("kdkernels", "eager PyTorch", operand="bfloat16")
    assert ours.reason == "" and ours.extra_info["bare_gemms_operand"] == "float32"
    assert peer.reason.startswith("left out: its 16-bit products") and peer.times == []
    ours, peer = measured("kdkernels", "eager PyTorch")
    assert ours.extra_info["bare_gemms_operand"] == "float32" and peer.reason == ""
    assert run.usual_shapes("cpu") == "cpu-avx2"
    (batch,) = cases.batches(cases.Case(cases.TINY, 64, (), (), "bfloat16"), "cpu", 1)
    bare = gemms.BareGemms(batch)
    bare(batch, 64, teacher=True)
    x, w = (t.detach().float() for t in (batch.hidden_s.flatten(0, 1), batch.weight_s))
    assert bare.d_x.dtype == bare.d_w.dtype == torch.float32
    torch.testing.assert_close(bare.d_x, x @ w.t() @ w, rtol=1e-3, atol=1e-3)


def test_no_limit_without_a_loss():
    assert all(loss in cases.LOSSES and math.isfinite(limit) for (_, loss, *_), limit in report.LIMITS.items())


def test_a_divided_vocabulary_beside_one_process():
    """The script of docs/RESULTS.md: two processes are as near to fp64 as one, with half the weights each."""
    options = ("--vocabulary", "3001", "--tokens", "8")
    command = [sys.executable, str(ROOT / "benchmarks/divided.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")]
    errors = {name: [float(each) for each in values] for name, *values in rows[2:5]}
    assert [*errors] == ["loss", "dX", "dW"]
    for eager, one, two in errors.values():
        assert 0 < two < 2 * max(eager, one) < 1e-5
    sizes = {name: [float(each) for each in values] for name, *values in rows[7:9]}
    assert [*sizes] == ["weights", "dW"]
    for one, each in sizes.values():
        assert 0 < each <= one / 2 + 1
