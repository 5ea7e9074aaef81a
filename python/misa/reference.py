# SPDX-License-Identifier: Apache-2.0
"""The specification as executable NumPy: every indexer and router in float64, one query at a time.

Independent of the C++ library, slow, and written for readers. A query and the keys that it sees
form a :class:`Row`, and every stage is a function of one. Sources: DSA, DeepSeek-V3.2; MISA and
MISA-dagger, arXiv 2605.07363; HISA, the block filter; MISA-R, this project's own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ._call import Selected
from ._config import Config

MAX_SAMPLES = 128
"""The most positions in the sample grid of MISA-R."""
FIRE_CHANCE = 0.1
"""gamma: the chance of a positive product assumed for heads that have none in the sample."""
E4M3_MAX = 448.0


# Elements ---------------------------------------------------------------------------------------


def _e4m3_values() -> np.ndarray:
    """float64 [256]: the value of each byte (OCP FP8 E4M3)."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    normal = (8 + mantissa) * 2.0 ** (exponent - 10)
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, normal)
    magnitude[127] = np.nan
    return np.concatenate([magnitude, -magnitude])


E4M3 = _e4m3_values()


def values(array: np.ndarray) -> np.ndarray:
    """An array in float32, bfloat16 (or its bits, uint16) or e4m3 (or its bits, uint8) as
    float64."""
    if array.dtype.name in ("uint8", "float8_e4m3fn"):
        return E4M3[array.view(np.uint8)]
    if array.dtype.name in ("uint16", "bfloat16"):
        return (array.view(np.uint16).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def round_e4m3(x: np.ndarray) -> np.ndarray:
    """The nearest e4m3 values, ties to the even code; beyond 448 saturates."""
    finite = E4M3[:127]
    magnitude = np.minimum(np.abs(x), E4M3_MAX)
    above = np.searchsorted(finite, magnitude)
    below = np.maximum(above - 1, 0)
    up, down = finite[above] - magnitude, magnitude - finite[below]
    code = np.where((up < down) | ((up == down) & (above % 2 == 0)), above, below)
    return np.copysign(finite[code], x)


# A query ----------------------------------------------------------------------------------------


@dataclass
class Row:
    """One query and the keys that it sees, float64."""

    q: np.ndarray
    """[H, D]"""
    w: np.ndarray
    """[H]"""
    k: np.ndarray
    """[n, D]"""
    quantised: bool
    """Whether the keys are e4m3."""
    element: np.ndarray | None = None
    """[n, D]: the elements of e4m3 keys, without their scales"""
    scale: np.ndarray | None = None
    """float32 [n]: the scales of e4m3 keys"""
    integer: bool = False
    """Whether the queries are e4m3."""
    rotated: bool = False
    """Whether the keys are those of a rotated sketch."""


def relu(x: np.ndarray) -> np.ndarray:
    """max(0, x); NaN stays NaN."""
    return np.maximum(x, 0)


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest scores, ascending; ties go to the lower position, NaN is last."""
    order = np.lexsort((-np.nan_to_num(scores, nan=0, posinf=np.inf, neginf=-np.inf),
                        np.isnan(scores)))  # fmt: skip
    return np.sort(order[:k])


def scores(row: Row, k: np.ndarray, heads: np.ndarray) -> np.ndarray:
    """[...]: sum over heads, ascending, of w_j * max(0, q_j . k) for keys k [..., D]."""
    return relu(k @ row.q[heads].T) @ row.w[heads]


# Pool -------------------------------------------------------------------------------------------


def block_means(row: Row, block: int) -> np.ndarray:
    """[ceil(n / block), D]: means of the keys of each block that the query sees."""
    return np.stack([row.k[i : i + block].mean(0) for i in range(0, len(row.k), block)])


# Route ------------------------------------------------------------------------------------------


def sample_positions(n: int) -> np.ndarray:
    """0, s, 2s, ... below n, s the smallest power of two with s >= n / 128."""
    stride = 1
    while stride * MAX_SAMPLES < n:
        stride *= 2
    return np.arange(0, n, stride)


def sampled_fits(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[H] each, over the sample, with x = q_j . k: the least-squares slope of max(0, x) on x (0
    where x has no variance), the rms of the fit's error, and the standard deviation of
    max(0, x)."""
    sample = row.k[sample_positions(len(row.k))]
    slopes, rests, spreads = [], [], []
    for q in row.q:
        x = np.array([k @ q for k in sample])
        r = relu(x)
        dx, dr = x - x.mean(), r - r.mean()
        constant = bool(np.all(x == x[0]))
        slope = 0.0 if constant else (dx @ dr) / (dx @ dx)
        slopes.append(slope)
        rests.append(0.0 if constant else rms(dr - slope * dx))
        spreads.append(rms(dr))
    return np.array(slopes), np.array(rests), np.array(spreads)


def rms(x: np.ndarray) -> float:
    """Root mean square of all entries."""
    return float(np.sqrt(np.mean(np.square(x))))


def head_values(row: Row, config: Config) -> np.ndarray:
    """[H]: the values by which the router ranks heads."""
    if config.router == "pooled":
        means = block_means(row, config.block)
        return np.abs(row.w * relu(means @ row.q.T)).mean(0)
    if config.router == "nonlinearity":
        slope, rest, _ = sampled_fits(row)
        kappa = rms(row.k[sample_positions(len(row.k))])
        norm = np.linalg.norm(row.q, axis=1)
        return np.abs(row.w) * (rest + FIRE_CHANCE * norm * kappa * (1 - slope))
    if config.router == "dispersion":
        return np.abs(row.w) * sampled_fits(row)[2]
    if config.router == "self":
        return row.w * relu(row.q @ row.k[-1])
    if config.router == "qnorm":
        return np.linalg.norm(row.q, axis=1)
    return np.abs(row.w)  # "weight"


def route(row: Row, config: Config) -> np.ndarray:
    """The active heads J, ascending."""
    if config.router == "all":
        return np.arange(len(row.w))
    if config.router == "static":
        return np.sort(config.static_heads)
    return top_k(head_values(row, config), config.heads)


def residual_row(row: Row, heads: np.ndarray) -> np.ndarray:
    """float32 [D]: sum over the heads that are not routed of w_j p_j q_j, p_j the fit's slope."""
    others = np.setdiff1d(np.arange(len(row.w)), heads)
    slope = sampled_fits(row)[0]
    return ((row.w * slope)[others] @ row.q[others]).astype(np.float32)


def rounded_residual(row: Row, residual: np.ndarray) -> np.ndarray:
    """float64 [D]: the row used for scoring; with e4m3 keys, rounded with the scale max / 448."""
    if row.rotated:
        residual = rotate(residual)
    if not row.quantised or not np.all(np.isfinite(residual)):
        return residual.astype(np.float64)
    scale = np.float32(np.abs(residual).max() / np.float32(E4M3_MAX))
    return round_e4m3(residual / scale) * np.float64(scale) if scale else np.zeros(len(residual))


# Sketch -----------------------------------------------------------------------------------------

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
"""The magnitudes of the entries of MXFP4; bit 3 of a code is the sign."""
SKETCH_REACH = 14
"""Groups of MXFP4 scaled further than 2^14 below a key's largest count as zero."""


def hadamard(dim: int) -> np.ndarray:
    """int64 [D, D]: the Sylvester-Hadamard matrix."""
    matrix = np.ones((1, 1), np.int64)
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix


def rotated_codes(element: np.ndarray, scale: np.float32) -> tuple[np.ndarray, np.float16]:
    """The 2-bit sketch of the key scale * element [D]: codes [D] and the distance of levels."""
    dim = len(element)
    if np.isnan(element).any() or not np.isfinite(scale):
        return np.zeros(dim, int), np.float16(np.nan)
    a = (element * 512).astype(np.int64) * (-1 if scale < 0 else 1)
    t, total = hadamard(dim) @ a, int(a @ a)
    beyond = np.where(t >= 0, 8192 * t * t >= 8122 * total, 8192 * t * t > 8122 * total)
    codes = np.where(t >= 0, 2, 1) + np.where(beyond & (total > 0), np.where(t >= 0, 1, -1), 0)
    level = np.float32(np.sqrt(8122 / 8192) / 512 / np.sqrt(dim))
    step = np.abs(scale) * (np.sqrt(np.float32(total)) * level)
    return codes, np.float16(min(np.float32(65504), step))


def mxfp4_codes(element: np.ndarray, scale: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """The 4-bit sketch of the key scale * element [D]: codes [D] and ue8m0 bytes [D / 32]."""
    groups = (scale * element.astype(np.float32)).reshape(-1, 32).astype(np.float64)
    codes, exponents = [], []
    for group in groups:
        largest = np.abs(group).max()
        if not np.isfinite(largest):
            exponents.append(0xFF)
            codes.append(np.zeros(32, int))
            continue
        exponent = -127
        while largest > 6 * 2.0**exponent:
            exponent += 1
        distance = np.abs(np.abs(group[:, None]) / 2.0**exponent - E2M1)
        # The nearest of the even codes, unless an odd one is nearer.
        even, odd = 2 * distance[:, ::2].argmin(1), 1 + 2 * distance[:, 1::2].argmin(1)
        every = np.arange(32)
        code = np.where(distance[every, odd] < distance[every, even], odd, even)
        exponents.append(exponent + 127)
        codes.append((code + 8 * np.signbit(group)) * (largest > 0))
    return np.concatenate(codes), np.array(exponents)


def sketched_key(sketch: int, element: np.ndarray, scale: np.float32) -> np.ndarray:
    """float64 [D]: what the sketch of a key stands for."""
    if sketch == 2:
        codes, step = rotated_codes(element, scale)
        return (codes - 1.5) * np.float64(step)
    codes, exponents = mxfp4_codes(element, scale)
    largest = exponents.max()
    if largest == 0xFF:
        return np.full(len(element), np.nan)
    units = np.where(largest - exponents > SKETCH_REACH, 0, 2.0 ** (exponents - 127))
    signs = np.where(codes >= 8, -1, 1)
    return signs * E2M1[codes % 8] * np.repeat(units, 32)


def rotate(x: np.ndarray) -> np.ndarray:
    """float32 [..., D]: rows times the matrix, by butterflies of stride 1, 2, 4, ..., over
    sqrt(D)."""
    dim, stride = x.shape[-1], 1
    x = x.astype(np.float32)
    while stride < dim:
        low, high = np.moveaxis(x.reshape(*x.shape[:-1], -1, 2, stride), -2, 0)
        x = np.stack([low + high, low - high], -2).reshape(x.shape)
        stride *= 2
    return x * np.float32(1 / np.sqrt(dim))


def rotated_heads(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """float64 [H, D] and [H]: the heads rotated and rounded to e4m3, with a scale of max / 448 each
    in the weights."""
    dim = row.q.shape[1]
    if row.integer:
        t = np.where(np.isnan(row.q), 0, row.q * 512).astype(np.int64) @ hadamard(dim)
        x = t.astype(np.float32) * np.float32(2.0**-9) * np.float32(1 / np.sqrt(dim))
        x[np.isnan(row.q).any(1)] = np.nan
    else:
        x = rotate(row.q)
    finite = np.isfinite(x).all(1)
    largest = np.abs(x).max(1)
    scale = np.where(finite, largest / np.float32(E4M3_MAX), np.float32(1))
    ratio = np.where(scale[:, None] > 0, x / np.where(scale > 0, scale, 1)[:, None], 0)
    rounded = np.where(finite[:, None], round_e4m3(np.where(finite[:, None], ratio, 0)), np.nan)
    return rounded, (row.w.astype(np.float32) * scale).astype(np.float64)


def sketched(row: Row, sketch: int) -> Row:
    """The row from which first scores are computed with a sketch of so many bits an element."""
    assert row.element is not None and row.scale is not None
    keys = [
        sketched_key(sketch, e, np.float32(s)) for e, s in zip(row.element, row.scale, strict=True)
    ]
    k = np.stack(keys)
    if sketch == 4:
        return replace(row, k=k)
    q, w = rotated_heads(row)
    return replace(row, q=q, w=w, k=k, rotated=True)


def is_sketched(row: Row, config: Config, scored: int) -> bool:
    """Whether the first scores of so many positions come from the sketch."""
    routes_every_head = config.router != "all" and config.heads == len(row.w)
    return config.sketch > 0 and config.candidates < scored and not routes_every_head


# Filter, score, select, re-rank -----------------------------------------------------------------


def kept_positions(row: Row, config: Config) -> np.ndarray:
    """Positions that the block filter keeps: of the first, the last, and the best other blocks."""
    n, block = len(row.k), config.filter_block
    if block == 0:
        return np.arange(n)
    every = np.arange(len(row.w))
    of_blocks = scores(row, block_means(row, block), every)
    blocks = len(of_blocks)
    between = 1 + top_k(of_blocks[1:-1], config.filter_blocks - 2)
    kept = np.unique(np.concatenate([[0], between, [blocks - 1]])).astype(int)
    return np.concatenate([np.arange(b * block, min((b + 1) * block, n)) for b in kept])


def routed_scores(row: Row, heads: np.ndarray, residual: np.ndarray | None) -> np.ndarray:
    """[n]: the score of every position by the active heads and the residual row."""
    result = scores(row, row.k, heads)
    if residual is not None and len(heads) < len(row.w):
        result = result + row.k @ rounded_residual(row, residual)
    return result


def is_dense(row: Row, config: Config) -> bool:
    """Whether the row is short enough to use DSA."""
    return len(row.w) * len(row.k) <= config.dense_work


def select_row(
    row: Row, config: Config, heads: np.ndarray, residual: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """The selected positions, ascending, and their scores, for given heads and residual row."""
    every = np.arange(len(row.w))
    if is_dense(row, config):
        positions, found = np.arange(len(row.k)), scores(row, row.k, every)
    else:
        positions = kept_positions(row, config)
        first = sketched(row, config.sketch) if is_sketched(row, config, len(positions)) else row
        found = routed_scores(first, heads, residual)[positions]
        if config.candidates > 0:
            best = top_k(found, config.candidates)
            positions, found = positions[best], scores(row, row.k[positions[best]], every)
    best = top_k(found, config.top_k)
    return positions[best], found[best]


# All queries ------------------------------------------------------------------------------------


def rows(
    q: np.ndarray,
    w: np.ndarray,
    k: np.ndarray,
    ks: np.ndarray,
    ke: np.ndarray,
    k_scale: np.ndarray | None = None,
) -> list[Row]:
    """The queries of :func:`misa.select`'s arguments."""
    elements = values(k)
    queries, weights = values(q), w.astype(np.float64)
    result = []
    for t in range(len(queries)):
        seen = slice(ks[t], max(ks[t], ke[t]))
        scale = None if k_scale is None else k_scale[seen]
        result.append(_row(queries[t], weights[t], elements[seen], scale, _is_e4m3(q)))
    return result


def _is_e4m3(q: np.ndarray) -> bool:
    return q.dtype.itemsize == 1


def _row(
    q: np.ndarray, w: np.ndarray, element: np.ndarray, scale: np.ndarray | None, integer: bool
) -> Row:
    if scale is None:
        return Row(q, w, element, False)
    keys = element * scale[:, None].astype(np.float64)
    return Row(q, w, keys, True, element, scale, integer)


@np.errstate(invalid="ignore")  # unused slots may hold anything
def paged_rows(
    q: np.ndarray,
    w: np.ndarray,
    cache: np.ndarray,
    block_table: np.ndarray,
    context_lens: np.ndarray,
    next_n: int = 1,
    query_starts: np.ndarray | None = None,
) -> list[Row]:
    """The queries of :func:`misa.select_paged`'s arguments, cache uint8 [pages, page_size, D + 4].

    context_lens is [B] or [B, next_n], or [T, 1] with query_starts.
    """
    page_size, dim = cache.shape[1], cache.shape[2] - 4
    flat = cache.reshape(len(cache), -1)
    elements = values(flat[:, : page_size * dim]).reshape(-1, page_size, dim)
    scale = np.ascontiguousarray(flat[:, page_size * dim :]).view(np.float32)
    queries, weights = values(q), w.astype(np.float64)
    starts = np.arange(0, len(q) + 1, next_n) if query_starts is None else query_starts
    result = []
    for t in range(len(queries)):
        b = int(np.searchsorted(starts, t, side="right")) - 1
        if context_lens.ndim == 1:
            n = int(context_lens[b]) - int(starts[b + 1] - 1 - t)
        else:
            n = int(context_lens.reshape(-1)[t])
        n = max(n, 0)
        pages = block_table[b, : -(-n // page_size)]
        seen = elements[pages].reshape(-1, dim)[:n], scale[pages].reshape(-1)[:n]
        result.append(_row(queries[t], weights[t], *seen, _is_e4m3(q)))
    return result


@np.errstate(invalid="ignore", over="ignore")
def select(of: list[Row], config: Config) -> Selected:
    """What :func:`misa.select` returns with every optional output, rows ascending; computed in
    float64 from :func:`rows` or :func:`paged_rows`."""
    tokens, dim = len(of), of[0].q.shape[1] if of else 0
    out_scores = np.full((tokens, config.top_k), -np.inf, np.float32)
    out = Selected(
        np.full((tokens, config.top_k), -1, np.int32),
        out_scores,
        np.full((tokens, config.heads), -1, np.int32) if config.router != "all" else None,
        np.zeros((tokens, dim), np.float32) if config.residual else None,
    )
    for t, row in enumerate(of):
        if len(row.k) == 0:
            continue
        heads, residual = np.arange(len(row.w)), None
        if not is_dense(row, config):
            heads = route(row, config)
            if out.heads is not None:
                out.heads[t] = heads
            if out.residual is not None:
                residual = out.residual[t] = residual_row(row, heads)
        positions, found = select_row(row, config, heads, residual)
        out.indices[t, : len(positions)] = positions
        out_scores[t, : len(positions)] = found
    return out
