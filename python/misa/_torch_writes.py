# SPDX-License-Identifier: Apache-2.0
"""The PyTorch operators that write arrays of the caller and return nothing, but for selections:
``misa::append``, ``misa::rebuild``, ``misa::copy_pages`` and ``misa::top_k_out``. And what every
operator needs of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from . import _api, _plan

Tensors = Mapping[str, "Tensor | None"]  # quoted: `make docs` has no Tensor to build a union from
"""The tensors of a call by name; None for an optional one that is not given."""


def require_tensors(arguments: Mapping[str, object], optional: Collection[str]) -> None:
    """Raises ValueError unless all arguments are tensors; optional ones may be None."""
    for name, value in arguments.items():
        if not isinstance(value, Tensor) and not (name in optional and value is None):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def common_device(tensors: Tensors) -> torch.device:
    devices = [tensor.device for tensor in tensors.values() if tensor is not None]
    return max(devices, key=devices.count)


def require_one_device(tensors: Tensors) -> None:
    """Raises ValueError that names a tensor on another device than most of them."""
    common = common_device(tensors)
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != common:
            raise ValueError(
                f"{name}: expected a tensor on {common} as the others are, got one on "
                f"{tensor.device}"
            )


def register_fake_writing(op: Any) -> None:
    """For an operator that returns nothing. The dispatcher runs it too where only some tensors are
    on the meta device."""
    names = [argument.name.removeprefix("out_") for argument in op._opoverload._schema.arguments]

    @op.register_fake
    def _(*arguments):
        named = zip(names, arguments, strict=True)
        tensors = {name: value for name, value in named if isinstance(value, Tensor)}
        if not any(isinstance(tensor, FakeTensor) for tensor in tensors.values()):
            require_one_device(tensors)


_DERIVED = ("page_sums", "largest_scales", "sketches")


@torch.library.custom_op("misa::append", mutates_args=("cache", *_DERIVED))
def append_op(
    cache: Tensor,
    k: Tensor | None,
    slots: Tensor,
    scale_format: str,
    page_sums: Tensor | None,
    largest_scales: Tensor | None,
    sketches: Tensor | None,
) -> None:
    """:func:`misa.append` on tensors."""
    _api.append(cache, k, slots, scale_format=scale_format, page_sums=page_sums,
                largest_scales=largest_scales, sketches=sketches)  # fmt: skip


@torch.library.custom_op("misa::rebuild", mutates_args=_DERIVED)
def rebuild_op(
    cache: Tensor,
    page_sums: Tensor | None,
    pages: Tensor,
    filled: Tensor | None,
    largest_scales: Tensor | None,
    sketches: Tensor | None,
) -> None:
    """:func:`misa.rebuild` on tensors."""
    _api.rebuild(cache, page_sums, pages, filled, largest_scales=largest_scales, sketches=sketches)


@torch.library.custom_op("misa::copy_pages", mutates_args=("cache", *_DERIVED))
def copy_pages_op(
    cache: Tensor,
    from_: Tensor,
    to: Tensor,
    page_sums: Tensor | None,
    largest_scales: Tensor | None,
    sketches: Tensor | None,
) -> None:
    """:func:`misa.copy_pages` on tensors."""
    _api.copy_pages(cache, from_, to, page_sums=page_sums, largest_scales=largest_scales,
                    sketches=sketches)  # fmt: skip


@torch.library.custom_op("misa::top_k_out", mutates_args=("out_indices", "out_scores"))
def top_k_out_op(
    logits: Tensor,
    lengths: Tensor | None,
    out_indices: Tensor,
    out_scores: Tensor | None,
    top_k: int,
) -> None:
    """:func:`misa.top_k` with ``out``, whose arrays are separate arguments."""
    _plan.top_k(logits, top_k, lengths=lengths, out=(out_indices, out_scores))


for _op in (append_op, rebuild_op, copy_pages_op, top_k_out_op):
    register_fake_writing(_op)


def append(
    cache: Tensor,
    k: Tensor | None,
    slots: Tensor,
    scale_format: str,
    page_sums: Tensor | None,
    largest_scales: Tensor | None,
    sketches: Tensor | None,
) -> None:
    """:func:`misa.append` on tensors, in compiled code."""
    derived = {"page_sums": page_sums, "largest_scales": largest_scales, "sketches": sketches}
    require_tensors({"k": k, "slots": slots} | derived, ("k", *derived))
    torch.ops.misa.append(cache, k, slots, scale_format, *derived.values())


def rebuild(
    cache: Tensor,
    page_sums: Tensor | None,
    pages: Tensor,
    filled: Tensor | None,
    largest_scales: Tensor | None,
    sketches: Tensor | None,
) -> None:
    """:func:`misa.rebuild` on tensors, in compiled code."""
    given = {"page_sums": page_sums, "pages": pages, "filled": filled,
             "largest_scales": largest_scales, "sketches": sketches}  # fmt: skip
    require_tensors(given, ("filled", *_DERIVED))
    torch.ops.misa.rebuild(cache, *given.values())


def copy_pages(
    cache: Tensor,
    from_: Tensor,
    to: Tensor,
    page_sums: Tensor | None,
    largest_scales: Tensor | None,
    sketches: Tensor | None,
) -> None:
    """:func:`misa.copy_pages` on tensors, in compiled code."""
    given = {"from_": from_, "to": to, "page_sums": page_sums, "largest_scales": largest_scales,
             "sketches": sketches}  # fmt: skip
    require_tensors(given, _DERIVED)
    torch.ops.misa.copy_pages(cache, *given.values())


def top_k_into(
    logits: Tensor, lengths: Tensor | None, indices: Tensor, scores: Tensor | None, top_k: int
) -> None:
    """:func:`misa.top_k` on tensors, in compiled code."""
    require_tensors({"lengths": lengths, "indices": indices, "scores": scores},
                    ("lengths", "scores"))  # fmt: skip
    torch.ops.misa.top_k_out(logits, lengths, indices, scores, top_k)
