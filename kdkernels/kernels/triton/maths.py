"""Elementary functions of the Triton kernels, logits as they read them, and where a row's statistics lie."""

import triton
import triton.language as tl

# Constants are functions: the JIT compares each global that a kernel reads with its old value at every launch (0.6 us).


@triton.constexpr_function
def masked():
    """Stands for a logit of -inf (sweep.py)."""
    return -1e30


@triton.constexpr_function
def infinite():
    """Only masked entries have a log-probability below minus this; a divergence above it met one."""
    return 1e12


@triton.jit
def exp_rough(x):
    """e^x with a relative error of about 1e-7 (1 + |x|): enough where a small e^x is added to larger numbers."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def exp(x):
    """e^x with a relative error of about 2e-7: the rounding of y = x log2(e), 7e-7 at |x| = 12, is corrected."""
    y = x * 1.4426950408889634
    e = tl.exp2(y)
    return tl.fma(e, tl.fma(y, -0.6931471805599453, x), e)


@triton.jit
def log(w):
    """log w of a normal w > 0 with a relative error of 2e-7; exactly 0 at 1, finite at infinity.

    w = 2^n (1 + f) with |f| <= 1/3.
    """
    bits = w.to(tl.int32, bitcast=True)
    power = (bits - 0x3F2AAAAB) & -0x800000  # n 2^23
    f = (bits - power).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, 0.140263631939888, -0.15388545393943787)  # log(1 + f) / f, minimax
    p = tl.fma(f, p, 0.13995805382728577)
    p = tl.fma(f, p, -0.1641595959663391)
    p = tl.fma(f, p, 0.20011168718338013)
    p = tl.fma(f, p, -0.2500782012939453)
    p = tl.fma(f, p, 0.33333197236061096)
    p = tl.fma(f, p, -0.49999937415122986)
    p = tl.fma(f, p, 1.0)
    return tl.fma(power.to(tl.float32), 8.262958294867817e-08, f * p)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, accurate where x is tiny: the rounding of 1 + x is divided out."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def tanh(y):
    a = tl.abs(y)
    y2 = y * y
    p = tl.fma(y2, -5.660788605e-03, 2.060200731e-02)  # (tanh(y) / y - 1) / y^2 in y^2, minimax on |y| <= 0.63
    p = tl.fma(p, y2, -5.372922989e-02)
    p = tl.fma(p, y2, 1.333132896e-01)
    p = tl.fma(p, y2, -3.333327832e-01)
    near = tl.fma(y, y2 * p, y)
    t = exp_rough(-2.0 * a)
    far = 1.0 - 2.0 * t / (1.0 + t)
    return tl.where(a < 0.625, near, tl.where(y < 0, -far, far))


@triton.jit
def over_temperature(x, inverse, inverse_rest):
    """x / T, with 1 / T as the sum of two numbers: rounded to one, it would belong to another temperature."""
    return tl.fma(x, inverse, x * inverse_rest)


@triton.jit
def _wide(x):
    """x in fp32. Of bf16 the bits are moved up: the second of a pair in a register is in its place already."""
    if x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def load_logits(x_ptr, entries, inside, scale, softcap, SOFTCAP: tl.constexpr, WHOLE: tl.constexpr):
    """z of a row's entries, -inf where not ``inside``; with ``WHOLE`` all are inside. ``scale`` None means 1."""
    if WHOLE:  # noqa: SIM108 - decided when compiled
        z = _wide(tl.load(x_ptr + entries))
    else:
        z = _wide(tl.load(x_ptr + entries, mask=inside, other=-float("inf")))
    if scale is not None:
        z *= scale
    if SOFTCAP:
        z = softcap * tanh(z * (1.0 / softcap))
        if not WHOLE:
            z = tl.where(inside, z, -float("inf"))
    return z


@triton.jit
def finite(z):
    """z with masked() for -inf; a NaN stays."""
    return tl.maximum(z, masked(), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def load_z(x_ptr, entries, inside, scale, softcap, SOFTCAP: tl.constexpr, WHOLE: tl.constexpr):
    """The same with masked() for -inf."""
    return finite(load_logits(x_ptr, entries, inside, scale, softcap, SOFTCAP, WHOLE))


@triton.jit
def stats_of(stats_ptr, row):
    """The statistics of a row, in the order of interface.Rows."""
    return stats_ptr + row * 7
