"""The command `kdkernels`: the trainer's commands, and those of packages above it."""

from collections.abc import Sequence

from kdkernels.curation import cli as curation
from kdkernels.training import cli

COMMANDS = (*cli.COMMANDS, curation.add)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status (training/processes/exits.py)."""
    return cli.main(arguments, COMMANDS)
