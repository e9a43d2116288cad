"""The report of made-up results: the numbers that are in them, and readings that follow from the intervals."""

import numpy as np
import pytest

from kdkernels.demo.phases import PHASES, TEACHER, Cost
from kdkernels.demo.plots import plot_accuracy, plot_curves
from kdkernels.demo.report import difference, interval, render
from kdkernels.demo.results import Arm
from kdkernels.demo.statistics import bootstrap_mean
from kdkernels.training.evaluation import wilson

PROBLEMS = 500
SHARES = {"teacher": 0.98, "student": 0.3, "sft": 0.5, "gkd": 0.8, "tsd-kd-scaled": 0.75, "tsd-kd": 0.02}
METRICS = {"loss": 0.5, "direct": 0.1, "student_entropy": 0.3, "teacher_entropy": 0.1, "gate": 0.5}


def make_arm(phase, seeds, shares=SHARES):
    right = np.zeros((1 if phase is TEACHER else seeds, PROBLEMS), dtype=bool)
    right[:, : int(PROBLEMS * shares.get(phase.name, 0.6))] = True
    line = METRICS | {"tokens": 40, "student_length": 38.0, "time/rollout": 2.0, "time/student": 1.0}
    if phase.solutions:
        del line["teacher_entropy"]
    steps = tuple([line | {"step": step} for step in (1, 2, 3)] for _ in right)
    return Arm(phase, right, np.ones_like(right), steps, tuple(Cost(20.0 + seed, 512) for seed in range(len(right))))


def make_arms(seeds=1, shares=SHARES):
    return [make_arm(phase, seeds, shares) for phase in PHASES]


def row(report, start):
    return next(line for line in report.splitlines() if line.startswith(f"| {start} |"))


def test_every_number_is_in_its_row():
    report = render(make_arms(), 312.4, 2)
    assert "500 held-out problems, 1 seed, 312 seconds in all on 2 cores" in report
    low, high = wilson(400, 500)
    assert row(report, "GKD") == (f"| GKD | 80.0 % | {100 * low:.1f} to {100 * high:.1f} | 100.0 % | 3 | 120 | none |")
    assert row(report, "continued SFT").endswith("| 3 | 120 | 600 |")
    assert "| +50.0 |" in row(report, "GKD - starting student")
    assert row(report, "gkd") == "| gkd | 20 | 6.0 | 0.0 | 3.0 | 0.0 | 0.0 | 512 |"
    assert report.count("yes") == 3
    assert "NO" not in report


def test_readings_follow_from_the_intervals():
    report = render(make_arms(shares=SHARES | {"sft": 0.78, "tsd-kd-scaled": 0.8}), 1.0, 2)
    readings = [line for line in report.splitlines() if line.startswith("| TSD-KD, scaled")][1:]
    assert [line.rsplit("| ", 1)[1] for line in readings] == ["better |", "undecided |"]
    assert next(
        line for line in report.splitlines() if line.startswith("| TSD-KD, the paper") and " - " in line
    ).endswith("| worse |")


def test_what_was_expected_and_did_not_come_is_said():
    report = render(make_arms(shares=SHARES | {"teacher": 0.45, "gkd": 0.4}), 1.0, 2)
    assert "at least 20 points better than the starting student: **NO**" in report
    assert "GKD is better than continued SFT: **NO**" in report
    assert "TSD-KD with scaled weights is better than continued SFT: yes" in report


def test_several_seeds_have_a_column_and_intervals_of_their_own():
    arms = make_arms(seeds=3)
    gkd = next(arm for arm in arms if arm.phase.name == "gkd")
    gkd.right[1] = False
    report = render(arms, 900.0, 2)
    assert "500 held-out problems, 3 seeds" in report
    assert "| 80.0 0.0 80.0 |" in row(report, "GKD")
    assert "seeds and problems" in report
    assert interval(gkd) == bootstrap_mean(gkd.right.astype(float))
    assert interval(gkd)[1] - interval(gkd)[0] > 0.4
    teacher = arms[0]
    mean, (low, high) = difference(teacher, gkd)  # one row against three
    assert mean == pytest.approx(0.98 - 0.8 * 2 / 3)
    assert low < mean < high
    assert row(report, "gkd").startswith("| gkd | 21 |")


def test_figures(tmp_path):
    arms = make_arms(seeds=2)
    for plot in (plot_accuracy, plot_curves):
        path = tmp_path / f"{plot.__name__}.png"
        plot(arms, path)
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 10_000
