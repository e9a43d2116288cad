"""Every implementation of every loss against the bare GEMMs. Run by benchmarks/run.py."""

import pytest
from cases import SETS


class Replay:
    """A timer that shows pytest-benchmark the rounds that were measured in turns with the other implementations."""

    def __init__(self):
        self.marks = []

    def load(self, seconds: list[float]) -> None:
        self.marks = [mark for each in seconds for mark in (0.0, each)]

    def __call__(self) -> float:
        return self.marks.pop(0)


REPLAY = Replay()


@pytest.mark.benchmark(timer=REPLAY)
def test_loss(cell, benchmark, measured, refused, request):
    number, name = cell
    result = measured(number)[name]
    if result.reason:
        case = SETS[request.config.getoption("--shapes")][number]
        refused.append(
            {"case": case.name, "loss": result.loss, "implementation": result.implementation, "reason": result.reason}
        )
        if result.reason.startswith("wrong") and result.implementation.startswith("kdkernels"):
            pytest.fail(result.reason)
        pytest.skip(result.reason)
    benchmark.extra_info.update(result.extra_info)
    seconds = [forward + backward for forward, backward in result.times]
    REPLAY.load(seconds)
    benchmark.pedantic(lambda: None, rounds=len(seconds))
