# SPDX-License-Identifier: Apache-2.0
"""The DeepGEMM-shaped functions against the selection and a plain loop."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import misa
from inputs import random_inputs
from misa import deep_gemm, reference


def test_mqa_logits() -> None:
    inputs = random_inputs([(0, 50), (0, 51), (51, 90), (7, 7)], dtype="e4m3", keys=100)
    call = (inputs.q, (inputs.k, inputs.k_scale), inputs.w, inputs.ks, inputs.ke)
    logits = deep_gemm.fp8_mqa_logits(*call)
    assert logits.shape == (4, 100) and logits.dtype == np.float32
    rows = reference.rows(**inputs.arguments())
    for t, row in enumerate(rows):
        exact = reference.scores(row, row.k, np.arange(8))
        seen = slice(inputs.ks[t], inputs.ke[t])
        # Both are float64 sums of the same few numbers; then rounded to float32.
        assert np.allclose(logits[t, seen], exact, rtol=2.0**-23, atol=1e-9)
        assert np.all(np.delete(logits[t], np.arange(100)[seen]) == -np.inf)
    moved = deep_gemm.fp8_mqa_logits(*call, max_seqlen_k=60)
    assert np.array_equal(moved[2, :39], logits[2, 51:90]) and np.all(moved[2, 39:] == -np.inf)
    with pytest.raises(ValueError, match="max_seqlen_k: expected 51 or more, got 50"):
        deep_gemm.fp8_mqa_logits(*call, max_seqlen_k=50)


@pytest.mark.parametrize("clean", [False, True])
def test_paged_mqa_logits(clean: bool) -> None:
    rng = np.random.default_rng(0)
    cache = misa.Cache(8, 64)
    cache.append(rng.standard_normal((512, 64)).astype(np.float32), np.arange(512))
    q = rng.standard_normal((2, 2, 8, 64)).astype(ml_dtypes.float8_e4m3fn)
    w = rng.standard_normal((4, 8)).astype(np.float32)
    table, lengths = np.array([[5, 2, 7], [1, 0, 0]], np.int32), np.array([130, 1], np.int32)
    logits = deep_gemm.fp8_paged_mqa_logits(
        q, cache.data[:, :, None], w, lengths, table, None, 192, clean_logits=clean
    )
    rows = reference.paged_rows(q.reshape(4, 8, 64), w, cache.data, table, lengths, 2)
    for row, got in zip(rows, logits, strict=True):
        exact = reference.scores(row, row.k, np.arange(8))
        assert np.allclose(got[: len(exact)], exact, rtol=2.0**-23, atol=1e-9)
        assert np.all(got[len(exact) :] == (-np.inf if clean else 0))


@pytest.mark.parametrize("multiprocessors", [1, 3, 7, 132])
def test_metadata(multiprocessors: int) -> None:
    """Consecutive, even shares that cover every split once."""
    lengths = np.array([1000, 0, 256, 257, 5000], np.int32)
    plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, 64, multiprocessors)
    assert plan.shape == (multiprocessors + 1, 2) and plan.dtype == np.int32
    splits = -(-lengths // deep_gemm.SPLIT)
    before = np.concatenate([[0], np.cumsum(splits)])
    flat = before[plan[:, 0]] + plan[:, 1]
    assert flat[0] == 0 and flat[-1] == splits.sum()
    shares = np.diff(flat)
    assert shares.max() - shares.min() <= 1
    assert np.all(plan[:-1, 1][shares > 0] < splits[plan[:-1, 0][shares > 0]])
    with pytest.raises(ValueError, match="block_kv: expected 64, got 32"):
        deep_gemm.get_paged_mqa_logits_metadata(lengths, 32, multiprocessors)
