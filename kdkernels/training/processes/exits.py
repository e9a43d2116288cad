"""The exit statuses of `kdkernels`, and the line that goes with each."""

import os
import sys

from kdkernels.errors import InputError, MissingPackage, ServerError
from kdkernels.training.errors import Collapsed, DiskError

DONE, DIVERGED, UNUSABLE, DISK, LOST, COLLAPSED, SERVER, UNFORESEEN, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 70, 130
STATUSES = """\
exit status, each but the first with a line that says why:
  0    the run is finished; or SIGTERM came, a checkpoint was written after the step under way, and --resume goes on
  1    the run diverged
  2    recipe, data, models or the run's directory cannot be used (another run may be in it), or the command line
  3    the disk did not take what the run had to write, for want of space or else
  4    another process of the run ended or stopped answering
  5    the student collapsed: its entropy or the length of its responses left the limits of [collapse]
  6    a server that the run needs (a teacher, a sampler) did not answer, or not with what was asked for
  70   an error that none of these is, with a traceback: out of memory, or a fault of kdkernels
  130  interrupted (Ctrl-C)
"""

FORESEEN = {
    FloatingPointError: DIVERGED,
    InputError: UNUSABLE,
    MissingPackage: UNUSABLE,
    OSError: UNUSABLE,
    DiskError: DISK,
    Collapsed: COLLAPSED,
    ServerError: SERVER,
}


def status_of(error: BaseException) -> int | None:
    """The exit status of an error that commands foresee; None for any other."""
    return next((status for kind, status in FORESEEN.items() if isinstance(error, kind)), None)


def end(status: int, text: object) -> int:
    """Says `text` in one line on stderr.

    Returns:
        `status`.
    """
    try:
        sys.stdout.flush()
    except OSError:  # Python would try again at its end, and end with another status
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    print(f"kdkernels: {' '.join(str(text).split())}", file=sys.stderr)
    return status
