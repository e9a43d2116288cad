"""Sweep 1 in Triton: statistics and candidates. One program computes one row. See sweep.py."""

import triton
import triton.language as tl

from .maths import exp, exp_rough, finite, load_logits, load_z, log1p, masked, over_temperature, stats_of
from .sweep import kernel


@triton.jit
def _matches(x, RUNS: tl.constexpr, N: tl.constexpr, LEFT: tl.constexpr):
    """The higher and the lower [RUNS, N, LEFT] of every two entries of [RUNS, N, 2 LEFT]; a NaN is always the lower."""
    a, b = tl.split(tl.reshape(x, [RUNS, N, LEFT, 2]))
    return tl.maximum(a, b), tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _by_thread(x, N: tl.constexpr, COUNT: tl.constexpr):
    """[runs, N, entries of a run] as [1, N, COUNT]."""
    return tl.reshape(tl.permute(x, (1, 0, 2)), [1, N, COUNT])


@triton.jit
def _below(z, top, N: tl.constexpr):
    """x = z - top of four entries of each thread, [N, 4], and e^x."""
    x = finite(tl.reshape(z, [N, 4])) - top[:, None]
    return x, exp(x)


@triton.jit
def _statistics_block(
    z, slot, top, rest, weighted, tempered, maxima_ptr, groups, inverse, inverse_rest,
    N: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr, TEMPERED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Finds the largest of the 16 entries of each of N threads, and adds all others to the thread's sums.

    The entries of a thread come in runs of VECTOR, as they are loaded. They meet in pairs, the higher ones meet again,
    and the last one meets the thread's maximum so far. Whatever is the lower of a pair is added up.
    """
    RUNS: tl.constexpr = 16 // VECTOR
    high, low = _matches(z, RUNS, N, VECTOR // 2)
    a, b = tl.split(tl.reshape(_by_thread(low, N, 8), [1, N, 4, 2]))
    high, low = _matches(high, RUNS, N, VECTOR // 4)
    c = _by_thread(low, N, 4)
    if VECTOR == 8:
        high, low = _matches(high, RUNS, N, 1)
        low = _by_thread(low, N, 2)
        group = tl.max(tl.reshape(high, [RUNS * N * VECTOR // GROUP, GROUP // VECTOR]), axis=1)
        high = _by_thread(high, N, 2)
    else:
        group = tl.max(tl.reshape(high, [RUNS * N * VECTOR // GROUP, GROUP // VECTOR]), axis=1)
        high, low = _matches(_by_thread(high, N, 4), 1, N, 2)
    slot += tl.arange(0, RUNS * N * VECTOR // GROUP)
    tl.store(maxima_ptr + slot, finite(group), mask=None if WHOLE else slot < groups)

    high, last = _matches(high, 1, N, 1)
    best = finite(tl.reshape(high, [N]))
    new = tl.maximum(top, best)
    lost = tl.join(tl.reshape(last, [N]), tl.minimum(top, best, propagate_nan=tl.PropagateNan.ALL))
    x_a, e_a = _below(a, new, N)
    x_b, e_b = _below(b, new, N)
    x_c, e_c = _below(c, new, N)
    x_d, e_d = _below(tl.join(tl.reshape(low, [N, 2]), lost), new, N)
    risen = top - new
    e = exp(risen)
    added = tl.fma(e_d, x_d, tl.fma(e_c, x_c, tl.fma(e_b, x_b, e_a * x_a)))
    weighted = tl.fma(tl.fma(risen, rest, weighted), e, tl.sum(added, axis=1))
    rest = tl.fma(rest, e, tl.sum((e_a + e_b) + (e_c + e_d), axis=1))
    if TEMPERED:
        added = exp_rough(over_temperature(x_a, inverse, inverse_rest))
        added += exp_rough(over_temperature(x_b, inverse, inverse_rest))
        added += exp_rough(over_temperature(x_c, inverse, inverse_rest))
        added += exp_rough(over_temperature(x_d, inverse, inverse_rest))
        e = exp_rough(over_temperature(risen, inverse, inverse_rest))
        tempered = tl.fma(tempered, e, tl.sum(added, axis=1))
    return new, rest, weighted, tempered


@kernel
def statistics_kernel(
    x_ptr, x_stride, vocabulary, scale, softcap, inverse, inverse_rest, stats_ptr, maxima_ptr, groups,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, GROUP: tl.constexpr, TEMPERED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The statistics of a row (interface.Rows), and the maximum of each group of GROUP consecutive entries.

    A row whose entries are all masked has no distribution: its statistics are NaN, except that its sums are 0.

    The 16 entries of a block that a thread has (VECTOR of them side by side) share a running maximum, so that no step
    waits for a maximum over the block. With x = z - maximum, ``rest`` is the sum of e^x over all entries but the
    maximum, and ``weighted`` that of x e^x. The maximum is left out because adding its 1 would lose the entropy of a
    row in which it has nearly all the probability.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    maxima_ptr += row * groups
    N: tl.constexpr = BLOCK // 16
    top = tl.full([N], masked(), tl.float32)
    rest = tl.zeros([N], tl.float32)
    weighted = tl.zeros([N], tl.float32)
    tempered = tl.zeros([N], tl.float32)  # rest at the temperature
    whole = vocabulary // BLOCK * BLOCK
    for part in tl.static_range(2):
        for first in range(0 if part == 0 else whole, whole if part == 0 else vocabulary, BLOCK):
            entries = first + tl.arange(0, BLOCK)
            z = load_logits(x_ptr, entries, entries < vocabulary, scale, softcap, SOFTCAP, part == 0)
            top, rest, weighted, tempered = _statistics_block(
                z, first // GROUP, top, rest, weighted, tempered, maxima_ptr, groups, inverse, inverse_rest,
                N, VECTOR, GROUP, TEMPERED, part == 0,
            )  # fmt: skip

    highest = tl.max(top)
    exists = highest > masked()
    undefined = tl.where(exists, 0.0, float("nan"))
    x = top - highest
    e = exp(x)
    ties = tl.sum(tl.where(x == 0, 1.0, 0.0)) - 1.0
    total = tl.sum(e * rest + tl.where(x == 0, 0.0, e)) + ties
    log_sum = log1p(total)
    mean = tl.sum(e * (weighted + x * (rest + 1.0))) / (1.0 + total)
    stats_ptr = stats_of(stats_ptr, row)
    tl.store(stats_ptr, highest + undefined)
    tl.store(stats_ptr + 1, log_sum + undefined)
    tl.store(stats_ptr + 2, log_sum - mean + undefined)
    tl.store(stats_ptr + 4, tl.where(exists, 1.0 + total, total * 0.0))  # NaN where one is among the masked
    tl.store(stats_ptr + 6, mean + undefined)
    if TEMPERED:
        e = exp_rough(over_temperature(x, inverse, inverse_rest))
        total = tl.sum(e * tempered + tl.where(x == 0, 0.0, e)) + ties
        log_sum = log1p(total)
    tl.store(stats_ptr + 3, log_sum + undefined)
    tl.store(stats_ptr + 5, tl.where(exists, 1.0 + total, total * 0.0))


@kernel
def candidates_kernel(
    x_ptr, x_stride, vocabulary, scale, softcap, maxima_ptr, groups, values_ptr, indices_ptr, k,
    ids_ptr, gathered_ptr, n_ids,
    GROUPS: tl.constexpr, GROUP: tl.constexpr, IDS: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """The k largest z in order, of equal ones the smaller index first; and z at ``ids``, NaN for an id outside V.

    Each of k steps finds the group with the largest maximum (of equal ones the first) and takes the largest entry of it
    that is not taken yet. The group's maximum then becomes that of its entries that are left.
    """
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    group = tl.arange(0, GROUPS)
    place = tl.arange(0, GROUP)
    # -inf is below every entry; it stands for groups and entries beyond the row's, and for entries that are taken
    maxima = tl.load(maxima_ptr + row * groups + group, mask=group < groups, other=-float("inf"))
    maxima = tl.where(maxima == maxima, maxima, masked())  # a group of nothing but NaN
    values_ptr += row * k
    indices_ptr += row * k
    value = float("inf")
    index = -1
    for i in range(k):
        chosen = tl.argmax(maxima, axis=0)
        entries = chosen * GROUP + place
        inside = entries < vocabulary
        z = load_z(x_ptr, entries, inside, scale, softcap, SOFTCAP, False)
        z = tl.where(inside, tl.maximum(z, masked()), -float("inf"))
        z = tl.where((z < value) | ((z == value) & (entries > index)), z, -float("inf"))
        value, at = tl.max(z, axis=0, return_indices=True)
        index = chosen * GROUP + at
        tl.store(values_ptr + i, tl.where(value > masked(), value, -float("inf")))
        tl.store(indices_ptr + i, index.to(tl.int64))
        maxima = tl.where(group == chosen, tl.max(tl.where(place == at, -float("inf"), z), axis=0), maxima)
    if ids_ptr is not None:
        slot = tl.arange(0, IDS)
        ids = tl.load(ids_ptr + row * n_ids + slot, mask=slot < n_ids, other=-1)
        inside = (ids >= 0) & (ids < vocabulary)
        z = load_z(x_ptr, ids, inside, scale, softcap, SOFTCAP, False)
        z = tl.where(z == masked(), -float("inf"), z)
        tl.store(gathered_ptr + row * n_ids + slot, tl.where(inside, z, float("nan")), mask=slot < n_ids)
