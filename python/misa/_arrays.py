# SPDX-License-Identifier: Apache-2.0
"""What depends on the framework of an array: element types, bits, empty arrays, streams.

Supports NumPy, PyTorch, CuPy and, in host memory, JAX.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
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
    """Whether the array is a PyTorch tensor; does not import PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def compiling() -> bool:
    """Whether torch.compile is tracing this code; for callers that have a PyTorch tensor."""
    return sys.modules["torch"].compiler.is_compiling()


def _framework(array: Array) -> str:
    kind = np.ndarray if isinstance(array, np.ndarray) else type(array)
    return "torch" if is_torch(array) else kind.__module__.partition(".")[0]


def _type_name(array: Array) -> str:
    kind = type(array)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def require_one_framework(arrays: Mapping[str, Array]) -> None:
    """Raises ValueError unless all arrays are of the first one's framework; None is skipped."""
    (first, like), *others = arrays.items()
    expected = _framework(checked(first, like))
    for name, array in others:
        if array is None or type(array) is type(like):
            continue
        if _framework(array) != expected:
            raise ValueError(
                f"{name}: expected an array of {expected} as {first} is, got {_type_name(array)}"
            )


def dtype_name(name: str, dtype: Any) -> str:
    """The library's name of a dtype, "f32", "bf16" or "e4m3"; accepts these names too."""
    text = dtype if isinstance(dtype, str) else getattr(dtype, "__name__", str(dtype))
    text = text.removeprefix("torch.")
    if text in _DTYPES.values():
        return text
    if text not in _DTYPES:
        hint = "; float32 holds its values exactly" if text == "float16" else ""
        raise ValueError(f"{name}: expected float32, bfloat16 or float8_e4m3fn, got {text}{hint}")
    return _DTYPES[text]


def checked(name: str, array: Array) -> Array:
    """Returns the array; raises ValueError if it is not an array."""
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        raise ValueError(f"{name}: expected an array, got {_type_name(array)}")
    return array


def to_numpy(name: str, array: Array) -> np.ndarray:
    """The array in host memory, copied if it is elsewhere; PyTorch's e4m3 as its bits. Raises
    ValueError if it is not an array or its elements cannot be read."""
    array = _resolved(name, checked(name, array))
    if not is_torch(array):
        return np.asarray(array)
    import torch

    cuda_device(name, array)
    if array.layout != torch.strided or array.is_quantized:
        raise ValueError(f"{name}: expected a dense tensor, got {array.dtype}, {array.layout}")
    return _bits(array).cpu().numpy()


def host_array(name: str, array: Array, dtypes: tuple[str, ...], layout: str) -> np.ndarray:
    """:func:`to_numpy` of an array with one of these dtypes and as many dimensions as ``layout``;
    raises ValueError for any other."""
    host = to_numpy(name, array)
    if host.dtype.name not in dtypes or host.ndim != layout.count(",") + 1:
        raise ValueError(
            f"{name}: expected {' or '.join(dtypes)} {layout}, got {array.dtype} {host.shape}"
        )
    return host


def _bits(array: Array) -> Array:
    if is_torch(array):
        torch = sys.modules["torch"]
        is_e4m3 = array.dtype == torch.float8_e4m3fn and array.layout == torch.strided
        return array.view(torch.uint8) if is_e4m3 else array
    name = str(getattr(array, "dtype", ""))
    if name == "float8_e4m3fn":
        return array.view(np.uint8)
    if name == "bfloat16" and isinstance(array, np.ndarray):
        return array.view(np.uint16)
    return array


def _unmasked(name: str, array: Array) -> Array:
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(f"{name}: expected an array without a mask, got {_type_name(array)}")
    return array


def _resolved(name: str, array: Array) -> Array:
    if is_torch(array):
        if array.is_neg():  # neither protocol can describe a lazy negation
            array = array.detach().resolve_neg()
    else:
        array = _unmasked(name, array)
    return _bits(array) if name in ("q", "k") else array


def _exported(array: Array) -> Array:
    # A tensor's own __dlpack__ is Python code and takes ten times as long. What PyTorch cannot
    # export stays a tensor, which the compiled module refuses by its name.
    try:
        return sys.modules["torch"].utils.dlpack.to_dlpack(array)
    except (BufferError, RuntimeError):
        return array


def readable(name: str, array: Array) -> Array:
    """An input in a form that DLPack and the buffer protocol can describe: q and k in e4m3 become
    uint8, NumPy's bf16 becomes uint16, a tensor a DLPack capsule. None stays None."""
    if array is None:
        return None
    array = _resolved(name, array)
    return _exported(array) if is_torch(array) else array


def require_writable(name: str, array: Array) -> Array:
    """Returns the array; raises ValueError if a call cannot write it."""
    if not is_torch(array):
        return _unmasked(name, array)
    if array.is_neg():
        raise ValueError(f"{name}: expected a writable tensor, got a negated view")
    if array.requires_grad:
        raise ValueError(f"{name}: expected a writable tensor, got one that requires gradients")
    return array


def writable(name: str, array: Array) -> Array:
    """An output in a form that DLPack and the buffer protocol can describe; None stays None."""
    if array is None:
        return None
    array = require_writable(name, array)
    return _exported(array) if is_torch(array) else array


def cuda_device(name: str, array: Array) -> int | None:
    """The number of the CUDA device that an array is on; None for host memory."""
    if isinstance(array, np.ndarray):
        return None
    if is_torch(array):
        if array.device.type not in ("cpu", "cuda"):
            raise ValueError(f"{name}: expected a CPU or CUDA tensor, got one on {array.device}")
        return array.device.index if array.is_cuda else None
    if not hasattr(array, "__dlpack_device__"):
        raise ValueError(f"{name}: expected an array that speaks DLPack, got {_type_name(array)}")
    kind, index = array.__dlpack_device__()
    return None if kind in (_CPU, _CUDA_HOST) else int(index)


def empty(like: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """An uninitialised array of ``like``'s framework and device; dtype is a name, e.g. "int32".
    JAX arrays are read-only, so NumPy arrays are used for them until :func:`returned`."""
    if isinstance(like, np.ndarray) or _is_host_jax(like):
        return np.empty(shape, dtype)
    if is_torch(like):
        import torch

        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if _framework(like) != "cupy":
        raise ValueError(
            "q: expected an array of NumPy, PyTorch or CuPy, or of JAX in host memory, "
            f"got {_type_name(like)}"
        )
    import cupy

    return cupy.empty(shape, dtype)


def _is_host_jax(array: Array) -> bool:
    return _framework(array) == "jaxlib" and cuda_device("q", array) is None


def returned(like: Array, array: Array) -> Array:
    """An array made by :func:`empty`, converted to ``like``'s framework."""
    if array is None or not _is_host_jax(like):
        return array
    import jax

    return jax.numpy.asarray(array)


_LEGACY_STREAM = 1  # DLPack's number for CUDA's default stream


def on_stream(name: str, array: Array) -> Array:
    """An input of a run on a device. A CuPy array becomes a DLPack capsule, which makes CUDA's
    default stream wait until the array is computed."""
    if array is None or is_torch(array) or cuda_device(name, array) is None:
        return readable(name, array)
    return readable(name, array).__dlpack__(stream=_LEGACY_STREAM)


def stream_number(stream: Any) -> int:
    """The cudaStream_t of a stream of PyTorch or CuPy, or given as an integer."""
    number = getattr(stream, "cuda_stream", getattr(stream, "ptr", stream))
    if not isinstance(number, int):
        raise ValueError(f"stream: expected a CUDA stream, got {_type_name(stream)}")
    return number


def stream_of(like: Array) -> int:
    """The CUDA stream for a run on ``like``'s device: PyTorch's current stream, or CUDA's default
    stream for CuPy."""
    if is_torch(like) and like.is_cuda:
        import torch

        return torch.cuda.current_stream(like.device).cuda_stream
    return 0
