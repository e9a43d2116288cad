"""kdkernels' command line where ZeRO-3 parts weights as small as those of tests, and memory that nobody has written to
is NaN: a program for a launcher.
"""

import sys

import torch

from kdkernels import cli
from kdkernels.training import deepspeed_strategy

if __name__ == "__main__":
    deepspeed_strategy.STAY_WHOLE = 0
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills torch.empty
    sys.exit(cli.main(sys.argv[1:]))
