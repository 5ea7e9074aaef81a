# SPDX-License-Identifier: Apache-2.0
"""The choice of an indexer and its options."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, asdict, dataclass
from functools import partial
from typing import Any

from . import _core  # type: ignore[attr-defined]  # compiled


def integer(name: str, value: Any, bits: int = 32) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an integer, got {value!r}") from None
    if number.bit_length() >= bits:
        raise ValueError(f"{name}: expected an integer of {bits} bits, got {number}")
    return number


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected a name, got {value!r}")
    return value


def boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return value


def _integers(name: str, values: Any) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected a list of integers, got {values!r}")
    return tuple(integer(f"{name}[{i}]", value) for i, value in enumerate(values))


_NOT_GIVEN: Any = None  # __post_init__ replaces it by the named indexer's value


@dataclass(frozen=True)
class Config:
    """What an indexer computes; immutable and hashable.

    ``indexer`` is one of :func:`indexer_names`. A field that is not given has the named indexer's
    value. The fields are those of ``misa::IndexerConfig`` (misa/indexer.hpp):

    top_k: positions selected per query.
    router: how the active heads are chosen, one of :func:`router_names`.
    heads: h, how many are routed; ignored by the router "all".
    block: B of the pooled router, a multiple of 64.
    residual: whether one linear row replaces the heads that are not routed (MISA-R).
    filter_block, filter_blocks: HISA's block size, a multiple of 64 or 0 for no filter, and how
        many blocks are kept.
    candidates: m, positions that all heads re-rank; 0 for no re-rank. If not given with a sketch,
        8 * top_k for 2 bits and 2 * top_k for 4.
    sketch: bits an element, 2 or 4, of the sketch of the keys from which scores are computed
        before the re-rank; needs e4m3 keys; 0 for none.
    dense_work: rows of at most this many heads x positions use DSA; 0 for none.
    ordered: whether the positions of a row ascend.
    static_heads: the heads of the router "static".

    Two configs are equal if all fields are, whether given or not. ``dataclasses.replace`` does not
    copy the fields that were not given, so that they follow a new indexer or top_k;
    ``dataclasses.asdict`` returns the fields that were given.

    Raises ValueError for an unknown name or a value of the wrong type. What depends on the number
    of heads H is checked when the config is used with arrays.
    """

    indexer: str = "misa"
    _: KW_ONLY
    top_k: int = 2048
    router: str = _NOT_GIVEN
    heads: int = _NOT_GIVEN
    block: int = _NOT_GIVEN
    residual: bool = _NOT_GIVEN
    filter_block: int = _NOT_GIVEN
    filter_blocks: int = _NOT_GIVEN
    candidates: int = _NOT_GIVEN
    sketch: int = _NOT_GIVEN
    dense_work: int = _NOT_GIVEN
    ordered: bool = _NOT_GIVEN
    static_heads: tuple[int, ...] = _NOT_GIVEN

    def __post_init__(self) -> None:
        # dataclasses.replace and asdict read the fields of the instance: keep the given ones only.
        given = {n: f for n, f in self.__dataclass_fields__.items() if getattr(self, n) is not None}
        object.__setattr__(self, "__dataclass_fields__", given)
        for name in ("indexer", "router"):
            value = getattr(self, name)
            if name == "indexer" or value is not None:
                text(name, value)
        object.__setattr__(self, "top_k", integer("top_k", self.top_k))
        sketch = 0 if self.sketch is None else integer("sketch", self.sketch)
        for name, default in _core.defaults(self.indexer, self.top_k, sketch).items():
            value = getattr(self, name)
            if value is None:
                value = default
            elif name == "router":
                _core.check_router(value)
            elif name == "static_heads":
                value = _integers(name, value)
            elif isinstance(default, bool):
                value = boolean(name, value)
            else:
                value = integer(name, value, 64 if name == "dense_work" else 32)
            object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[Callable[[], Config], tuple[()]]:
        return partial(type(self), **asdict(self)), ()
