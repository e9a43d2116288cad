"""The demo's phases: recipes that load, paths that move, processes that are measured and stopped."""

import sys

import pytest

from kdkernels.demo import phases
from kdkernels.demo.phases import (
    FROM_STRONG_STUDENT,
    FROM_STUDENT,
    PHASES,
    RECIPES,
    STUDENTS,
    TEACHER,
    Workers,
    settings,
    train_commands,
)
from kdkernels.demo.run import MARKER, start_afresh, write_problems
from kdkernels.training import load_config


@pytest.fixture
def output(tmp_path, monkeypatch):
    """A demo's directory with problems and empty shells of the trained models; the recipes' own paths do not exist."""
    monkeypatch.chdir(tmp_path)
    output = tmp_path / "moved here"
    write_problems(output / "data")
    for name in ("teacher", "seed-3/student", "seed-3/strong-student"):
        (output / name / "final").mkdir(parents=True)
        (output / name / "final" / "config.json").write_text("{}")
    return output


def test_every_phase_is_a_recipe_with_all_its_paths_moved(output):
    configs = {}
    for phase in PHASES:
        config = load_config(RECIPES / f"{phase.recipe}.toml", settings(phase, output, 3))
        configs[phase.name] = config
        assert config.run.seed == 3
        assert config.run.output == str(phases.directory(phase, output, 3))
        assert config.evaluation.data == str(output / "data" / "test.jsonl")
        assert (phase.solutions is None) == (config.rollout.student_fraction == 1)
        assert config.data.train == str(output / "data" / f"{phase.solutions or 'new'}.jsonl")
    assert {configs[arm.name].student.path for arm in FROM_STUDENT} == {str(output / "seed-3/student/final")}
    strong = [configs[arm.name] for arm in FROM_STRONG_STUDENT]
    assert {config.student.path for config in strong} == {str(output / "seed-3/strong-student/final")}
    assert max(config.optimizer.lr for config in strong) < configs["gkd"].optimizer.lr
    assert len({config.run.output for config in configs.values()}) == len(configs)


def test_the_arms_have_the_same_budget_and_only_their_objective_differs(output):
    arms = [load_config(RECIPES / f"{phase.recipe}.toml", settings(phase, output, 3)) for phase in FROM_STUDENT]
    assert len({(arm.train, arm.optimizer, arm.rollout.max_new_tokens) for arm in arms}) == 1
    assert {arm.objective.name for arm in arms} == {"SFT", "GKD", "TSDKD"}


def test_student_and_teacher_differ_in_width_and_padded_vocabulary(output):
    teacher, student = (
        load_config(RECIPES / f"{phase.recipe}.toml", settings(phase, output, 3)).student
        for phase in (TEACHER, STUDENTS[0])
    )
    assert teacher.architecture["hidden_size"] != student.architecture["hidden_size"]
    assert teacher.pad_vocab_to != student.pad_vocab_to


def test_commands_are_named_by_their_directory_and_end_with_the_callers_overrides(tmp_path):
    commands = train_commands([TEACHER], tmp_path, [0], ["train.steps=2"])
    commands |= train_commands(FROM_STUDENT[:1], tmp_path, [0, 1], ["train.steps=2"])
    assert list(commands) == ["teacher", "seed-0/sft", "seed-1/sft"]
    for command in commands.values():
        assert command[-2:] == ["--set", "train.steps=2"]
        assert command[1:4] == ["-m", "kdkernels", "train"]


def python(text):
    return [sys.executable, "-c", text]


def test_workers_measure_every_process_by_itself(tmp_path, capfd):
    workers = Workers(tmp_path / "logs")
    big = "x = b'x' * (200 << 20); print('big is here', flush=True)"
    costs = workers.run({"big": python(big), "seed-0/small": python("import time; time.sleep(0.3); print(1 / 3)")})
    assert costs["big"].peak > 200 > costs["seed-0/small"].peak > 1
    assert 0.3 < costs["seed-0/small"].seconds < 30
    assert (tmp_path / "logs" / "big.log").read_text() == "big is here\n"
    assert "seed-0/small | 0.333" in capfd.readouterr().out


def test_workers_share_the_cores(tmp_path):
    workers = Workers(tmp_path / "logs")
    workers.cores = 4
    workers.run({name: python("import os; print(os.environ['OMP_NUM_THREADS'])") for name in "ab"})
    assert [(tmp_path / "logs" / f"{name}.log").read_text() for name in "ab"] == ["2\n", "2\n"]


def test_a_failure_names_the_log_and_stops_the_others(tmp_path):
    workers = Workers(tmp_path / "logs")
    workers.cores = 2
    slow = "import time; print('started', flush=True); time.sleep(60); print('went on')"
    with pytest.raises(RuntimeError, match=r"bad: exit status 3; its output is in .*bad\.log"):
        workers.run({"long": python(slow), "bad": python("print('why'); exit(3)"), "waiting": python(slow)})
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert logs.pop("bad.log") == "why\n"
    assert "went on" not in "".join(logs.values())
    assert not workers.running


def test_only_an_earlier_demo_is_deleted(tmp_path, capsys):
    output = tmp_path / "demo"
    start_afresh(output)
    assert [path.name for path in output.iterdir()] == [MARKER]
    (output / "old").mkdir()
    start_afresh(output)
    assert [path.name for path in output.iterdir()] == [MARKER]
    assert f"deleting the earlier demo in {output}" in capsys.readouterr().out

    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not of an earlier demo"):
        start_afresh(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
