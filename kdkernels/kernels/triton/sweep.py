"""What the kernels of all sweeps share: how they are compiled and launched.

The mathematics is that of csrc/sweeps.h, all arithmetic is fp32. A sweep takes whole blocks of entries without a mask,
then what is left of the row with one.

Launch with ``enable_fp_fusion=False``. All kernels then compute the same z from the same logit: the top-k needs this,
because it compares entries with maxima that another kernel found, and identical logits cancel exactly. Where a
multiply-add may be fused, the code says so (``tl.fma``).

A masked entry (logit -inf) becomes masked(), -1e30: finite, so that the log-ratio of two masked entries is 0 instead of
NaN, and so small that its probability is 0. A NaN is never a maximum, but the row's sums become NaN.
"""

import triton

# By default the JIT compiles a kernel anew whenever an integer is 1 or divisible by 16, or an address is or is not.
# That pays for rows of logits alone, which are then loaded 16 bytes at a time. All other sizes and addresses change
# from chunk to chunk, so the JIT is told to ignore them.
_SIZES = ["groups", "k", "n_ids", "count"]
_SMALL = [
    "stats_ptr", "s_stats_ptr", "t_stats_ptr", "maxima_ptr", "values_ptr", "indices_ptr", "ids_ptr", "gathered_ptr",
    "sums_ptr", "dense_ptr", "scatter_ptr", "at_ids_ptr",
]  # fmt: skip
kernel = triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_SMALL)
