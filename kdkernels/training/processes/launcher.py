"""What a launcher such as torchrun tells the processes that it starts."""

import os

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ


def first() -> bool:
    """Whether this process is the first of those that the launcher started, or the only one."""
    return os.environ.get("RANK", "0") == "0"
