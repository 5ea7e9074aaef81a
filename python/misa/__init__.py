# SPDX-License-Identifier: Apache-2.0
"""Indexers for sparse attention: they select the positions that each query attends to. ::

    score(t, s, J) = sum over j in J of w[t, j] * max(0, q[t, j] . k[s])
    result(t)      = the top k over s

:func:`select` is for contiguous keys, :func:`select_paged` for a paged key cache; both accept
arrays of NumPy, PyTorch, CuPy and, in host memory, JAX. docs/python.md describes the interface,
docs/formats.md the layouts.
"""

from __future__ import annotations

from . import _core  # type: ignore[attr-defined]  # compiled
from ._api import (
    Cache,
    PageTail,
    Selected,
    append,
    compare,
    copy_pages,
    keep_blocks_from_means,
    page_tail,
    rebuild,
    route_from_means,
    select,
    select_paged,
)
from ._config import Config
from ._plan import Plan, top_k


def backends() -> list[_core.BackendInfo]:
    """Every backend of this build, available or not, in order of decreasing priority.

    Each has a ``name``, the instruction set ``isa`` that it runs, its ``requirement``, whether it
    is ``available`` here, and a ``priority``: "auto" is the highest that is available.
    """
    return _core.backends()


def indexer_names() -> list[str]:
    """The names of the indexers, for ``Config.indexer``."""
    return _core.indexer_names()


def router_names() -> list[str]:
    """The names of the routers, for ``Config.router``."""
    return _core.router_names()


def version() -> str:
    """The library's version, "major.minor.patch"."""
    return _core.version()


__version__ = version()

__all__ = [
    "Cache",
    "Config",
    "PageTail",
    "Plan",
    "Selected",
    "__version__",
    "append",
    "backends",
    "compare",
    "copy_pages",
    "indexer_names",
    "keep_blocks_from_means",
    "page_tail",
    "rebuild",
    "route_from_means",
    "router_names",
    "select",
    "select_paged",
    "top_k",
    "version",
]
