"""What is particular to a framework: element types, bits, empty arrays, streams.

NumPy, PyTorch, CuPy and, in host memory, JAX are known.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

Array = Any
"""An array of NumPy, PyTorch, CuPy or JAX."""

_DTYPES = {
    "float32": "f32",
    "bfloat16": "bf16",
    "uint16": "bf16",
    "float8_e4m3fn": "e4m3",
    "uint8": "e4m3",
}
_CPU, _CUDA_HOST = 1, 3  # DLPack's device types


def is_torch(array: Array) -> bool:
    """Whether it is a tensor of PyTorch, which is not imported for the question."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _framework(array: Array) -> str:
    return type(array).__module__.partition(".")[0]


def dtype_name(name: str, dtype: Any) -> str:
    """The library's name, "f32", "bf16" or "e4m3", of a framework's dtype or of such a name."""
    text = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    text = text.removeprefix("torch.")
    if text in _DTYPES.values():
        return text
    if text not in _DTYPES:
        raise ValueError(f"{name}: expected float32, bfloat16 or float8_e4m3fn, got {text}")
    return _DTYPES[text]


def checked(name: str, array: Array) -> Array:
    """The array; ValueError if it is none."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise ValueError(f"{name}: expected an array, got {type(array).__name__}")
    return array


def to_numpy(array: Array) -> np.ndarray:
    """The array in host memory, a copy if it lay elsewhere; PyTorch's e4m3 as the bits."""
    return bits(array).cpu().numpy() if is_torch(array) else np.asarray(array)


def bits(array: Array) -> Array:
    """The same memory in a dtype that DLPack and the buffer protocol carry: the bits of e4m3 are
    uint8, those of NumPy's bf16 uint16. None stays None."""
    if array is None:
        return None
    if is_torch(array):
        import torch

        array = array.detach()
        return array.view(torch.uint8) if array.dtype == torch.float8_e4m3fn else array
    name = str(getattr(array, "dtype", ""))
    if name == "float8_e4m3fn":
        return array.view(np.uint8)
    if name == "bfloat16" and isinstance(array, np.ndarray):
        return array.view(np.uint16)
    return array


def cuda_device(name: str, array: Array) -> int | None:
    """The number of the CUDA device that an array lies on; None for host memory."""
    if isinstance(array, np.ndarray):
        return None
    if is_torch(array):
        if array.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name}: expected a CPU or CUDA tensor, got one on {array.device}")
        return array.device.index if array.is_cuda else None
    if not hasattr(array, "__dlpack_device__"):
        raise ValueError(f"{name}: expected an array that speaks DLPack, got {type(array)}")
    kind, index = array.__dlpack_device__()
    return None if kind in (_CPU, _CUDA_HOST) else int(index)


def empty(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """An uninitialised array of ``like``'s framework and device; dtype is a name, e.g. "int32".
    JAX's arrays cannot be written: NumPy's stand in for them, see :func:`returned`."""
    if isinstance(like, np.ndarray) or _is_host_jax(like):
        return np.empty(shape, dtype)
    if is_torch(like):
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if _framework(like) != "cupy":
        raise ValueError(
            "q: expected an array of NumPy, PyTorch or CuPy, or of JAX in host memory, "
            f"got {type(like)}"
        )
    import cupy

    return cupy.empty(shape, dtype)


def _is_host_jax(array: Array) -> bool:
    return _framework(array) == "jaxlib" and cuda_device("q", array) is None


def returned(like: Array, array: Array) -> Array:
    """An array made by :func:`empty`, as ``like``'s framework has it."""
    if array is None or not _is_host_jax(like):
        return array
    import jax

    return jax.numpy.asarray(array)


_LEGACY_STREAM = 1  # what DLPack calls CUDA's default stream


def on_stream(name: str, array: Array) -> Array:
    """An input of a run on a device; of CuPy a DLPack capsule, which makes CUDA's default stream
    wait for whatever computes the array."""
    if array is None or is_torch(array) or cuda_device(name, array) is None:
        return bits(array)
    return bits(array).__dlpack__(stream=_LEGACY_STREAM)


def stream_of(like: Array) -> int:
    """The CUDA stream that a run on ``like``'s device is put on: PyTorch's current one; for CuPy
    CUDA's default stream."""
    if is_torch(like):
        import torch

        return torch.cuda.current_stream(like.device).cuda_stream
    return 0
