"""Row kernels in Triton: backend.py is what the registry loads."""
