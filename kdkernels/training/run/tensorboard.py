"""What TensorBoard reads: one event file per start of a run, of the same numbers as metrics.jsonl.

torch's and TensorBoard's own writers write later, in a thread, whose failure (a full disk) is a traceback and then a
deadlock or a lost file; here a step's event is in the file when `write` returns.
"""

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from kdkernels.training.run.atomic import append, writing


class EventFile:
    """A new event file in `directory`; TensorBoard forgets what earlier files have of `first_step` and later."""

    def __init__(self, directory: Path, first_step: int):
        path = directory / f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        with writing(path):
            directory.mkdir(exist_ok=True)
            self.file = path.open("ab", buffering=0)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the numbers of `step`. Raises DiskError."""
        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._add(Event(wall_time=time.time(), step=step, summary=summary))

    def close(self) -> None:
        """Closes the file."""
        self.file.close()

    def _add(self, event: Event) -> None:
        record = io.BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append(self.file, record.getvalue())
