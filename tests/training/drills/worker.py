"""Runs of kdkernels in forked processes: as real as a started one, without the seconds that importing takes.

`python worker.py` under LD_PRELOAD=faults.so reads one job a line from stdin, a JSON object, and answers with one line:

arguments   of the command kdkernels
processes   how many share the run (1)
fault       [mode, match, at] for faults.c, and `rank`: the process that meets it (0)
signal      [number, path]: the signal for all processes once `path` is there
stdout      where the lines for people go (with the others into `output`)
in_parts    whether ZeRO-3 parts weights as small as those of tests (no)
kill_after  seconds after which all processes are killed

Answer: `statuses` (of a killed process, minus the signal), `output` and the `events` of the process `rank`.
"""

import ctypes
import glob
import json
import os
import signal
import socket
import sys
import tempfile
import time

MODES = {"off": 0, "kill": 1, "full": 2}
PATIENCE = 120  # seconds that a run of the drills may take


def child(job: dict, rank: int, port: int, output: int, events: int) -> None:
    """One process of a run; does not return."""
    os.dup2(os.open(job["stdout"], os.O_WRONLY) if "stdout" in job else output, 1)
    os.dup2(output, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if job.get("processes", 1) > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"])}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    faults = ctypes.CDLL(None)
    status = 70
    try:
        from kdkernels.cli import main
        from kdkernels.training import deepspeed_strategy

        if job.get("in_parts"):
            deepspeed_strategy.STAY_WHOLE = 0
        if rank == job.get("rank", 0) and "fault" in job:
            mode, match, at = job["fault"]
            faults.faults_arm(MODES[mode], match.encode(), ctypes.c_long(at))
        status = main(job["arguments"])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        faults.faults_events.restype = ctypes.c_long
        if rank == job.get("rank", 0):
            os.write(events, str(faults.faults_events()).encode())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(job: dict) -> dict:
    """The answer to a job."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as events:
        started, running, statuses = time.monotonic(), {}, {}
        for rank in range(job.get("processes", 1)):
            pid = os.fork()
            if pid == 0:
                child(job, rank, port, output.fileno(), events.fileno())
            running[pid] = rank

        def send(number: int) -> None:
            for pid in running:
                os.kill(pid, number)

        sent, alone_since = False, None
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)
                alone_since = time.monotonic()
                continue
            passed = time.monotonic() - started
            if "signal" in job and not sent and glob.glob(job["signal"][1]):
                sent = True
                send(job["signal"][0])
            lost = alone_since is not None and time.monotonic() - alone_since > 20  # as a launcher does
            if lost or passed > job.get("kill_after", PATIENCE):
                send(signal.SIGKILL)
            time.sleep(0.002)
        output.seek(0)
        events.seek(0)
        return {
            "statuses": [statuses[rank] for rank in sorted(statuses)],
            "output": output.read().decode(errors="replace"),
            "events": int(events.read() or 0),
            "seconds": time.monotonic() - started,
        }


def main() -> None:
    """Answers jobs until stdin ends."""
    import kdkernels.training.command  # noqa: F401  before the forks

    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a fork would lose {len(threads) - 1} threads"
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
