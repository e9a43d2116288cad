"""What a run leaves on disk: checkpoints whole or absent, a log without gaps and doubles, one run in one place."""

import shutil

import pytest

from kdkernels.training.processes import distributed
from kdkernels.training.run import atomic, checkpoint
from kdkernels.training.run.directory import RunDirectory
from kdkernels.training.run.log import MetricsLog
from kdkernels.training.run.metrics import evaluations, read_metrics


@pytest.fixture(autouse=True)
def started():
    distributed.start()


def write_step(directory, step, text="weights"):
    atomic.write_directory(directory / f"step-{step:06d}", lambda path: (path / "model.pt").write_text(text))


def test_a_write_cut_short_leaves_the_earlier_checkpoints(tmp_path):
    write_step(tmp_path, 1)

    def killed(path):
        (path / "model.pt").write_text("half of the wei")
        raise KeyboardInterrupt

    for _ in range(2):  # the second time over the remains of the first
        with pytest.raises(KeyboardInterrupt):
            atomic.write_directory(tmp_path / "step-000002", killed)
        assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000001"]
        assert (tmp_path / "step-000001" / "model.pt").read_text() == "weights"
    write_step(tmp_path, 2)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000001", "step-000002"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_a_deletion_cut_short_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    write_step(tmp_path, 1)
    write_step(tmp_path, 2)

    def killed(path, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            atomic.shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else killed(path)
        )
        atomic.remove(tmp_path / "step-000001")
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000002"]


def test_a_directory_is_replaced_as_a_whole(tmp_path):
    write_step(tmp_path, 1, "old")
    write_step(tmp_path, 1, "new")
    assert (tmp_path / "step-000001" / "model.pt").read_text() == "new"


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (999_999, 5, 1_000_000):
        write_step(tmp_path, step)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-000005", "step-999999", "step-1000000"]


def test_a_text_is_replaced_as_a_whole(tmp_path, monkeypatch):
    atomic.write_text(tmp_path / "config.toml", "old")

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(atomic, "_flush", killed)
        atomic.write_text(tmp_path / "config.toml", "new")
    assert (tmp_path / "config.toml").read_text() == "old"
    atomic.write_text(tmp_path / "config.toml", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


def test_the_log_forgets_what_came_after_the_checkpoint(tmp_path):
    run = RunDirectory(tmp_path)
    with MetricsLog(run, steps=9) as log:
        log.write(0, {"evaluation/kl": 3.0})
        for step in (1, 2, 3, 4):
            log.write(step, {"loss": step / 2})
            if step == 2:
                (tmp_path / "kept").mkdir()
                shutil.copy(run.metrics, tmp_path / "kept")  # as a checkpoint does
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    run.restore_log(tmp_path / "kept")
    with MetricsLog(run, steps=9, last_step=2) as log:
        log.write(3, {"loss": 7.0, "evaluation/kl": 1.0})
    lines = read_metrics(run.metrics)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert [line.get("loss") for line in lines] == [None, 0.5, 1.0, 7.0]
    assert evaluations(lines) == {0: {"kl": 3.0}, 3: {"kl": 1.0}}


def test_without_a_terminal_progress_is_a_few_plain_lines(tmp_path, capsys):
    with MetricsLog(RunDirectory(tmp_path), steps=100) as log:
        for step in range(1, 101):
            log.write(step, {"loss": 0.25, "tokens_per_second": 12.5, "gate": 0.5})
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 20 and lines[-1] == "step 100/100  loss 0.25  gate 0.5  tokens_per_second 12.5"
    assert printed.err == ""


def test_progress_shows_where_the_time_goes(tmp_path, capsys):
    """Of the last twenty steps: fifteen at 1 + 3 seconds, five at 2."""
    with MetricsLog(RunDirectory(tmp_path), steps=40) as log:
        for step in range(1, 41):
            rollout = {"time/rollout": 1.0} if step <= 35 else {}
            other = 3.0 if step <= 35 else 2.0
            log.write(
                step, {"loss": 0.25, "peak_memory_gib": 1.5} | rollout | {"time/loss": other if step > 20 else 99.0}
            )
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "step 40/40  loss 0.25  peak_memory_gib 1.5  seconds 3.5 (rollout 21%, loss 79%)"


def test_tensorboard_has_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDirectory(tmp_path)
    with MetricsLog(run, steps=3) as log:
        for step in (1, 2, 3):
            log.write(step, {"loss": step / 4})
    events = EventAccumulator(str(run.tensorboard)).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 0.25), (2, 0.5), (3, 0.75)]
