"""`kdkernels report`: numbers of logs that are known, side by side, and a figure that shows them."""

import json
import subprocess
import sys

import pytest
from matplotlib.image import imread

from kdkernels.errors import InputError
from kdkernels.training import train
from kdkernels.training.cli import main
from kdkernels.training.run import figure
from kdkernels.training.run.compare import read_runs, render

from .conftest import GKD


@pytest.fixture
def make(tmp_path):
    """make(name, lines, settings, finished): the directory of a run with this log."""

    def make(name, lines, settings='[train]\nsteps = 4\n[objective]\nname = "GKD"\n', finished=True):
        root = tmp_path / name
        (root / "final" if finished else root).mkdir(parents=True)
        (root / "config.toml").write_text(f'[run]\noutput = "{name}"\n{settings}')
        (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(root)

    return make


STEPS = [
    {"step": 0, "evaluation/kl": 2.0, "evaluation/exact_match": 0.25},
    {"step": 1, "loss": 4.0, "student_entropy": 1.5, "tokens": 30, "time/rollout": 1.0, "time/student": 2.0},
    {"step": 2, "loss": None, "tokens": 0, "time/rollout": 1.0, "skipped_steps": 1},
    {"step": 3, "loss": 2.0, "student_entropy": 0.5, "tokens": 20, "time/rollout": 2.0, "skipped_steps": 1},
    {"step": 4, "loss": 1.0, "tokens": 10, "time/student": 2.0, "skipped_steps": 1, "evaluation/kl": 0.5},
]


def cells(text, first):
    """The cells of the first table row that begins with `first`."""
    row = next(line for line in text.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_two_runs_side_by_side(make):
    settings = '[train]\nsteps = 9\n[objective]\nname = "SFT"\nreduction = "a|b"\n'
    other = make("b", [{"step": 1, "loss": 8.0, "time/student": 0.5, "tokens": 5}], settings, finished=False)
    runs = read_runs([make("a", STEPS), other])
    text = render(runs)
    assert f"- a: {runs[0].path}, finished; 3 steps, 1 more were skipped" in text
    assert f"- b: {other}, not finished, at step 1 of 9; 1 steps" in text
    assert cells(text, "loss") == ["4 → 1", "8"]
    assert cells(text, "student's entropy (nats)") == ["1.5 → 0.5", ""]
    assert "teacher's entropy" not in text
    assert cells(text, "steps") == ["0 → 4", ""]
    assert cells(text, "kl") == ["2.0000 → 0.5000 (-1.5000)", ""]
    assert cells(text, "exact_match") == ["0.2500 → not measured", ""]
    assert cells(text, "rollout") == ["1 (50%)", ""]  # of four steps, the skipped one too: 4 of 8 seconds
    assert cells(text, "student") == ["1 (50%)", "0.5 (100%)"]
    assert cells(text, "all") == ["2", "0.5"]
    assert cells(text, "response tokens a second") == ["7.5", "10"]
    assert cells(text, "objective.name") == ['`"GKD"`', '`"SFT"`']
    assert "run.output" not in text and r'| not set | `"a\|b"` |' in text
    assert "The objectives differ" in text


def test_means_over_tenths(make):
    lines = [{"step": i, "loss": float(i)} for i in range(1, 31)]
    text = render(read_runs([make("a", lines)]))
    assert cells(text, "loss") == ["2 → 29"]
    assert "## Settings\n" in text and cells(text, "train.steps") == ["`4`"] and text.startswith("# Run a\n")


def test_runs_without_steps_and_of_one_name(make):
    runs = read_runs([make("x/run", []), make("y/run", STEPS)])
    assert [run.name for run in runs] == ["x/run", "y/run"]
    text = render(runs)
    assert "0 steps" in text and cells(text, "loss") == ["", "4 → 1"] and cells(text, "all") == ["", "2"]
    assert "The objectives differ" not in text and "Settings that differ" not in text


def test_what_is_no_run(make, tmp_path):
    with pytest.raises(InputError, match=r"expected the directory of a run .* config\.toml is missing"):
        read_runs([str(tmp_path)])
    a = make("a", STEPS)
    with pytest.raises(InputError, match="expected every run once, got it twice"):
        read_runs([a, f"{a}/../a"])
    (tmp_path / "a" / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1: damaged"):
        read_runs([a])
    (tmp_path / "a" / "config.toml").write_text("x = 1")
    with pytest.raises(InputError, match=r"config\.toml is damaged"):
        read_runs([a])


def test_the_command(make, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = make("a", STEPS), make("b", [])
    assert main(["report", a, b]) == 0
    printed = capsys.readouterr().out
    written = (tmp_path / "kdkernels-report.md").read_text()
    report, _, files = printed.rpartition("\n\n")
    assert written == report + "\n\n![kdkernels-report.png](kdkernels-report.png)\n"
    assert files == "kdkernels-report.md, kdkernels-report.png\n"
    assert imread(tmp_path / "kdkernels-report.png").shape[1] > 1000
    assert main(["report", a, "--no-figure", "--output=new"]) == 0
    assert (tmp_path / "new.md").is_file() and not (tmp_path / "new.png").exists()
    assert main(["report", a, "--no-figure", "--output=missing/new"]) == 2
    assert "--output: missing/new.md cannot be written: No such file" in capsys.readouterr().err


def test_a_reader_that_has_gone(make, tmp_path):
    command = [sys.executable, "-m", "kdkernels", "report", make("a", STEPS), "--no-figure", f"--output={tmp_path}/out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        told = process.stderr.read()
    assert process.returncode == 3 and told == "kdkernels: standard output: cannot be written: Broken pipe\n"


def test_without_matplotlib(make, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "kdkernels.training.run.figure", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    a = make("a", STEPS)
    assert main(["report", a]) == 2
    assert "the figure needs matplotlib: pip install kdkernels[report], or --no-figure" in capsys.readouterr().err
    assert main(["report", a, "--no-figure"]) == 0


def test_runs_are_compared_without_torch(make, tmp_path):
    program = (
        "import sys; from kdkernels.training.cli import main; status = main(sys.argv[1:]); "
        "assert not {'torch', 'transformers', 'deepspeed'} & set(sys.modules); sys.exit(status)"
    )
    command = [sys.executable, "-c", program, "report", make("a", STEPS), f"--output={tmp_path / 'out'}"]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_what_the_figure_shows(make, tmp_path, monkeypatch):
    lines = [
        {
            "step": i,
            "loss": 1 / i,
            "student_entropy": 1.0,
            "teacher_entropy": 0.5,
            "time/rollout": 1.0,
            "time/optimizer": 2.0,
        }
        for i in range(1, 101)
    ]
    lines[49] |= {"loss": None}
    lines += [{"step": 101, "evaluation/kl": 0.25, "time/rollout": 1.0, "time/optimizer": 2.0}]
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    figure.draw(read_runs([make("a", lines), make("b", lines[:7])]), tmp_path / "out.png")
    panels = {axes.get_title(loc="left"): axes for axes in drawn[0].axes if axes.axison}
    assert list(panels) == ["loss", "entropy (nats)", "held-out: kl", "seconds of a step"]
    raw, mean = panels["loss"].lines[:2]
    assert list(raw.get_xdata()) == [i for i in range(1, 101) if i != 50] and raw.get_ydata()[1] == 0.5
    assert mean.get_ydata()[-1] == pytest.approx((1 / 98 + 1 / 99 + 1 / 100) / 3)  # a twenty-fifth of them
    assert panels["loss"].get_yscale() == "log" and panels["entropy (nats)"].get_yscale() == "linear"
    styles = [line.get_linestyle() for line in panels["entropy (nats)"].lines]
    assert styles == ["-", "-", "-", "--", "-", "--"] and panels["entropy (nats)"].get_legend() is not None
    assert list(panels["held-out: kl"].lines[0].get_ydata()) == [0.25]
    bars = [[bar.get_width() for bar in container] for container in panels["seconds of a step"].containers]
    assert bars == [[1.0, 1.0], [2.0, 2.0]]


def test_a_run_of_the_trainer(load, teacher_set, tmp_path):
    run = train(
        load(*GKD, teacher_set, f"evaluation.data={tmp_path / 'test.jsonl'}", 'evaluation.metrics=["kl"]')
    ).output
    text = render(read_runs([str(run)]))
    for row in ("loss", "student's entropy (nats)", "teacher's entropy (nats)", "student's length (tokens)", "rollout"):
        assert cells(text, row) != [""]
    assert "finished; 3 steps" in text and cells(text, "steps") == ["0 → 3"] and cells(text, "data.prompt")
