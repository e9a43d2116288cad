"""Sweeps 2 and 3 in Triton: divergences of pairs of rows and the gradient of all terms. One program computes one row.
See sweep.py."""

import triton
import triton.language as tl

from .maths import exp, infinite, load_z, log, over_temperature, stats_of
from .sweep import kernel

# MIXTURE is which mixture m = mix p + (1 - mix) q is: "student" m = q, "teacher" m = p, "interior" between them. "jsd"
# is that of a JSD, which has no skew term: this saves a division. "none" is for a gradient without a divergence.


@triton.jit
def _below_max(z, top, inverse, inverse_rest, TEMPERED: tl.constexpr):
    """x = (z - max) / T; the probability is e^x / sum."""
    x = z - top
    if TEMPERED:
        x = over_temperature(x, inverse, inverse_rest)
    return x


@triton.jit
def _ratio(x_q, x_p, gap, MIXTURE: tl.constexpr):
    """log(q s) and log q - log p, where s is the teacher's sum, p = e^x_p / s: both probabilities come times s.

    With m = p no p is needed, and s is the student's own sum: q of its largest entry is then exactly 1 / s. Where this
    entry has nearly all the probability, its log-ratio, however large, cancels exactly with the mean.
    """
    y_q = x_q - gap
    return x_q if MIXTURE == "teacher" else y_q, y_q - x_p


@triton.jit
def _compare(q, p, d, x_q, mix, rest, MIXTURE: tl.constexpr):
    """log(p/m), log(q/m), q (q - p)/m, q p/m of entries, with d = log q - log p; 0 for what the mixture does not need.

    Let r = exp(-|d|) in [0, 1]. Then m is w times the larger of p and q, with w = 1 + c (r - 1), where c is the
    mixture's weight of the smaller one: nothing overflows, and w is exactly 1 where p = q. It is never less than 1 - c,
    which is no difference of rounded numbers (``rest`` is 1 - mix, rounded once): so an interior mixture never meets
    the log of 0, however close to an end it is. The weights of a JSD are rounded so that their sum is 1 (backend.py).
    """
    log_p_m = tl.zeros_like(d)
    log_q_m = tl.zeros_like(d)
    q_skew = tl.zeros_like(d)
    q_p = tl.zeros_like(d)
    if MIXTURE == "student":
        log_p_m = d * -1.0
        seen = x_q > -infinite()  # an entry that the student masks gets no gradient
        q_skew = tl.where(seen, q - p, 0.0)
        q_p = tl.where(seen, p, 0.0)
    elif MIXTURE == "teacher":
        log_q_m = d
    else:
        r = tl.exp2(tl.abs(d) * -1.4426950408889634)
        student_leads = d >= 0
        c = tl.where(student_leads, mix, rest)
        least = tl.where(student_leads, rest, mix)
        w = tl.fma(c, r, least)
        if MIXTURE == "interior":
            less = r - 1.0
            w = tl.where(r < 0.5, w, tl.fma(c, less, 1.0))
        log_w = log(w)
        log_p_m = (log_w + tl.maximum(d, 0.0)) * -1.0
        log_q_m = tl.minimum(d, 0.0) - log_w
        if MIXTURE == "interior":
            q_w = q / w
            q_skew = q_w * tl.where(student_leads, less * -1.0, less)
            q_p = tl.where(student_leads, q_w * r, q_w)
    return log_p_m, log_q_m, q_skew, q_p


@triton.jit
def _sums_of(sums_ptr, row):
    """The sums of a row, in the order of interface.Backend.divergence_sums."""
    return sums_ptr + row * 5


@triton.jit
def _pair(s_stats_ptr, t_stats_ptr, row, MIXTURE: tl.constexpr, TEMPERED: tl.constexpr):
    """The max of both models, 1 / s (_ratio), and the log-sum of q minus that of p; all at the temperature."""
    s_stats_ptr = stats_of(s_stats_ptr, row)
    t_stats_ptr = stats_of(t_stats_ptr, row)
    s_sum = tl.load(s_stats_ptr + (5 if TEMPERED else 4))
    t_sum = tl.load(t_stats_ptr + (5 if TEMPERED else 4))
    gap = tl.log(tl.div_rn(s_sum, t_sum))
    return tl.load(s_stats_ptr), tl.load(t_stats_ptr), tl.div_rn(1.0, s_sum if MIXTURE == "teacher" else t_sum), gap


@kernel
def divergence_kernel(
    s_ptr, s_stride, s_scale, s_softcap, s_stats_ptr, t_ptr, t_stride, t_scale, t_softcap, t_stats_ptr, vocabulary,
    a, b, mix, rest, inverse, inverse_rest, sums_ptr,
    BLOCK: tl.constexpr, MIXTURE: tl.constexpr, TEMPERED: tl.constexpr,
    S_SOFTCAP: tl.constexpr, T_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The row's sums (interface.Backend.divergence_sums); all but the first times the s of _ratio."""
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * s_stride
    t_ptr += row * t_stride
    s_max, t_max, norm, gap = _pair(s_stats_ptr, t_stats_ptr, row, MIXTURE, TEMPERED)
    kl_p = tl.zeros([BLOCK], tl.float32)
    kl_q = tl.zeros([BLOCK], tl.float32)
    skewed = tl.zeros([BLOCK], tl.float32)
    shared = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    whole = vocabulary // BLOCK * BLOCK
    for part in tl.static_range(2):
        for first in range(0 if part == 0 else whole, whole if part == 0 else vocabulary, BLOCK):
            entries = first + tl.arange(0, BLOCK)
            inside = entries < vocabulary
            z_t = load_z(t_ptr, entries, inside, t_scale, t_softcap, T_SOFTCAP, part == 0)
            x_p = _below_max(z_t, t_max, inverse, inverse_rest, TEMPERED)
            z_s = load_z(s_ptr, entries, inside, s_scale, s_softcap, S_SOFTCAP, part == 0)
            x_q = _below_max(z_s, s_max, inverse, inverse_rest, TEMPERED)
            y_q, d = _ratio(x_q, x_p, gap, MIXTURE)
            q, p = exp(y_q), exp(x_p)
            log_p_m, log_q_m, q_skew, q_p = _compare(q, p, d, x_q, mix, rest, MIXTURE)
            if MIXTURE != "teacher":
                kl_p = tl.fma(p, log_p_m, kl_p)
            if MIXTURE != "student":
                kl_q = tl.fma(q, log_q_m, kl_q)
            if MIXTURE == "interior":
                skewed += q_skew
            if (MIXTURE == "interior") | (MIXTURE == "student"):
                shared += q_p
            mass += q
    sums_ptr = _sums_of(sums_ptr, row)
    kl_q_sum = tl.sum(kl_q.to(tl.float64), axis=0)
    value = (a * tl.sum(kl_p.to(tl.float64), axis=0) + b * kl_q_sum) * norm
    tl.store(sums_ptr, tl.where(value > infinite(), float("inf"), value))
    tl.store(sums_ptr + 1, b * kl_q_sum)
    total = tl.sum(mass.to(tl.float64), axis=0)
    tl.store(sums_ptr + 4, total)
    shared_sum = tl.sum(shared.to(tl.float64), axis=0)
    tl.store(sums_ptr + 3, shared_sum)
    # At m = q, sum q - sum p is not taken for 0: what is rounded leaves a gradient that sums to 0.
    if MIXTURE == "student":  # noqa: SIM108 - decided when compiled
        skew_sum = total - shared_sum  # sum q - sum p: one accumulator less
    else:
        skew_sum = tl.sum(skewed.to(tl.float64), axis=0)
    tl.store(sums_ptr + 2, skew_sum)


@triton.jit
def _gradient(
    entries, inside, added, s_ptr, s_scale, s_softcap, t_ptr, t_scale, t_softcap,
    scalars, b, mix, rest, inverse, inverse_rest,
    MIXTURE: tl.constexpr, TEMPERED: tl.constexpr, S_SOFTCAP: tl.constexpr, T_SOFTCAP: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """d loss / d logit of some entries of a row: all terms, what is ``added``, then the chain rule from z to the logit.

    ``scalars`` is what _row_scalars returns.
    """
    s_max, gap, t_max, norm, center, c_rest, skewed, shared, c_divergence, c_x, c_softmax = scalars
    z = load_z(s_ptr, entries, inside, s_scale, s_softcap, S_SOFTCAP, WHOLE)
    x = z - s_max
    per_q = tl.fma(c_x, x, c_softmax)  # what the gradients of entropy and softmax are, divided by q
    if MIXTURE == "none":
        gradient = tl.fma(exp(x) * norm, per_q, added)
    else:
        z_t = load_z(t_ptr, entries, inside, t_scale, t_softcap, T_SOFTCAP, WHOLE)
        x_q = _below_max(z, s_max, inverse, inverse_rest, TEMPERED)
        x_p = _below_max(z_t, t_max, inverse, inverse_rest, TEMPERED)
        y_q, d = _ratio(x_q, x_p, gap, MIXTURE)
        q = exp(y_q)
        gradient = added
        if TEMPERED:
            gradient = tl.fma(exp(x) * norm, per_q, gradient)
            per_q = c_rest
        if MIXTURE == "jsd":  # with m over q, which may be infinite: q is 0 there
            log_q_m = log(tl.fma(mix, tl.exp2(d * -1.4426950408889634), rest)) * -1.0
        else:
            _, log_q_m, q_skew, q_p = _compare(q, exp(x_p), d, x_q, mix, rest, MIXTURE)
            # q_skew less q times its mean, with q = (1 - mix) q_skew + q_p put in: nothing large cancels where p/m is
            # small.
            if (MIXTURE == "interior") | (MIXTURE == "student"):
                gradient += shared * q_skew - skewed * q_p
        if MIXTURE != "student":
            per_q = tl.fma(c_divergence, tl.fma(b, log_q_m, center * -1.0), per_q)
        gradient = tl.fma(q, per_q, gradient)
    if S_SOFTCAP:
        y = z * (1.0 / s_softcap)
        gradient *= 1.0 - y * y
    return gradient


@triton.jit
def _row_scalars(
    row, s_scale, s_stats_ptr, t_stats_ptr, sums_ptr, dense_ptr, count, skew, inverse,
    MIXTURE: tl.constexpr, TEMPERED: tl.constexpr,
):  # fmt: skip
    """Statistics and coefficients of a row, in the order in which _gradient takes them.

    The coefficients contain all factors that the entries of a row share: those of the loss, the scale of the logits,
    and the 1 / s of _ratio. ``norm``, 1 / sum of the student, is for probabilities that do not come from _ratio.
    """
    s_max, t_max, norm_p, gap = _pair(s_stats_ptr, t_stats_ptr, row, MIXTURE, TEMPERED)
    s_stats_ptr = stats_of(s_stats_ptr, row)
    norm = tl.div_rn(1.0, tl.load(s_stats_ptr + 4))
    s_mean = tl.load(s_stats_ptr + 6)
    c_x = tl.load(dense_ptr + count + row) * -1.0
    c_softmax = tl.load(dense_ptr + 2 * count + row)
    if s_scale is not None:
        c_x *= s_scale
        c_softmax *= s_scale
    center = 0.0
    c_rest = 0.0
    skewed = 0.0
    shared = 0.0
    c_divergence = 0.0
    if MIXTURE != "none":
        # Means over the mass: over 1, which it is but for rounding, they would leave a gradient that does not sum to 0.
        sums_ptr = _sums_of(sums_ptr, row)
        mass = tl.load(sums_ptr + 4)
        exact = tl.load(sums_ptr + 1) / mass
        center = exact.to(tl.float32)
        c_divergence = tl.load(dense_ptr + row) * inverse * norm_p
        if s_scale is not None:
            c_divergence *= s_scale
        skewed = c_divergence * skew * (tl.load(sums_ptr + 2) / mass).to(tl.float32)
        shared = c_divergence * skew * (tl.load(sums_ptr + 3) / mass).to(tl.float32)
        c_rest = c_divergence * (center.to(tl.float64) - exact).to(tl.float32)
        if not TEMPERED:  # the same q
            c_x *= norm_p
            c_softmax = tl.fma(c_softmax, norm_p, c_rest)
    c_softmax = tl.fma(c_x * -1.0, s_mean, c_softmax)
    return s_max, gap, t_max, norm, center, c_rest, skewed, shared, c_divergence, c_x, c_softmax


@kernel
def scatter_kernel(
    s_ptr, s_stride, s_scale, s_softcap, s_stats_ptr, t_ptr, t_stride, t_scale, t_softcap, t_stats_ptr, vocabulary,
    b, mix, rest, skew, inverse, inverse_rest, sums_ptr, dense_ptr, count, ids_ptr, scatter_ptr, at_ids_ptr, n_ids,
    IDS: tl.constexpr, MIXTURE: tl.constexpr, TEMPERED: tl.constexpr, S_SOFTCAP: tl.constexpr, T_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The gradient of all terms at ``ids`` alone, in fp32, with ``scatter`` added. Equal ids all get the sum."""
    row = tl.program_id(0).to(tl.int64)
    ids_ptr += row * n_ids
    scatter_ptr += row * n_ids
    slot = tl.arange(0, IDS)
    ids = tl.load(ids_ptr + slot, mask=slot < n_ids, other=-1)
    inside = (ids >= 0) & (ids < vocabulary)
    added = tl.zeros([IDS], tl.float32)
    for j in range(n_ids):
        added += tl.where(ids == tl.load(ids_ptr + j), tl.load(scatter_ptr + j), 0.0)
    if s_scale is not None:
        added *= s_scale
    scalars = _row_scalars(
        row, s_scale, s_stats_ptr, t_stats_ptr, sums_ptr, dense_ptr, count, skew, inverse, MIXTURE, TEMPERED
    )
    gradient = _gradient(
        ids, inside, added, s_ptr + row * s_stride, s_scale, s_softcap, t_ptr + row * t_stride, t_scale, t_softcap,
        scalars, b, mix, rest, inverse, inverse_rest, MIXTURE, TEMPERED, S_SOFTCAP, T_SOFTCAP, False,
    )  # fmt: skip
    tl.store(at_ids_ptr + row * n_ids + slot, gradient, mask=slot < n_ids)


@kernel
def gradient_kernel(
    s_ptr, s_stride, s_scale, s_softcap, s_stats_ptr, t_ptr, t_stride, t_scale, t_softcap, t_stats_ptr, vocabulary,
    b, mix, rest, skew, inverse, inverse_rest, sums_ptr, dense_ptr, count, ids_ptr, at_ids_ptr, n_ids,
    out_ptr, out_stride, BLOCK: tl.constexpr, IDS: tl.constexpr, MIXTURE: tl.constexpr, TEMPERED: tl.constexpr,
    S_SOFTCAP: tl.constexpr, T_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The gradient of all terms, written over the student's logits block by block, then what belongs at ``ids``.

    A 16-bit gradient is written over fp32 logits: block n of it lies over logits of blocks up to n, which other warps
    may not have read yet. They may be a whole block behind, and even within a block a thread does not write where it
    reads. So between reading and writing a block there is a barrier: behind it all warps have read all blocks up to n.
    Fast warps may be reading block n + 1 by then, over which nobody writes yet.
    """
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row * out_stride
    scalars = _row_scalars(
        row, s_scale, s_stats_ptr, t_stats_ptr, sums_ptr, dense_ptr, count, skew, inverse, MIXTURE, TEMPERED
    )
    s_ptr += row * s_stride
    t_ptr += row * t_stride
    whole = vocabulary // BLOCK * BLOCK
    for part in tl.static_range(2):
        for first in range(0 if part == 0 else whole, whole if part == 0 else vocabulary, BLOCK):
            entries = first + tl.arange(0, BLOCK)
            inside = entries < vocabulary
            gradient = _gradient(
                entries, inside, 0.0, s_ptr, s_scale, s_softcap, t_ptr, t_scale, t_softcap,
                scalars, b, mix, rest, inverse, inverse_rest, MIXTURE, TEMPERED, S_SOFTCAP, T_SOFTCAP, part == 0,
            )  # fmt: skip
            tl.debug_barrier()
            if part == 0:
                tl.store(out_ptr + entries, gradient.to(out_ptr.dtype.element_ty))
            else:
                tl.store(out_ptr + entries, gradient.to(out_ptr.dtype.element_ty), mask=inside)
    if n_ids > 0:
        slot = tl.arange(0, IDS)
        ids = tl.load(ids_ptr + row * n_ids + slot, mask=slot < n_ids, other=-1)
        gradient = tl.load(at_ids_ptr + row * n_ids + slot, mask=slot < n_ids, other=0.0)
        inside = (ids >= 0) & (ids < vocabulary)
        tl.debug_barrier()  # these are written over what the sweep wrote there
        tl.store(out_ptr + ids, gradient.to(out_ptr.dtype.element_ty), mask=inside)
