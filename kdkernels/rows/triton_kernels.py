"""The row kernels in Triton: statistics, candidates, divergence, gradient. One program per row; maths of csrc/sweeps.h.

All arithmetic is fp32. Launch with ``enable_fp_fusion=False``: a kernel then computes the same z from the same logit as
every other one, which the top-k needs (it compares words with maxima from another kernel), and identical logits cancel
to the bit. Multiply-adds that may be fused say so (``tl.fma``).

A masked word (-inf) becomes MASKED: finite, so that the log-ratio of two masked words is 0 instead of NaN, and small
enough that its probability is 0. A NaN stays one until the row's sums show it, and is never a maximum.
"""

import triton
import triton.language as tl

MASKED = tl.constexpr(-1e30)
INFINITE = tl.constexpr(1e12)  # no log-probability is below -1e12 but a masked word's; a divergence beyond 1e12 met one

STATS = tl.constexpr(7)  # numbers per row, in the order of operators.py

# Where the mixture m = mix p + (1 - mix) q lies; JSD is the interior one of a JSD, without a skew term (no division).
NONE, STUDENT, TEACHER, JSD, INTERIOR = (tl.constexpr(i) for i in range(5))


@triton.jit
def _exp_rough(x):
    """e^x to about 1e-7 (1 + |x|): enough where what is multiplied by it matters the less, the smaller it is."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _exp(x):
    """e^x to about 2e-7: the rounding error of the product x log2(e), 7e-7 at |x| = 12, goes into the result."""
    y = x * 1.4426950216293335
    low = tl.fma(x, 1.9259629911e-8, tl.fma(x, 1.4426950216293335, -y))
    e = tl.exp2(y)
    return tl.fma(e, low * 0.6931471805599453, e)


@triton.jit
def _log1p(x):
    """log(1 + x) for x >= 0, accurate where x is tiny: the rounding of 1 + x cancels."""
    y = 1.0 + x
    return tl.where(y == 1.0, x, tl.log(y) * (x / tl.where(y == 1.0, 1.0, y - 1.0)))


@triton.jit
def _tanh(y):
    a = tl.abs(y)
    y2 = y * y
    p = tl.fma(y2, -5.660788605e-03, 2.060200731e-02)  # (tanh(y) / y - 1) / y^2 in y^2, minimax on |y| <= 0.63
    p = tl.fma(p, y2, -5.372922989e-02)
    p = tl.fma(p, y2, 1.333132896e-01)
    p = tl.fma(p, y2, -3.333327832e-01)
    near = tl.fma(y, y2 * p, y)
    t = _exp_rough(-2.0 * a)
    far = 1.0 - 2.0 * t / (1.0 + t)
    return tl.where(a < 0.625, near, tl.where(y < 0, -far, far))


@triton.jit
def _over_temperature(x, inverse, inverse_rest):
    """x / T, from 1 / T in two parts: one rounded 1 / T would be another temperature."""
    return tl.fma(x, inverse, x * inverse_rest)


@triton.jit
def _z(x_ptr, words, inside, scale, softcap, SOFTCAP: tl.constexpr):
    """z of a row's words; MASKED for -inf and where not ``inside``."""
    z = tl.load(x_ptr + words, mask=inside, other=-float("inf")).to(tl.float32) * scale
    if SOFTCAP:
        z = tl.where(inside, softcap * _tanh(z * (1.0 / softcap)), MASKED)
    return tl.maximum(z, MASKED, propagate_nan=tl.PropagateNan.ALL)


# The JIT compiles a kernel anew where an integer becomes 1 or divisible by 16, or a tensor's address ceases to be. Only
# for rows of logits that pays (wider loads); of everything else the sizes and places change from chunk to chunk.
_SIZES = ["groups", "k", "n_ids", "dense_stride"]
_SMALL = [
    "stats_ptr", "s_stats_ptr", "t_stats_ptr", "maxima_ptr", "values_ptr", "indices_ptr", "ids_ptr", "gathered_ptr",
    "value_ptr", "center_ptr", "dense_ptr", "scatter_ptr", "at_ids_ptr",
]  # fmt: skip
_kernel = triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_SMALL)


# ---- sweep 1: statistics and exact top-k -----------------------------------------------------------------------------


@_kernel
def statistics_kernel(
    x_ptr, x_stride, vocabulary, scale, softcap, inverse, inverse_rest, stats_ptr, maxima_ptr, groups,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Max, log-sum, entropy, log-sum at a temperature; and the maximum of each group of GROUP consecutive words.

    A row without any word (all -inf) has no distribution: NaN.

    Every position in a block has a running maximum of its own, so that no step waits for one over the block. With
    x = z - maximum, ``rest`` sums e^x over all words but the maximum, ``weighted`` sums x e^x. Leaving the maximum out
    keeps the entropy of a row in which it has nearly all the probability. Of e^(old - new maximum) and e^x one is 1:
    one exponential per word gives both.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    maxima_ptr += row * groups
    group = tl.arange(0, GROUPS)
    word = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    top = tl.full([GROUPS, GROUP], MASKED, tl.float32)
    rest = tl.zeros([GROUPS, GROUP], tl.float32)
    weighted = tl.zeros([GROUPS, GROUP], tl.float32)
    tempered = tl.zeros([GROUPS, GROUP], tl.float32)  # rest at the temperature
    for first in range(0, vocabulary, GROUPS * GROUP):
        words = first + word
        z = _z(x_ptr, words, words < vocabulary, scale, softcap, SOFTCAP)
        slot = first // GROUP + group
        tl.store(maxima_ptr + slot, tl.max(z, axis=1), mask=slot < groups)

        rises = z > top
        x = -tl.abs(z - top)
        e = _exp(x)
        if TEMPERED:
            e_tempered = _exp_rough(_over_temperature(x, inverse, inverse_rest))
            tempered = tl.fma(e_tempered, tl.where(rises, tempered + 1.0, 1.0), tl.where(rises, 0.0, tempered))
        moved = tl.where(rises, rest + 1.0, 1.0)  # what e multiplies: all there was, or the new word
        weighted = tl.fma(e, x * moved, weighted * tl.where(rises, e, 1.0))
        rest = tl.fma(e, moved, tl.where(rises, 0.0, rest))
        top = tl.maximum(top, z)

    highest = tl.max(top)
    highest = tl.where(highest > MASKED, highest, float("nan"))
    x = top - highest
    e = _exp(x)
    ties = tl.sum(tl.where(x == 0, 1.0, 0.0)) - 1.0
    total = tl.sum(e * rest + tl.where(x == 0, 0.0, e)) + ties
    log_sum = _log1p(total)
    mean = tl.sum(e * (weighted + x * (rest + 1.0))) / (1.0 + total)
    stats_ptr += row * STATS
    tl.store(stats_ptr, highest)
    tl.store(stats_ptr + 1, log_sum)
    tl.store(stats_ptr + 2, log_sum - mean)
    tl.store(stats_ptr + 4, 1.0 + total)
    tl.store(stats_ptr + 6, mean)
    if TEMPERED:
        e = _exp_rough(_over_temperature(x, inverse, inverse_rest))
        total = tl.sum(e * tempered + tl.where(x == 0, 0.0, e)) + ties
        log_sum = _log1p(total)
    tl.store(stats_ptr + 3, log_sum)
    tl.store(stats_ptr + 5, 1.0 + total)


@_kernel
def candidates_kernel(
    x_ptr, x_stride, vocabulary, scale, softcap, maxima_ptr, groups, values_ptr, indices_ptr, k,
    ids_ptr, gathered_ptr, n_ids,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, IDS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The k largest z in order, ties to the smaller index; and z at ``ids`` (NaN for an id outside the vocabulary).

    The next word in order is in the group with the largest maximum, the first of equals. Words up to it in the order
    are taken, so its group's new maximum is over those after it: k steps, each over all maxima and one group's words.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    group = tl.arange(0, GROUPS)
    word = tl.arange(0, GROUP)
    # -inf, below every word: slots beyond the row's groups, words beyond its vocabulary, words taken
    maxima = tl.load(maxima_ptr + row * groups + group, mask=group < groups, other=-float("inf"))
    maxima = tl.where(maxima == maxima, maxima, MASKED)  # a group of nothing but NaN
    values_ptr += row * k
    indices_ptr += row * k
    value = float("inf")
    index = -1
    for i in range(k):
        chosen = tl.argmax(maxima, axis=0)
        words = chosen * GROUP + word
        inside = words < vocabulary
        z = _z(x_ptr, words, inside, scale, softcap, SOFTCAP)
        z = tl.where(inside, tl.maximum(z, MASKED), -float("inf"))
        z = tl.where((z < value) | ((z == value) & (words > index)), z, -float("inf"))
        value, at = tl.max(z, axis=0, return_indices=True)
        index = chosen * GROUP + at
        tl.store(values_ptr + i, tl.where(value > MASKED, value, -float("inf")))
        tl.store(indices_ptr + i, index.to(tl.int64))
        maxima = tl.where(group == chosen, tl.max(tl.where(word == at, -float("inf"), z), axis=0), maxima)
    if ids_ptr is not None:
        slot = tl.arange(0, IDS)
        ids = tl.load(ids_ptr + row * n_ids + slot, mask=slot < n_ids, other=-1)
        inside = (ids >= 0) & (ids < vocabulary)
        z = _z(x_ptr, ids, inside, scale, softcap, SOFTCAP)
        z = tl.where(z == MASKED, -float("inf"), z)
        tl.store(gathered_ptr + row * n_ids + slot, tl.where(inside, z, float("nan")), mask=slot < n_ids)


# ---- sweeps 2 and 3: divergence and gradient -------------------------------------------------------------------------


@triton.jit
def _below_max(z, top, inverse, inverse_rest, TEMPERED: tl.constexpr):
    """x = (z - max) / T; the probability is e^x / sum."""
    x = z - top
    if TEMPERED:
        x = _over_temperature(x, inverse, inverse_rest)
    return x


@triton.jit
def _compare(x_q, x_p, norm_q, norm_p, gap, mix, rest, MIXTURE: tl.constexpr):
    """q, p, log(p/m), log(q/m), q (q - p)/m, q p/m of words; 0 for what the mixture leaves out.

    With d = log q - log p and r = exp(-|d|) in [0, 1], m over the larger of p and q is w = 1 + c (r - 1), c weighing
    the smaller one: nothing overflows, and w is exactly 1 where p = q. It is never less than 1 - c, which is rounded on
    its own (``rest`` = 1 - mix is no difference of rounded numbers): no log of 0 at an interior mixture, however close
    to its ends.
    """
    d = (x_q - x_p) - gap
    r = _exp_rough(-tl.abs(d))
    student_leads = d >= 0
    big = _exp(tl.where(student_leads, x_q, x_p)) * tl.where(student_leads, norm_q, norm_p)
    small = big * r
    q = tl.where(student_leads, big, small)
    p = tl.where(student_leads, small, big)
    log_p_m = tl.zeros_like(d)
    log_q_m = tl.zeros_like(d)
    q_skew = tl.zeros_like(d)
    q_p = tl.zeros_like(d)
    if MIXTURE == STUDENT:
        log_p_m = -d
        seen = x_q > -INFINITE  # nothing moves a word that the student masks
        q_skew = tl.where(seen, q - p, 0.0)
        q_p = tl.where(seen, p, 0.0)
    elif MIXTURE == TEACHER:
        log_q_m = d
    else:
        less = r - 1.0
        least = tl.where(student_leads, rest, mix)
        if MIXTURE == INTERIOR:
            c = tl.where(student_leads, mix, rest)
            w = tl.where(r < 0.5, tl.fma(c, r, least), tl.fma(c, less, 1.0))
        else:  # weights that sum to 1, if not quite p's and q's: JSD is stationary in m
            w = tl.maximum(tl.fma(tl.where(student_leads, mix, 1.0 - mix), less, 1.0), least)
        log_w = tl.log(w)
        log_p_m = -log_w - tl.maximum(d, 0.0)
        log_q_m = tl.minimum(d, 0.0) - log_w
        if MIXTURE == INTERIOR:
            q_w = q / w
            q_skew = q_w * tl.where(student_leads, -less, less)
            q_p = tl.where(student_leads, q_w * r, q_w)
    return q, p, log_p_m, log_q_m, q_skew, q_p


@triton.jit
def _pair(s_stats_ptr, t_stats_ptr, row, TEMPERED: tl.constexpr):
    """Both sides' max and 1 / sum at the temperature, and log-sum of q minus that of p."""
    s_stats_ptr += row * STATS
    t_stats_ptr += row * STATS
    s_sum = tl.load(s_stats_ptr + (5 if TEMPERED else 4))
    t_sum = tl.load(t_stats_ptr + (5 if TEMPERED else 4))
    gap = tl.log(tl.div_rn(s_sum, t_sum))
    return tl.load(s_stats_ptr), tl.load(t_stats_ptr), tl.div_rn(1.0, s_sum), tl.div_rn(1.0, t_sum), gap


@_kernel
def divergence_kernel(
    s_ptr, s_stride, s_scale, s_softcap, s_stats_ptr, t_ptr, t_stride, t_scale, t_softcap, t_stats_ptr, vocabulary,
    a, b, mix, rest, inverse, inverse_rest, value_ptr, center_ptr,
    BLOCK: tl.constexpr, MIXTURE: tl.constexpr, TEMPERED: tl.constexpr,
    S_SOFTCAP: tl.constexpr, T_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """a KL(p || m) + b KL(q || m), and E_q of b log(q/m), (q - p)/m and p/m, with which the gradient is centred."""
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * s_stride
    t_ptr += row * t_stride
    s_max, t_max, norm_q, norm_p, gap = _pair(s_stats_ptr, t_stats_ptr, row, TEMPERED)
    kl_p = tl.zeros([BLOCK], tl.float32)
    kl_q = tl.zeros([BLOCK], tl.float32)
    skewed = tl.zeros([BLOCK], tl.float32)
    shared = tl.zeros([BLOCK], tl.float32)
    mass = tl.zeros([BLOCK], tl.float32)
    for first in range(0, vocabulary, BLOCK):
        words = first + tl.arange(0, BLOCK)
        inside = words < vocabulary
        z_t = _z(t_ptr, words, inside, t_scale, t_softcap, T_SOFTCAP)
        x_p = _below_max(z_t, t_max, inverse, inverse_rest, TEMPERED)
        z_s = _z(s_ptr, words, inside, s_scale, s_softcap, S_SOFTCAP)
        x_q = _below_max(z_s, s_max, inverse, inverse_rest, TEMPERED)
        q, p, log_p_m, log_q_m, q_skew, q_p = _compare(x_q, x_p, norm_q, norm_p, gap, mix, rest, MIXTURE)
        if MIXTURE != TEACHER:
            kl_p = tl.fma(p, log_p_m, kl_p)
        if MIXTURE != STUDENT:
            kl_q = tl.fma(q, log_q_m, kl_q)
        if MIXTURE == INTERIOR:
            skewed += q_skew
        if (MIXTURE == INTERIOR) | (MIXTURE == STUDENT):
            shared += q_p
        mass += q
    # Over the mass, and with sum q - sum p at m = q not taken for 0: what is rounded leaves a gradient that sums to 0.
    kl_q_sum = tl.sum(kl_q.to(tl.float64), axis=0)
    total = tl.sum(mass.to(tl.float64), axis=0)
    tl.store(center_ptr + row * 3, b * kl_q_sum / total)
    shared_sum = tl.sum(shared.to(tl.float64), axis=0)
    if MIXTURE == STUDENT:  # noqa: SIM108 - decided when compiled
        skew_sum = total - shared_sum  # sum q - sum p: one accumulator less
    else:
        skew_sum = tl.sum(skewed.to(tl.float64), axis=0)
    tl.store(center_ptr + row * 3 + 1, skew_sum / total)
    tl.store(center_ptr + row * 3 + 2, shared_sum / total)
    value = (a * tl.sum(kl_p.to(tl.float64), axis=0) + b * kl_q_sum).to(tl.float32)
    tl.store(value_ptr + row, tl.where(value > INFINITE, float("inf"), value))


@triton.jit
def _gradient(
    words, inside, added, s_ptr, s_scale, s_softcap, t_ptr, t_scale, t_softcap,
    scalars, b, mix, rest, skew, inverse, inverse_rest,
    MIXTURE: tl.constexpr, TEMPERED: tl.constexpr, S_SOFTCAP: tl.constexpr, T_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """d loss / d logit of some words of a row: divergence, entropy, softmax, what is ``added``, then the chain rule.

    ``scalars``: what _row_scalars returns.
    """
    (
        s_max, s_norm, s_mean, t_max, norm_q, norm_p, gap, center, center_rest, skewed, shared,
        c_divergence, c_entropy, c_softmax,
    ) = scalars  # fmt: skip
    z = _z(s_ptr, words, inside, s_scale, s_softcap, S_SOFTCAP)
    x = z - s_max
    if MIXTURE == NONE:
        q = _exp(x) * s_norm
        gradient = added
    else:
        z_t = _z(t_ptr, words, inside, t_scale, t_softcap, T_SOFTCAP)
        x_q = _below_max(z, s_max, inverse, inverse_rest, TEMPERED)
        x_p = _below_max(z_t, t_max, inverse, inverse_rest, TEMPERED)
        q, _, _, log_q_m, q_skew, q_p = _compare(x_q, x_p, norm_q, norm_p, gap, mix, rest, MIXTURE)
        d_divergence = tl.zeros_like(q)
        # As q = (1 - mix) q_skew + q_p, this is q_skew less q times its mean; nothing large cancels where p/m is small.
        if (MIXTURE == INTERIOR) | (MIXTURE == STUDENT):
            d_divergence = skew * (shared * q_skew - skewed * q_p)
        if MIXTURE != STUDENT:
            d_divergence += q * (tl.fma(b, log_q_m, -center) - center_rest)
        gradient = tl.fma(c_divergence * inverse, d_divergence, added)
        if TEMPERED:
            q = _exp(x) * s_norm
    gradient = tl.fma(q, c_softmax - c_entropy * (x - s_mean), gradient) * s_scale
    if S_SOFTCAP:
        y = z * (1.0 / s_softcap)
        gradient *= 1.0 - y * y
    return gradient


@triton.jit
def _row_scalars(
    row, s_stats_ptr, t_stats_ptr, center_ptr, dense_ptr, dense_stride, MIXTURE: tl.constexpr, TEMPERED: tl.constexpr
):
    """Statistics and coefficients of a row, in the order in which _gradient takes them."""
    s_max, t_max, norm_q, norm_p, gap = _pair(s_stats_ptr, t_stats_ptr, row, TEMPERED)
    s_norm = tl.div_rn(1.0, tl.load(s_stats_ptr + row * STATS + 4))
    s_mean = tl.load(s_stats_ptr + row * STATS + 6)
    center = 0.0
    center_rest = 0.0
    skewed = 0.0
    shared = 0.0
    c_divergence = 0.0
    if MIXTURE != NONE:
        exact = tl.load(center_ptr + row * 3)
        skewed = tl.load(center_ptr + row * 3 + 1).to(tl.float32)
        shared = tl.load(center_ptr + row * 3 + 2).to(tl.float32)
        center = exact.to(tl.float32)
        center_rest = (exact - center.to(tl.float64)).to(tl.float32)
        c_divergence = tl.load(dense_ptr + row)
    c_entropy = tl.load(dense_ptr + dense_stride + row)
    c_softmax = tl.load(dense_ptr + 2 * dense_stride + row)
    return (
        s_max, s_norm, s_mean, t_max, norm_q, norm_p, gap, center, center_rest, skewed, shared,
        c_divergence, c_entropy, c_softmax
    )  # fmt: skip


@_kernel
def scatter_kernel(
    s_ptr, s_stride, s_scale, s_softcap, s_stats_ptr, t_ptr, t_stride, t_scale, t_softcap, t_stats_ptr, vocabulary,
    b, mix, rest, skew, inverse, inverse_rest, center_ptr, dense_ptr, dense_stride,
    ids_ptr, scatter_ptr, at_ids_ptr, n_ids,
    IDS: tl.constexpr, MIXTURE: tl.constexpr, TEMPERED: tl.constexpr, S_SOFTCAP: tl.constexpr, T_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The gradient of all terms at ``ids`` alone, in fp32, with ``scatter`` added; of equal ids each gets the sum."""
    row = tl.program_id(0).to(tl.int64)
    ids_ptr += row * n_ids
    scatter_ptr += row * n_ids
    slot = tl.arange(0, IDS)
    ids = tl.load(ids_ptr + slot, mask=slot < n_ids, other=-1)
    inside = (ids >= 0) & (ids < vocabulary)
    added = tl.zeros([IDS], tl.float32)
    for j in range(n_ids):
        added += tl.where(ids == tl.load(ids_ptr + j), tl.load(scatter_ptr + j), 0.0)
    scalars = _row_scalars(row, s_stats_ptr, t_stats_ptr, center_ptr, dense_ptr, dense_stride, MIXTURE, TEMPERED)
    gradient = _gradient(
        ids, inside, added, s_ptr + row * s_stride, s_scale, s_softcap, t_ptr + row * t_stride, t_scale, t_softcap,
        scalars, b, mix, rest, skew, inverse, inverse_rest, MIXTURE, TEMPERED, S_SOFTCAP, T_SOFTCAP,
    )  # fmt: skip
    tl.store(at_ids_ptr + row * n_ids + slot, gradient, mask=slot < n_ids)


@_kernel
def gradient_kernel(
    s_ptr, s_stride, s_scale, s_softcap, s_stats_ptr, t_ptr, t_stride, t_scale, t_softcap, t_stats_ptr, vocabulary,
    b, mix, rest, skew, inverse, inverse_rest, center_ptr, dense_ptr, dense_stride, ids_ptr, at_ids_ptr, n_ids,
    out_ptr, out_stride, BLOCK: tl.constexpr, IDS: tl.constexpr, MIXTURE: tl.constexpr, TEMPERED: tl.constexpr,
    S_SOFTCAP: tl.constexpr, T_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The gradient of all terms, written over the student's logits by ascending blocks, then what belongs at ``ids``.

    Narrow words over wide ones (bf16 over fp32): block n of the output lies over words of blocks <= n of the logits, of
    which other warps may not have read theirs yet: they may be late by a whole block, and even within a block loads
    and stores need not share a layout. So every block is read, then a barrier, then written: behind the barrier all
    warps have read all blocks <= n, and nobody writes over block n + 1, which the fast ones may be reading already.
    """
    row = tl.program_id(0).to(tl.int64)
    out_ptr += row * out_stride
    scalars = _row_scalars(row, s_stats_ptr, t_stats_ptr, center_ptr, dense_ptr, dense_stride, MIXTURE, TEMPERED)
    for first in range(0, vocabulary, BLOCK):
        words = first + tl.arange(0, BLOCK)
        inside = words < vocabulary
        gradient = _gradient(
            words, inside, 0.0, s_ptr + row * s_stride, s_scale, s_softcap, t_ptr + row * t_stride, t_scale, t_softcap,
            scalars, b, mix, rest, skew, inverse, inverse_rest, MIXTURE, TEMPERED, S_SOFTCAP, T_SOFTCAP,
        )  # fmt: skip
        tl.debug_barrier()
        tl.store(out_ptr + words, gradient.to(out_ptr.dtype.element_ty), mask=inside)
    if n_ids > 0:
        slot = tl.arange(0, IDS)
        ids = tl.load(ids_ptr + row * n_ids + slot, mask=slot < n_ids, other=-1)
        gradient = tl.load(at_ids_ptr + row * n_ids + slot, mask=slot < n_ids, other=0.0)
        inside = (ids >= 0) & (ids < vocabulary)
        tl.debug_barrier()  # over the words the sweep wrote there
        tl.store(out_ptr + ids, gradient.to(out_ptr.dtype.element_ty), mask=inside)
