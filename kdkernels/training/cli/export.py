"""`kdkernels export`: a model of a checkpoint."""

import argparse
from pathlib import Path

from kdkernels.errors import InputError, MissingPackage
from kdkernels.training import with_reason
from kdkernels.training.errors import DiskError
from kdkernels.training.processes.exits import DISK, DONE, UNUSABLE, end


def add(commands) -> None:
    command = commands.add_parser(
        "export",
        help="make a model of a checkpoint",
        description="Writes the student of a checkpoint and its tokenizer as final/ has them at the end of a run.",
    )
    command.set_defaults(run=_run)
    command.add_argument("checkpoint", metavar="RUN/checkpoints/step-000123")
    command.add_argument("directory", metavar="DIRECTORY")


def _run(options: argparse.Namespace) -> int:
    try:
        with with_reason():
            from kdkernels.training.export import export  # torch, DeepSpeed, transformers: seconds
        export(Path(options.checkpoint), Path(options.directory))
    except (InputError, MissingPackage) as error:
        return end(UNUSABLE, error)
    except DiskError as error:
        return end(DISK, error)
    print(f"model: {options.directory}")
    return DONE
