"""What the row kernel and the fused kernel share, one formula each: `csrc/softmax.inc` and `csrc/lanes.inc` in Triton.

Everything is fp32. A comparison with NaN is false, so that a NaN is never taken for a maximum and always ends in the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dllm_kernels.backends.triton.noise import philox4x32

NEGATIVE = float("-inf")


@triton.jit
def log_positive(x):  # type: ignore[no-untyped-def]
    """log x within 1 ulp of fp32 for normal x; the hardware's own has no digits near x = 1."""
    offset = x.to(tl.int32, bitcast=True) - 0x3F3504F3  # of sqrt(1/2), so that f lies around 0
    e = (offset >> 23).to(tl.float32)
    f = ((offset & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    s = f / (2.0 + f)
    w = s * s
    half = 0.5 * f * f
    rest = w * (0.6666677594 + w * (0.3997758329 + w * 0.298707962))
    r = e * 0.693145751953125 + (f - (half - (s * (half + rest) + e * 1.42860677e-6)))
    r = tl.where(x < float("inf"), r, x)
    return tl.where(x > 0, r, tl.where(x == 0, float("-inf"), x))


@triton.jit
def far(d):  # type: ignore[no-untyped-def]
    """d <= 0, made harmless for products where its exponential is 0 anyway."""
    return tl.where(d < -88.0, -88.0, d)


@triton.jit
def exp_far(d):  # type: ignore[no-untyped-def]
    """exp of what `far` returned; exactly 0 far below 0."""
    return tl.where(d < -87.0, 0.0, tl.exp(d))


@triton.jit
def finite_or_zero(x):  # type: ignore[no-untyped-def]
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """A polynomial near 0, where 1 - exp cancels. Triton's own is missing from its interpreter."""
    a = tl.abs(x)
    w = x * x
    e = tl.exp(-2.0 * a)
    large = 1.0 - (e + e) / (1.0 + e)
    large = tl.where(x < 0, -large, large)
    q = -0.00571528729
    q = q * w + 0.02064897679
    q = q * w - 0.05374298617
    q = q * w + 0.1333148479
    q = q * w - 0.3333328366
    return tl.where(a < 0.625, x + x * (w * q), large)


@triton.jit
def reduce_parts(m, s, weighted, top, ENTROPY: tl.constexpr, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Parts of rows `[R, P]` (max, sum of exp, sum of exp times its logarithm, id of the max) as one, in a fixed order."""
    big = tl.max(m, 1)
    down = far(tl.where(m == float("-inf"), float("-inf"), m - finite_or_zero(big)[:, None]))
    scale = exp_far(down)
    total = tl.sum(s * scale, 1)
    mean = tl.sum(scale * (weighted + down * s), 1) if ENTROPY else total
    first = tl.min(tl.where(m == big[:, None], top, 2147483647), 1) if TOP else tl.zeros_like(big).to(tl.int32)
    return big, total, mean, first


@triton.jit
def finish(m, s, weighted, target_z):  # type: ignore[no-untyped-def]
    """The target joins the others: (base, others, total, mean, log_sum), for statistics and operands alike.

    Over all classes `total = sum exp(z - base)`, `mean = sum p (z - base)`, `log_sum = log total` with the digits that
    the addition lost, so that logp keeps its own where p -> 1.
    """
    base = finite_or_zero(tl.where(target_z > m, target_z, m))
    down = far(tl.where(m == float("-inf"), float("-inf"), m - base))
    scale = exp_far(down)
    others = s * scale
    d = far(target_z - base)
    e = exp_far(d)
    total = others + e
    back = total - others
    lost = (others - (total - back)) + (e - back)
    mean = (scale * (weighted + down * s) + e * d) / total
    return base, others, total, mean, log_positive(total) + lost / total


@triton.jit
def top_of(m, top, target_z, target):  # type: ignore[no-untyped-def]
    """Id of the largest logit, the target included; the smallest id of equals."""
    wins = (target_z > m) | ((target_z == m) & (target < top))
    return tl.where(wins, target, top)


@triton.jit
def gumbel(high, low):  # type: ignore[no-untyped-def]
    """-log(-log1p(-u)), u = (high * 2^32 + low + 1/2) / 2^64. Near u = 1 the complement is taken in integers."""
    bits = (high.to(tl.uint64) << 32) | low.to(tl.uint64)
    complement = bits ^ 0xFFFFFFFFFFFFFFFF
    large = -log_positive((complement.to(tl.float32) + 0.5) * 5.421010862427522e-20)
    u = (bits.to(tl.float32) + 0.5) * 5.421010862427522e-20
    s = u / (2.0 - u)  # 2 atanh(u / (2 - u)) where u < 1/4
    w = s * s
    small = s * (2.0 + w * (0.666666667 + w * (0.4 + w * (0.285714286 + w * 0.222222222))))
    return -log_positive(tl.where(high >= 0x40000000, large, small))


@triton.jit
def gumbel_at_most(high):  # type: ignore[no-untyped-def]
    """A bound from the high word alone: -log1p(-u) >= u + u^2 / 2 and u >= high / 2^32, or 2^-65 where that is 0."""
    u = tl.where(high == 0, 2.7e-20, high.to(tl.float32) * 2.3283064365386963e-10)
    return -tl.log(u * (1.0 + 0.5 * u))


@triton.jit
def words_of(ids, key0, key1, step, tag):  # type: ignore[no-untyped-def]
    """The 32-bit word of one id per row."""
    zero = tl.zeros_like(key0)
    w0, w1, w2, w3 = philox4x32((ids >> 2).to(tl.uint32), zero + step.to(tl.uint32), zero, zero + tag, key0, key1)
    which = ids & 3
    return tl.where(which < 2, tl.where(which == 0, w0, w1), tl.where(which == 2, w2, w3))


@triton.jit
def draw(z, v0, inverse, share, key0, key1, step, best, best_id, best_z, R: tl.constexpr, C: tl.constexpr):  # type: ignore[no-untyped-def]
    """Columns [v0, v0 + C) of R rows take part in the draw of the largest z * inverse + g, the smallest id of equals.

    `inverse` is a number, or with `share`, of the noise, one of each row: z * inverse + share * g.

    Every logit gets a bound from its high word; low words and our own logarithms are for those alone whose bound reaches
    the best so far, the largest bound first: one a row nearly always. The margin covers the rounding of both.
    """
    quad = (v0 >> 2) + tl.arange(0, C // 4)
    none = tl.zeros([R, C // 4], tl.uint32)
    w0, w1, w2, w3 = philox4x32(
        none + quad[None, :].to(tl.uint32), none + step.to(tl.uint32), none, none, none + key0[:, None], none + key1[:, None]
    )
    high = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(R, C)
    most = gumbel_at_most(high)
    if share is not None:
        scaled = z * inverse[:, None]
        most = most * share[:, None]
    else:
        scaled = z * inverse
    bound = tl.where(z > float("-inf"), scaled + most + (1e-4 + 1e-6 * tl.abs(scaled)), float("-inf"))
    v = v0 + tl.arange(0, C)
    last = tl.max(bound, 1)
    going = (last > float("-inf")) & (last >= best)
    while tl.max(going.to(tl.int32), 0) > 0:
        ids = tl.min(tl.where(bound == last[:, None], v[None, :], 2147483647), 1)
        chosen = v[None, :] == ids[:, None]
        ids_z = tl.sum(tl.where(chosen, z, 0.0), 1)
        ids_high = tl.sum(tl.where(chosen, high.to(tl.int32, bitcast=True), 0), 1).to(tl.uint32, bitcast=True)
        g = gumbel(ids_high, words_of(ids, key0, key1, step, 1))
        if share is not None:
            g = g * share
        y = ids_z * inverse + g
        better = going & ((y > best) | ((y == best) & (ids < best_id)))
        best = tl.where(better, y, best)
        best_id = tl.where(better, ids, best_id)
        best_z = tl.where(better, ids_z, best_z)
        bound = tl.where(chosen, float("-inf"), bound)
        last = tl.max(bound, 1)
        going = (last > float("-inf")) & (last >= best)
    return best, best_id, best_z
