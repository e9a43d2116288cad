"""A worker that runs jobs under faults, and a task whose recipe has everything that a run leaves on the disk."""

from pathlib import Path

import pytest
import torch

from kdkernels.training import load_config
from kdkernels.training.models.loading import load_student, load_tokenizer
from kdkernels.training.processes import distributed
from kdkernels.training.run.metrics import read_metrics

from ..conftest import final_weights, write_task
from .drill import Worker, compile_faults

TIMES = ("time/", "tokens_per_second", "peak_memory_gib")
SETTINGS = (
    "objective.name=GKD",
    "rollout.student_fraction=0.5",
    "train.steps=3",
    "train.batch_size=2",
    "train.micro_batch_size=1",
    "checkpoint.every=1",
    'evaluation.metrics=["cross_entropy", "kl"]',
    "evaluation.limit=2",
    "evaluation.every=2",
)


@pytest.fixture(scope="session")
def worker(tmp_path_factory):
    worker = Worker(compile_faults(tmp_path_factory.mktemp("faults")))
    yield worker
    worker.close()


class Task:
    """Jobs of one recipe: `task.run("name", "--resume", fault=...)` runs it in a directory of that name."""

    def __init__(self, worker: Worker, root: Path, settings: tuple[str, ...]):
        self.worker, self.root = worker, root
        self.recipe = write_task(root)
        config = load_config(self.recipe)
        tokenizer = load_tokenizer(config)
        torch.manual_seed(7)
        load_student(config, tokenizer).save_pretrained(root / "teacher")
        tokenizer.save_pretrained(root / "teacher")
        self.settings = (*settings, f"teacher.path={root / 'teacher'}", f"evaluation.data={root / 'test.jsonl'}")
        self.expected = {}

    def run(self, name: str, *arguments: str, **job):
        """The worker's answer."""
        overrides = (f"--set={text}" for text in (*self.settings, f"run.output={self.root / name}"))
        return self.worker.run(self.recipe, *overrides, *arguments, **job)

    def whole(self, *arguments: str, processes: int = 1):
        """(weights, log) of a run that nothing disturbed."""
        key = (*arguments, processes)
        if key not in self.expected:
            name = f"whole-{len(self.expected)}"
            answer = self.run(name, *arguments, processes=processes)
            assert answer["statuses"] == [0] * processes, answer["output"]
            self.expected[key] = self.left_by(name)
        return self.expected[key]

    def left_by(self, name: str):
        """(weights, log without times) of the finished run in the directory of that name."""
        return final_weights(self.root / name), self.log(name)

    def log(self, name: str):
        """The log without times."""
        return [
            {key: value for key, value in line.items() if not key.startswith(TIMES)}
            for line in read_metrics(self.root / name / "metrics.jsonl")
        ]

    def check_left_by(self, name: str, *arguments: str, processes: int = 1) -> None:
        """Nothing is lost, nothing is wrong: weights and log of the run are those of an undisturbed one, to the bit,
        and no rubbish is left.
        """
        (weights, log), (expected, expected_log) = self.left_by(name), self.whole(*arguments, processes=processes)
        assert log == expected_log and len(log) > 2
        assert weights.keys() == expected.keys() and len(weights) > 5
        assert all(torch.equal(weight, expected[key]) for key, weight in weights.items())
        left = [path.name for path in (self.root / name).rglob("*")]
        assert not [path for path in left if path.startswith("unfinished") or path == "run.lock"]
        assert "report.md" in left


@pytest.fixture(scope="session")
def task(worker, tmp_path_factory) -> Task:
    distributed.start()
    return Task(worker, tmp_path_factory.mktemp("task"), SETTINGS)


def only_line(answer) -> str:
    """The one line with which the command ended; nothing of a traceback is beside it."""
    said = [line for line in answer["output"].splitlines() if line.startswith("kdkernels: ")]
    assert len(said) == 1 and "Traceback" not in answer["output"] and "Error" not in answer["output"], answer["output"]
    return said[0]
