# SPDX-License-Identifier: Apache-2.0
"""Settings for a serving engine, from MISA_* variables or from the model's own config."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import misa


def _flag(text: str) -> bool:
    return {"0": False, "false": False, "1": True, "true": True}[text.lower()]


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(item) for item in text.split(","))


# For every field of misa.Config except top_k, which the model decides: how its variable MISA_<NAME>
# is parsed and what it must look like.
_FIELDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "router": (str, "a router's name"),
    "heads": (int, "an integer"),
    "block": (int, "an integer"),
    "residual": (_flag, "0 or 1"),
    "filter_block": (int, "an integer"),
    "filter_blocks": (int, "an integer"),
    "candidates": (int, "an integer"),
    "sketch": (int, "an integer"),
    "dense_work": (int, "an integer"),
    "ordered": (_flag, "0 or 1"),
    "static_heads": (_integers, "integers separated by commas"),
}

# The fields of a model's config in the release of arXiv 2605.07363, as fields of misa.Config.
# use_misa turns the indexer on, and a misa_stage1_topk other than 0 turns on the re-rank.
_MODEL_FIELDS = {
    "misa_topk_heads": "heads",
    "misa_k_block_size": "block",
    "misa_stage1_topk": "candidates",
}


@dataclass(frozen=True)
class Settings:
    """An indexer for an engine, without top_k.

    decode: whether it also selects for decode; None: where it gains or changes nothing else.
    strict: whether it is an error if MISA cannot do what was asked for.
    """

    indexer: str
    overrides: tuple[tuple[str, Any], ...] = ()
    decode: bool | None = None
    strict: bool = False

    def config(self, top_k: int) -> misa.Config:
        """The indexer for a model that selects `top_k` positions."""
        return _config(self, top_k)

    def decodes(self, config: misa.Config, heads: int) -> bool:
        """Whether decode is to be selected by `config` for a model with so many heads.

        Reading keys limits decode: what scores all of them with fewer heads gains no time over the
        engine's own indexer, and is less exact. So the default is decode by what reads less, a
        block filter or a sketch, and by what selects the same positions as the engine.
        """
        if self.decode is not None:
            return self.decode
        exact = config.router == "all" or config.heads == heads
        return exact or bool(config.filter_block or config.sketch)

    def config_for(self, model: Any) -> misa.Config:
        """The indexer for a model with index_topk, index_n_heads and index_head_dim; ValueError if
        it does not fit them.
        """
        config = self.config(model.index_topk)
        misa.Plan(
            config,
            tokens=1,
            heads=model.index_n_heads,
            dim=model.index_head_dim,
            max_keys=1,
            q_dtype="e4m3",
            k_dtype="e4m3",
            backend="reference",
        )
        return config


@functools.cache
def _config(settings: Settings, top_k: int) -> misa.Config:
    return misa.Config(settings.indexer, top_k=top_k, **dict(settings.overrides))


def read_settings(
    model: object | None = None, environment: Mapping[str, str] = os.environ
) -> Settings | None:
    """The settings from the environment, otherwise those of the model, otherwise None.

    Args:
        model: a Hugging Face config; without `use_misa` it names no indexer.
        environment: MISA_INDEXER names the indexer; MISA_<FIELD> overrides a field of misa.Config,
            also if the model named the indexer; MISA_DECODE (0 or 1) says whether MISA decodes;
            MISA_STRICT=1 makes it an error if it cannot.

    Raises:
        ValueError: a variable that cannot be read, or an indexer that does not exist.
    """
    fields: dict[str, Any] = {}
    indexer = environment.get("MISA_INDEXER", "")
    if not indexer and getattr(model, "use_misa", False):
        named = {field: getattr(model, name, None) for name, field in _MODEL_FIELDS.items()}
        fields = {field: value for field, value in named.items() if value}
        indexer = "misa-dagger" if "candidates" in fields else "misa"
    if not indexer:
        return None
    if indexer not in misa.indexer_names():
        names = ", ".join(misa.indexer_names())
        raise ValueError(f"MISA_INDEXER: expected one of {names}, got {indexer!r}")
    for field, (read, expected) in _FIELDS.items():
        name = f"MISA_{field.upper()}"
        if name in environment:
            fields[field] = _read(name, environment[name], read, expected)
    decode, strict = (
        _read(name, environment[name], _flag, "0 or 1") if name in environment else None
        for name in ("MISA_DECODE", "MISA_STRICT")
    )
    return Settings(indexer, tuple(fields.items()), decode, bool(strict))


def _read(name: str, text: str, read: Callable[[str], Any], expected: str) -> Any:
    try:
        return read(text)
    except (KeyError, ValueError):
        raise ValueError(f"{name}: expected {expected}, got {text!r}") from None


def has(owner: Any, path: str) -> bool:
    """Whether an engine's module or class has an attribute, or one of an attribute: "a.b"."""
    for name in path.split("."):
        fields = getattr(owner, "__dataclass_fields__", {})
        if not hasattr(owner, name) and name not in fields:
            return False
        owner = getattr(owner, name, None)
    return True
