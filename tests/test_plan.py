"""How tokens are cut into chunks that fit a budget."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kdkernels as kd
from kdkernels.engine import gpu, plan, predict

LENGTHS = st.lists(st.integers(1, 40), max_size=12).map(tuple)


@settings(deadline=None, derandomize=True)
@given(lengths=LENGTHS, rows=st.integers(1, 60))
def test_chunks(lengths, rows):
    """Every token once and in order; whole responses where they fit; a longer one alone, in even pieces."""
    out = plan.chunks(lengths, rows)
    pieces = [piece for chunk in out for piece in chunk.pieces]
    assert [t for piece in pieces for t in range(piece.start, piece.stop)] == list(range(sum(lengths)))
    assert all(0 < piece.stop - piece.start <= rows for piece in pieces)
    assert [chunk.first for chunk in out] == [0, *(chunk.last for chunk in out)][: len(out)]
    for chunk in out:
        mine = lengths[chunk.first : chunk.last]
        assert chunk.pieces[0].start == sum(lengths[: chunk.first])
        assert sum(piece.stop - piece.start for piece in chunk.pieces) == sum(mine)
        if len(chunk.pieces) > 1:
            assert len(mine) == 1 and mine[0] > rows
            sizes = [piece.stop - piece.start for piece in chunk.pieces]
            assert max(sizes) - min(sizes) <= 1 and len(sizes) == -(-mine[0] // rows)
    for chunk, following in zip(out, out[1:], strict=False):  # nothing that would have fitted was left out
        assert sum(lengths[chunk.first : chunk.last]) + lengths[following.first] > rows


@pytest.mark.parametrize(
    ("border", "expected"),
    [
        (0, [(2, 5), (5, 9)]),
        (9, [(2, 5), (5, 9)]),
        (2, [(2, 5), (5, 9)]),
        (4, [(2, 4), (4, 6), (6, 9)]),
        (8, [(2, 5), (5, 8), (8, 9)]),
    ],
)
def test_no_slice_crosses_a_border(border, expected):
    assert [(each.start, each.stop) for each in plan.split(2, 9, 4, (border,))] == expected


@settings(deadline=None, derandomize=True)
@given(start=st.integers(0, 50), count=st.integers(1, 2000), tiles=st.integers(1, 5), step=st.sampled_from([4, 128]))
def test_slices_of_whole_tiles(start, count, tiles, step):
    """Every token once and in order, none beyond the most; only the last slice may end within a tile."""
    most = tiles * step
    out = plan.split(start, start + count, most, (), step)
    assert [t for each in out for t in range(each.start, each.stop)] == list(range(start, start + count))
    assert len(out) == -(-count // most)
    assert all(0 < each.stop - each.start <= most for each in out)
    assert all((each.stop - each.start) % step == 0 for each in out[:-1])
    assert plan.split(start, start + count, most + 1, (), step) == plan.split(start, start + count, most + 1)


@settings(deadline=None, derandomize=True)
@given(
    free=st.integers(1, 10**6),
    fixed=st.integers(0, 1000),
    student=st.integers(1, 5000),
    teacher=st.integers(0, 5000),
    tokens=st.integers(1, 2000),
    wanted=st.none()
    | st.tuples(st.integers(1, 9), st.integers(1, 9)).map(lambda n: gpu.ChunkRows(128 * max(n), 128 * min(n))),
)
def test_rows_fit_the_budget(free, fixed, student, teacher, tokens, wanted):
    budget = fixed + free
    if free < student + teacher:
        with pytest.raises(ValueError, match=rf"memory_budget.*{fixed + student + teacher} bytes.*{budget}"):
            plan.chunk_rows(budget, fixed, student, teacher, tokens, wanted)
        return
    rows, teacher_rows = plan.chunk_rows(budget, fixed, student, teacher, tokens, wanted)
    assert 1 <= rows <= tokens and 1 <= teacher_rows <= rows
    assert fixed + rows * student + teacher_rows * teacher <= budget
    if free >= tokens * (student + teacher):
        assert (rows, teacher_rows) == (tokens, tokens)
    elif wanted:
        assert rows in (tokens, rows // 128 * 128) or rows < 128
        assert teacher_rows in (rows, teacher_rows // 128 * 128) or teacher_rows < 128


def test_the_default_budget_at_a_real_size():
    """151936 entries in bf16: 1000 student rows or more a chunk; below, reading the weights dominates."""
    row = 2 * 151936
    rows, teacher_rows = plan.chunk_rows(plan.DEFAULT_BUDGET, 0, row, row, 16384)
    assert 1000 <= rows <= 1200 and 128 <= teacher_rows <= 256
    assert plan.chunk_rows(plan.DEFAULT_BUDGET, 0, row, row, 512) == (512, 512)


# ---- GPUs ------------------------------------------------------------------------------------------------------------

H100 = predict.known("H100")
MIB, GB = 2**20, 10**9


def sides(student=1536, teacher=5120, d_weight=True, logits_bytes=4) -> gpu.Products:
    return gpu.Products(student, teacher, True, d_weight, logits_bytes)


@pytest.mark.parametrize(("name", "rows"), [("A100", 512), ("H100", 1024), ("H200", 768), ("B200", 896)])
def test_rows_at_which_products_no_longer_wait(name, rows):
    """Adding to dW takes no longer than multiplying, from this tile on; the weights of the others are read by then."""
    model = predict.known(name)
    assert model.rows(sides()).student == rows

    def waits(rows: int, weight_bytes: int) -> bool:
        return 2 * rows / model.flops < weight_bytes / model.bandwidth

    assert not waits(rows, 8) and waits(rows - gpu.TILE, 8)
    assert not waits(model.rows(sides(d_weight=False)).student, 2)
    assert model.rows(sides(logits_bytes=2)).student * 2 <= 4 * rows  # no more bytes than fp32 logits take


def test_the_teachers_rows_are_balanced_with_the_students():
    """A wider teacher's weights are worth more rows; whatever the widths, the chunk is whole tiles."""
    teachers = [H100.rows(sides(1536, width)).teacher for width in (256, 1536, 5120, 10**6)]
    assert teachers == sorted(teachers) and teachers[0] < teachers[2] < teachers[3] == 1024
    assert H100.rows(sides(4096, 4096)) == (1024, 256) and H100.rows(sides(1536, 5120)) == (1024, 512)
    assert H100.rows(sides(0, 0, False)) == (512, 128), "logits that exist"


def properties(name: str, **more) -> SimpleNamespace:
    return SimpleNamespace(**{"name": name, "major": 9, "minor": 0, "total_memory": 80 * GB} | more)


H200_CLOCKS = {
    "multi_processor_count": 132, "clock_rate": 1_980_000, "memory_clock_rate": 3_201_000, "memory_bus_width": 6144,
}  # fmt: skip


def test_what_a_gpu_is():
    """A known name's figures; others from their clocks, or as an H100 where PyTorch does not know them."""
    known = {
        name: gpu.Gpu.of(properties(f"NVIDIA {name}"))
        for name in ("H100 80GB HBM3", "H100 PCIe", "H200", "GH200 480GB", "A100-SXM4-80GB", "B200")
    }
    assert known["H100 80GB HBM3"][1:] == H100[1:] and known["H100 PCIe"].flops < H100.flops
    assert known["GH200 480GB"].bandwidth < known["H200"].bandwidth < known["B200"].bandwidth
    assert gpu.Gpu.of(properties("a new one"))[1:3] == H100[1:3]
    as_told = gpu.Gpu.of(properties("a new one", **H200_CLOCKS))
    assert as_told.flops == pytest.approx(known["H200"].flops, rel=0.1)
    assert as_told.bandwidth == pytest.approx(known["H200"].bandwidth, rel=0.1)
    consumer = gpu.Gpu.of(properties("a card", **H200_CLOCKS | {"major": 8, "minor": 9}))
    assert consumer.flops == pytest.approx(as_told.flops / 4)


def default(tokens: int, sums: int = 0, allowance: int = 5 * GB, row: int = 4 * 151936) -> tuple[int, tuple[int, int]]:
    """Bytes and rows where nobody names a budget."""
    wanted, costs = H100.rows(sides()), (10 * MIB, row, row, tokens)
    budget = plan.default_budget(wanted, lambda: allowance, *costs, sums)
    return budget, plan.chunk_rows(budget, *costs, wanted)


def test_the_default_on_a_gpu():
    assert default(16384)[1] == (1024, 512)
    assert default(16384, allowance=600 * MIB)[0] == 600 * MIB
    assert default(16384, allowance=0)[0] == plan.DEFAULT_BUDGET == default(100)[0]
    assert plan.default_budget(None, pytest.fail, 0, 1, 1, 1, 0) == plan.DEFAULT_BUDGET
    rows, _ = default(16384, row=4 * 32000)[1]
    assert rows > 1500, "no less than before where an entry's logits are cheap"


def test_one_chunk_where_it_takes_no_more_than_the_sums_of_several():
    sums = 4 * 151936 * 1536
    assert default(1024 + 1536, sums)[1][0] == 1024 + 1536
    assert default(1024 + 1537, sums)[1][0] == default(2000)[1][0] == 1024
    assert default(1024 + 1536, sums, 1 * GB)[1][0] == 1024, "nor does it take what is not free"


def test_what_is_free_is_asked_of_the_driver(monkeypatch):
    told = {"mem_get_info": (8 * GB, 80 * GB), "memory_reserved": 3 * GB, "memory_allocated": 1 * GB}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(gpu, "this", lambda index: H100)
    for capturing, expected in ((False, 5 * GB), (True, 5 * GB)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert gpu.allowance(torch.device("cuda:0")) == expected
    told_less = 2 * GB
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (told_less, 80 * GB))
    assert gpu.allowance(torch.device("cuda:0")) == 5 * GB, "while a graph is captured nothing is asked"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert gpu.allowance(torch.device("cuda:0")) == 2 * GB
    assert gpu.wanted(torch.device("cuda:0"), sides()) == (1024, 512)
    assert gpu.wanted(torch.device("cpu"), sides()) is None


def test_info_states_the_default(monkeypatch):
    assert kd.info()["memory_budget"] == {"cpu": plan.DEFAULT_BUDGET}
    monkeypatch.setattr(gpu, "this", lambda index: H100)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told = kd.info()["memory_budget"]["cuda:0"]
    assert (told["gpu"], told["rows"], told["rows_frozen"], told["limit"]) == ("H100", 1024, 512, 5 * GB)


def test_the_table_is_what_is_computed():
    """python -m kdkernels.engine.predict > docs/gpu-defaults.md"""
    assert (Path(__file__).parents[1] / "docs" / "gpu-defaults.md").read_text() == predict.document()


def test_what_the_default_is_predicted_to_take():
    """A long list of positions in 0.7 GiB beyond dW's sums; more memory gains little, less loses much."""
    call = predict.Call(H100, 8192, 4096, 4096, 128256)
    assert call.memory <= 0.7 * 2**30
    times = [predict.Call(H100, 8192, 4096, 4096, 128256, budget=int(k * call.memory)).seconds() for k in (0.5, 1, 2)]
    assert times[0] > 1.15 * times[1] and times[1] < 1.07 * times[2]
    assert times[2] > predict.Call(H100, 8192, 4096, 4096, 128256).bare()
