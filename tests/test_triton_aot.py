"""Every Triton kernel variant compiles for three generations of GPUs and none spills; no GPU needed.

By default the usual variants (triton_resources.py); all others under ``slow``.
"""

import re
from pathlib import Path

import pytest
import triton

from kdkernels.kernels.triton import resources as triton_resources
from kdkernels.kernels.triton.ahead import compiled

DOCUMENT = Path(__file__).parent.parent / "docs" / "triton-resources.md"


@pytest.fixture(autouse=True)
def compiles(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def test_no_usual_variant_spills_on_an_h100():
    resources = triton_resources.measure(triton_resources.usual, targets=(90,))
    assert len(resources) >= 70
    spilling = [variant.name for variant, (each,) in resources.items() if each.stack]
    assert not spilling, f"spills: {spilling}"


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [True, False], ids=["usual", "others"])
def test_no_variant_spills(wanted, capsys):
    """Nor has a usual one other resources than docs/triton-resources.md says (with the Triton it was made with)."""
    resources = triton_resources.measure(lambda variant: triton_resources.usual(variant) == wanted)
    table = triton_resources.table(resources)
    with capsys.disabled():
        print(f"\n{table}")
    documented = DOCUMENT.read_text().splitlines()
    if wanted and f"triton {triton.__version__}." in documented[2]:
        assert [line for line in table.splitlines() if line not in documented] == []
    assert len(resources) >= 70
    spilling = [variant.name for variant, each in resources.items() if any(r.stack for r in each)]
    assert not spilling, f"spills: {spilling}"
    assert all(0 < r.registers <= 128 for each in resources.values() for r in each)
    for variant, each in resources.items():  # what make gpu-check has racecheck look at
        reduces = not variant.name.startswith(("scatter", "gradient"))
        assert all((r.shared > 0) == reduces for r in each), variant.name


def test_sweeps_take_as_few_instructions_as_documented(capsys):
    """Of rows of any length, loaded and stored 16 bytes at a time: those of a buffer are padded (memory.py)."""
    loops = triton_resources.loops()
    table = triton_resources.counts(loops)
    with capsys.disabled():
        print(f"\n{table}")
    documented = DOCUMENT.read_text().splitlines()
    if f"triton {triton.__version__}." in documented[2]:
        assert [line for line in table.splitlines() if line not in documented] == []
    assert {dtype for dtype, _ in loops} == {"fp32", "bf16"} and len(loops) == 8
    for (dtype, divergence), sweeps in loops.items():
        statistics, value, gradient = (loop.per_entry for loop in sweeps)
        assert 10 < statistics < 18 and min(value, gradient) > 10
        if divergence == "JSD(0.9)":
            assert 2 * statistics + value + gradient <= 120
        itemsize, reads = 4 if dtype == "fp32" else 2, (1, 2, 2)
        for loop, read in zip(sweeps, reads, strict=True):
            moved = [text for text in loop.instructions if re.search(r"\b(LDG|STG)\b", text)]
            loads = [text for text in moved if text.startswith("LDG.E.128 ")]  # none is masked
            assert len(loads) * 16 == read * itemsize * loop.entries
            assert loads == [text for text in moved if "LDG" in text]
        stores = [text for text in sweeps[2].instructions if "STG" in text]
        assert stores and all(text.startswith("STG.E.128 ") for text in stores)


def test_calls_without_ids_are_among_them():
    names = [variant.name for variant in triton_resources.variants()]
    assert len(set(names)) == len(names)
    assert sum(name.startswith("candidates: ") and name.endswith(", without ids") for name in names) == 6


@pytest.mark.parametrize("capability", [90, *(pytest.param(one, marks=pytest.mark.slow) for one in (80, 100))])
def test_gradients_read_all_of_a_block_before_they_write(capability):
    """In the machine code a barrier stands between any load and the next store: what keeps in-place gradients safe."""
    chosen = [v for v in triton_resources.variants() if v.name.startswith("gradient: fp32, JSD")]
    assert len(chosen) == 3
    for variant in chosen:
        wanted = variant.targets[capability]
        code = triton_resources.dump(compiled([wanted])[wanted].cubin, "-sass")
        order = re.findall(r"\b(LDG|STG|BAR)\b", code)
        assert {"LDG", "STG", "BAR"} <= set(order)
        stores = [i for i, each in enumerate(order) if each == "STG"]
        before = [next(each for each in reversed(order[:i]) if each != "STG") for i in stores]
        assert set(before) == {"BAR"}, f"{variant.name}: {order}"
