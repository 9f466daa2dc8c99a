"""Triton kernels: attention weights A recomputed tile by tile from q and k, never stored.

Throughout, t = log2 A = (q . k) scale - lse, with scale = log2(e) / sqrt(d) and lse the row's log-sum-exp in base 2.
Products are accumulated in float32 from bfloat16, float16 or float32 inputs; every count is exact. `lengths` (B,) are
valid tokens per sample: tokens from there on are padding, neither queries nor keys. Strides such as sqb, sqh, sqn are
those of q along B, h and N.

Legend: B batch, N tokens (queries and keys), h heads, d head width, E eps values, J edges.
"""

import triton
import triton.language as tl

#: Scales t - edge so far up that a saturating multiply-add turns it into 0 or 1; a power of two, so nothing is rounded.
EDGE_SCALE = tl.constexpr(2.0**40)

#: Weights are multiplied by it before they take the values' type: 1 / 44,776 is subnormal in float16. A power of two.
WEIGHT_SCALE = tl.constexpr(2.0**15)


@triton.jit
def _above(t, shifted, NATIVE: tl.constexpr):
    """1.0 where t > edge, else 0.0; `shifted` is -edge * EDGE_SCALE.

    One full-rate instruction: comparisons and integer adds run at half the rate of multiply-adds on NVIDIA GPUs, and
    counting edges is most of a statistics pass.
    """
    if NATIVE:
        return tl.inline_asm_elementwise(
            "fma.rn.sat.f32 $0, $1, 0f53800000, $2;", "=f,f,f", [t, shifted], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.where(t * EDGE_SCALE + shifted > 0, 1.0, 0.0)


@triton.jit
def _dot(a, b, NATIVE: tl.constexpr):
    if NATIVE and a.dtype != tl.float32:
        return tl.dot(a, b)
    else:  # the interpreter holds bfloat16 as integers; float32 inputs must not be rounded to TF32
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def row_kernel(
    Q, K, LSE, TOP, ENTROPY, lengths, scale, N, H, sqb, sqh, sqn, skb, skh, skn,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Per query: lse, the largest logit (both base 2, scaled), and the entropy of the row in nats."""
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    keys = tl.load(lengths + b)
    rows, cols, ds = block * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    q = tl.load(
        Q + b * sqb + h * sqh + rows[:, None] * sqn + ds[None, :],
        mask=(rows[:, None] < keys) & (ds[None, :] < D), other=0.0,
    )  # fmt: skip
    base = K + b * skb + h * skh
    top = tl.full([BM], -1e30, tl.float32)
    mass = tl.zeros([BM], tl.float32)
    gap_mass = tl.zeros([BM], tl.float32)
    for start in tl.range(0, N, BN):
        at = start + cols
        inside = at[None, :] < keys
        k = tl.load(base + at[None, :] * skn + ds[:, None], mask=inside & (ds[:, None] < D), other=0.0)
        s = tl.where(inside, _dot(q, k, NATIVE), float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        gap = s * scale - (new * scale)[:, None]
        p = tl.exp2(gap)
        step = (top - new) * scale
        shrink = tl.exp2(step)
        if WITH_ENTROPY:  # relative to the running maximum, so that nothing large cancels
            gap_mass = (gap_mass + mass * tl.maximum(step, -1e9)) * shrink + tl.sum(tl.where(p > 0, p * gap, 0.0), 1)
        mass = mass * shrink + tl.sum(p, 1)
        top = new
    place = bh.to(tl.int64) * N + rows
    tl.store(LSE + place, top * scale + tl.log2(mass), mask=rows < keys)
    tl.store(TOP + place, top, mask=rows < keys)
    if WITH_ENTROPY:
        tl.store(ENTROPY + place, (tl.log2(mass) - gap_mass / mass) * 0.6931471805599453, mask=rows < keys)


@triton.jit
def key_kernel(
    Q, K, LSE, MASS, HEAVY, ABOVE, eps, edges, lengths, counted, scale, N, H, sqb, sqh, sqn, skb, skh, skn,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WITH_MASS: tl.constexpr,
    E: tl.constexpr, J: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Per key: the sum of A over queries, and how many queries have A > eps, for E ascending eps. Per head: how many
    of all A are above each of J edges, over keys below `counted`.

    A tile holds keys by queries, so that sums over queries need no exchange between warps.
    """
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    keys = tl.load(lengths + b)
    rows, cols, ds = tl.arange(0, BM), block * BN + tl.arange(0, BN), tl.arange(0, BD)
    k = tl.load(
        K + b * skb + h * skh + cols[:, None] * skn + ds[None, :],
        mask=(cols[:, None] < keys) & (ds[None, :] < D), other=0.0,
    )  # fmt: skip
    base = Q + b * sqb + h * sqh
    mass = tl.zeros([BN, BM], tl.float32)
    least = tl.zeros([BN], tl.float32)
    heavy = ()
    heavy_edges = ()
    for e in tl.static_range(E):
        if e > 0:
            heavy = heavy + (tl.zeros([BN], tl.float32),)
        heavy_edges = heavy_edges + (tl.load(eps + e) * -EDGE_SCALE,)
    above = ()
    shifted = ()
    for j in tl.static_range(J):
        above = above + (tl.zeros([BN], tl.float32),)
        shifted = shifted + (tl.load(edges + bh * J + j) * -EDGE_SCALE,)
    for start in tl.range(0, N, BM):
        at = start + rows
        inside = at < keys
        q = tl.load(base + at[None, :] * sqn + ds[:, None], mask=inside[None, :] & (ds[:, None] < D), other=0.0)
        lse = tl.load(LSE + bh.to(tl.int64) * N + at, mask=inside, other=float("inf"))
        t = _dot(k, q, NATIVE) * scale - lse[None, :]
        if WITH_MASS:
            mass += tl.exp2(t)
        if J > 0:
            counts = ()
            for j in tl.static_range(J):
                counts = counts + (above[j] + tl.sum(_above(t, shifted[j], NATIVE), 1),)
            above = counts
        if E > 0:
            some = tl.sum(_above(t, heavy_edges[0], NATIVE), 1)
            least += some
            if E > 1:
                # Heavy weights are rare: at most 1 / eps of them in a row.
                if tl.max(some) > 0:
                    more = ()
                    for e in tl.static_range(1, E):
                        more = more + (heavy[e - 1] + tl.sum(_above(t, heavy_edges[e], NATIVE), 1),)
                    heavy = more
    valid = cols < keys
    place = bh.to(tl.int64) * N + cols
    if WITH_MASS:
        tl.store(MASS + place, tl.sum(mass, 1), mask=valid)
    if E > 0:
        tl.store(HEAVY + bh.to(tl.int64) * E * N + cols, least.to(tl.int32), mask=valid)
    for e in tl.static_range(1, E):
        tl.store(HEAVY + (bh.to(tl.int64) * E + e) * N + cols, heavy[e - 1].to(tl.int32), mask=valid)
    if J > 0:
        of_head = valid & (cols < tl.load(counted + b))
        for j in tl.static_range(J):
            tl.atomic_add(ABOVE + bh * J + j, tl.sum(tl.where(of_head, above[j], 0.0).to(tl.int64)))


@triton.jit
def sample_kernel(
    Q, K, LSE, T, ROWS, COLS, scale, n, N, H, sqb, sqh, sqn, skb, skh, skn,
    D: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """t of n chosen weights of each head: (query, key) pairs, the same for all heads of a sample."""
    pairs, bh = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    ds = tl.arange(0, BD)
    i = tl.load(ROWS + b * n + pairs, mask=pairs < n, other=0)
    j = tl.load(COLS + b * n + pairs, mask=pairs < n, other=0)
    q = tl.load(Q + b * sqb + h * sqh + i[:, None] * sqn + ds[None, :], mask=ds[None, :] < D, other=0.0)
    k = tl.load(K + b * skb + h * skh + j[:, None] * skn + ds[None, :], mask=ds[None, :] < D, other=0.0)
    t = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * scale - tl.load(LSE + bh.to(tl.int64) * N + i)
    tl.store(T + bh.to(tl.int64) * n + pairs, t, mask=pairs < n)


@triton.jit
def masked_kernel(
    Q, K, V, OUT, LSE, LIMIT, REMOVED, DROPPED, lengths, protected, scale, N, H,
    sqb, sqh, sqn, skb, skh, skn, svb, svh, svn, sob, soh, son,
    D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, RENORMALISE: tl.constexpr,
    TAIL: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Attention without weights below their row's limit (in t); keys from `protected` on are never removed. With TAIL,
    the mean of a row's removed weights takes the place of each."""
    block, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    keys = tl.load(lengths + b)
    first_protected = tl.load(protected + b)
    rows, cols, ds = block * BM + tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BD)
    valid = rows < keys
    q = tl.load(
        Q + b * sqb + h * sqh + rows[:, None] * sqn + ds[None, :], mask=valid[:, None] & (ds[None, :] < D), other=0.0
    )
    place = bh.to(tl.int64) * N + rows
    lse = tl.load(LSE + place, mask=valid, other=float("inf"))
    limit = tl.load(LIMIT + place, mask=valid, other=0.0)
    acc = tl.zeros([BM, BD], tl.float32)
    tail_values = tl.zeros([BM, BD], tl.float32)
    kept = tl.zeros([BM], tl.float32)
    dropped = tl.zeros([BM], tl.float32)
    removed = tl.zeros([BM], tl.float32)
    for start in tl.range(0, N, BN):
        at = start + cols
        inside = at[None, :] < keys
        k = tl.load(K + b * skb + h * skh + at[None, :] * skn + ds[:, None], mask=inside & (ds[:, None] < D), other=0.0)
        v = tl.load(
            V + b * svb + h * svh + at[:, None] * svn + ds[None, :],
            mask=(at[:, None] < keys) & (ds[None, :] < D), other=0.0,
        )  # fmt: skip
        t = tl.where(inside, _dot(q, k, NATIVE) * scale - lse[:, None], float("-inf"))
        keep = ~(t < limit[:, None]) | (at[None, :] >= first_protected)  # NaN is below nothing
        a = tl.exp2(t)
        p = tl.where(keep, a, 0.0)
        kept += tl.sum(p, 1)
        dropped += tl.sum(a - p, 1)
        out = tl.where(keep | (at[None, :] >= keys), 0.0, 1.0)
        removed += tl.sum(out, 1)
        if NATIVE:
            acc += _dot((p * WEIGHT_SCALE).to(v.dtype), v, NATIVE)
        else:
            acc += _dot(p, v, NATIVE)
        if TAIL:
            tail_values += _dot(out.to(v.dtype), v, NATIVE)
    if NATIVE:
        acc = acc * (1 / WEIGHT_SCALE)
    if TAIL:
        acc += tail_values * (dropped / tl.maximum(removed, 1.0))[:, None]
    elif RENORMALISE:  # a row that dropped nothing is left as it is
        acc = acc / tl.where(removed > 0, kept, 1.0)[:, None]
    tl.store(
        OUT + b * sob + h * soh + rows[:, None] * son + ds[None, :], acc.to(OUT.dtype.element_ty),
        mask=valid[:, None] & (ds[None, :] < D),
    )  # fmt: skip
    tl.atomic_add(REMOVED + bh, tl.sum(tl.where(valid, removed, 0.0).to(tl.int64)))
    tl.atomic_add(DROPPED + bh, tl.sum(tl.where(valid, dropped, 0.0)))
