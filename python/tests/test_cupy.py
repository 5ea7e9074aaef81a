# SPDX-License-Identifier: Apache-2.0
"""Arrays of CuPy, where there is a device."""

from __future__ import annotations

import numpy as np
import pytest

import misa
from inputs import PACK, Inputs, random_inputs

cupy = pytest.importorskip("cupy")
if not cupy.is_available() or not hasattr(misa._core, "DevicePlan"):
    pytest.skip("no CUDA device, or a build without CUDA", allow_module_level=True)

OPTIONS = {"config": misa.Config("misa-r", top_k=16, heads=2), "scores": True, "heads": True,
           "residual": True}  # fmt: skip


def arrays(inputs: Inputs) -> dict[str, cupy.ndarray | None]:
    """CuPy has no e4m3, of which it gets the bits."""
    return {
        name: None
        if array is None
        else cupy.asarray(array.view(np.uint8) if array.dtype.name == "float8_e4m3fn" else array)
        for name, array in inputs.arguments().items()
    }


@pytest.mark.parametrize("dtype", ["f32", "bf16", "e4m3"])
def test_equals_numpy(dtype: str) -> None:
    """The device's selection through host memory and through CuPy is the same, bit for bit."""
    inputs = random_inputs(PACK, dtype=dtype)
    want = misa.select(**inputs.arguments(), **OPTIONS, backend="cuda")
    got = misa.select(**arrays(inputs), **OPTIONS)
    for a, b in zip(got, want, strict=True):
        assert isinstance(a, cupy.ndarray)
        assert np.array_equal(np.sort(a.get(), 1), np.sort(b, 1))


def test_side_stream() -> None:
    """A selection waits for the stream that computes its inputs, and is waited for."""
    inputs = random_inputs(PACK, dtype="f32")
    want = misa.select(**arrays(inputs), **OPTIONS)
    late = arrays(inputs)
    late["q"] = cupy.zeros_like(late["q"])
    busy = cupy.ones((4096, 4096), cupy.float32)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for _ in range(20):
            busy = busy @ busy * 1e-4
        late["q"] += arrays(inputs)["q"] + 0 * busy[0, 0]
        got = misa.select(**late, **OPTIONS)
    stream.synchronize()
    assert cupy.array_equal(got.indices, want.indices)


def test_plan() -> None:
    inputs = random_inputs(PACK, dtype="e4m3")
    want = misa.select(**inputs.arguments(), **OPTIONS, backend="cuda")
    plan = misa.Plan(OPTIONS["config"], tokens=4, heads=8, dim=64, max_keys=400, q_dtype="e4m3",
                     k_dtype="e4m3", device="cuda")  # fmt: skip
    out = misa.Selected(cupy.full((4, 16), -77, "int32"))
    workspace = cupy.empty(plan.workspace_bytes, "uint8")
    plan.run(**arrays(inputs), out=out, workspace=workspace)
    assert np.array_equal(np.sort(out.indices.get(), 1), np.sort(want.indices, 1))


def test_refuses() -> None:
    inputs = random_inputs(PACK)
    with pytest.raises(ValueError, match="k: expected an array of cupy as q is, got numpy"):
        misa.select(**(arrays(inputs) | {"k": inputs.k}), **OPTIONS)
    with pytest.raises(ValueError, match="q: expected float32, .*, got float64"):
        misa.select(**(arrays(inputs) | {"q": cupy.zeros((4, 8, 64))}), **OPTIONS)


@pytest.mark.parametrize("by_row", [False, True])
def test_paged(by_row: bool) -> None:
    """Pages may be flat or not, and context_lens of one dimension or two."""
    cache = misa.Cache(10, 64)
    random = np.random.default_rng(0)
    cache.append(random.standard_normal((640, 64)).astype(np.float32), np.arange(640))
    call = (
        random.standard_normal((4, 8, 64)).astype(np.float32),
        random.standard_normal((4, 8)).astype(np.float32),
        cache.data.reshape(10, -1) if by_row else cache.data,
        np.array([[7, 1, 2, 9], [4, 5, -1, -1]], np.int32),
        np.array([[250, 3], [-1, 70]] if by_row else [250, 70], np.int32),
    )
    want = misa.select_paged(*call, next_n=2, **OPTIONS, backend="cuda")
    got = misa.select_paged(*map(cupy.asarray, call), next_n=2, **OPTIONS)
    for a, b in zip(got, want, strict=True):
        assert isinstance(a, cupy.ndarray)
        assert np.array_equal(a.get(), b)
