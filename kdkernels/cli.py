"""The command `kdkernels`: the trainer's commands, and those of packages above it."""

from collections.abc import Sequence
from functools import partial

from kdkernels.curation import cli as curation
from kdkernels.training import cli


def _compressor():
    """What `kdkernels train` makes the data of stages of compressed rationales with."""
    from kdkernels.compression import TeacherCompressor

    return TeacherCompressor()


TRAINING = [partial(cli.train.add, compressor=_compressor) if add is cli.train.add else add for add in cli.COMMANDS]
COMMANDS = (*TRAINING, curation.add)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status (training/processes/exits.py)."""
    return cli.main(arguments, COMMANDS)
