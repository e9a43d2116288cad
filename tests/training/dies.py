"""The command `kdkernels`, killed as by kill -9 before it writes its n-th file or takes its n-th step: run by
test_offline.py as a program, with n and the command's arguments.
"""

import os
import signal
import sys

from kdkernels.cli import main
from kdkernels.training import trainer
from kdkernels.training.offline import store

WRITE, STEP = store.write_bytes, trainer.train_step
left = int(sys.argv[1])


def count(path=None):
    global left
    left -= 1
    if left < 0:
        if path is not None:
            path.with_name("unfinished-" + path.name).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)


def write_bytes(path, contents):
    count(path)
    WRITE(path, contents)


def train_step(*given, **more):
    count()
    return STEP(*given, **more)


if __name__ == "__main__":
    store.write_bytes, trainer.train_step = write_bytes, train_step
    sys.exit(main(sys.argv[2:]))
