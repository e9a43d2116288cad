"""pytest -p no_extension: as on a machine where kdkernels._C was never built."""

import sys

sys.modules["kdkernels.kernels.native"] = None  # importing it is an ImportError
