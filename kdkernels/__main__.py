"""`python -m kdkernels`, which torchrun can start: the command `kdkernels`."""

import sys

from kdkernels.cli import main

if __name__ == "__main__":
    sys.exit(main())
