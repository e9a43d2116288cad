"""What kernels and sources build on: matrix products (gemm), the range of fp16 (fp16), CPU memory (memory)."""
