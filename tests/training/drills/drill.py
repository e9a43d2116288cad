"""Runs under faults of the file system, for the drills and their representatives in the default suite."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def compile_faults(directory: Path) -> Path:
    """faults.so, compiled into `directory`."""
    library = directory / "faults.so"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, HERE / "faults.c", "-ldl"], check=True)
    return library


class Worker:
    """A process that runs jobs (worker.py says what a job is), one after the other."""

    def __init__(self, faults: Path):
        environment = os.environ | {
            "LD_PRELOAD": str(faults),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(HERE.parents[2]),
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, **job: Any) -> dict[str, Any]:
        """The answer to the job of `kdkernels train` with `arguments`."""
        self.process.stdin.write(json.dumps(job | {"arguments": ["train", *map(str, arguments)]}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the worker died"
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.process.stdout.close()
