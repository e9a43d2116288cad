"""What row kernels and sources stand on: matrix products, fp16 without underflow, buffers."""
