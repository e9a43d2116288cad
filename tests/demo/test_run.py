"""The whole demo with a handful of steps."""

import json

import pytest

from kdkernels.demo.__main__ import main
from kdkernels.demo.phases import FROM_STRONG_STUDENT, FROM_STUDENT, STUDENTS


@pytest.mark.slow
def test_the_whole_demo(tmp_path, capfd):
    output = tmp_path / "demo"
    small = ["--set", "train.steps=3", "--set", "evaluation.limit=12", "--set", "train.batch_size=4"]
    assert main(["--output", str(output), *small, "--set", "train.micro_batch_size=2"]) == 0
    report = (output / "report.md").read_text()
    assert report in capfd.readouterr().out
    assert "12 held-out problems, 1 seed" in report
    for name in ("accuracy.png", "curves.png"):
        assert (output / name).stat().st_size > 10_000

    arms = (*STUDENTS, *FROM_STUDENT, *FROM_STRONG_STUDENT)
    assert sorted(path.name for path in (output / "seed-0").iterdir()) == sorted(arm.name for arm in arms)
    last = {}
    for arm in arms:
        lines = (output / "seed-0" / arm.name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 3]
        last[arm.name] = json.loads(lines[-1])
        assert json.loads(lines[1])["gradient_norm"] > 0
    assert last["tsd-kd"]["indirect"] > last["tsd-kd-scaled"]["indirect"] > 0
    assert "gate" in last["tsd-kd"]
    assert "gate" not in last["gkd"]


def test_a_demo_that_cannot_run_says_why(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert main(["--output", str(tmp_path)]) == 1
    assert f"demo: --output {tmp_path}: not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--seeds", "0"])
    assert "expected an integer >= 1, got 0" in capsys.readouterr().err
