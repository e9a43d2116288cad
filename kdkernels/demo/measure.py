"""python measure.py FILE COMMAND ...: runs the command and writes its seconds and peak resident memory to the file.

A script of its own, without the package: Linux counts the memory of the process that forks towards the peak of the one
it starts, so the former must be small.
"""

import json
import resource
import subprocess
import sys
import time

started = time.monotonic()
status = subprocess.call(sys.argv[2:])
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024  # MiB
with open(sys.argv[1], "w", encoding="utf-8") as file:
    json.dump({"seconds": time.monotonic() - started, "peak": peak}, file)
sys.exit(status)
