"""How a run ends before its time, beside InputError (kdkernels/errors.py) and FloatingPointError (it diverged)."""


class DiskError(Exception):
    """What the disk did not take: the message names the path and says why."""


class Collapsed(Exception):
    """The student stayed beyond a limit of [collapse] for too long: the message says which."""


class Stopped(SystemExit):
    """The run was asked to end (SIGTERM) and can be continued: the message says from where.

    Uncaught, it ends the process without a word and with status 0.
    """

    def __init__(self, message: str):
        super().__init__(0)
        self.message = message

    def __str__(self) -> str:
        return self.message
