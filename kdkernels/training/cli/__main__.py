"""`python -m kdkernels.training.cli`, which torchrun can start: the trainer's commands."""

import sys

from kdkernels.training.cli import main

if __name__ == "__main__":
    sys.exit(main())
