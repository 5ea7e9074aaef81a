# SPDX-License-Identifier: Apache-2.0
"""This library's indexers inside the sparse-attention models of Hugging Face transformers.

`enable` replaces how a model's indexers score and select; projections, norm, rotary embedding and
key cache stay the model's own. `capture` records what an indexer sees, to compare indexers on it.

Models: those whose indexer modules are `DeepseekV32Indexer` or `GlmMoeDsaIndexer`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers.models.deepseek_v32 import modeling_deepseek_v32 as deepseek
from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as glm

import misa

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

_log = logging.getLogger("misa")


@dataclass
class Usage:
    """What `enable` switched on in a model, and how often it has run."""

    config: misa.Config
    backend: str
    layers: tuple[int, ...]  #: layers that have an indexer
    calls: int = 0  #: selections run, one a layer of `layers` and forward pass
    queries: int = 0  #: queries that they selected for, padding included


@dataclass(frozen=True)
class _Operands:
    """What an indexer scores, the batch flattened: the arguments of `misa.select`.

    q [T, H, D] and k [L, D] float32 or bfloat16, w [T, H] float32, ks and ke [T] int32, with
    T = batch * queries and L = batch * keys.
    """

    q: torch.Tensor
    w: torch.Tensor
    k: torch.Tensor
    ks: torch.Tensor
    ke: torch.Tensor


def enable(
    model: torch.nn.Module, indexer: str = "misa", *, backend: str = "auto", **overrides: Any
) -> Usage:
    """Lets every indexer of `model` select with this library from the next forward pass on.

    indexer and overrides are those of `misa.Config`; top_k is the model's own `index_topk`. A model
    that is enabled already changes over to the new choice. Returns the counter that `usage` finds
    again. Hooks of accelerate may be put on and taken off before and after.

    Raises ValueError for a model without a supported indexer, for a configuration that the model's
    number of heads or their size does not allow, and for an indexer with a `forward` of its own
    that keeps calls from this library; RuntimeError for an unknown backend. The model then is as it
    was.
    """
    named = _indexers(model)
    modules = named.values()
    sizes = {(module.n_heads, module.head_dim, module.index_topk) for module in modules}
    if len(sizes) > 1:
        raise ValueError(f"model: expected indexers of one size, got (heads, size, top k) {sizes}")
    heads, dim, top_k = sizes.pop()
    state = Usage(
        config=misa.Config(indexer, top_k=top_k, **overrides),
        backend=backend,
        layers=tuple(module.layer_idx for module in modules),
    )
    none = torch.zeros(0, dtype=torch.int32)
    misa.select(  # no query: it only validates
        torch.zeros(0, heads, dim),
        torch.zeros(0, heads),
        torch.zeros(0, dim),
        none,
        none,
        config=state.config,
        backend=backend,
    )
    _intercept(named)
    for module in modules:
        module.usage = state
    _log.info(
        "%s selects with %s on %d layers, backend %s",
        type(model).__name__,
        state.config,
        len(state.layers),
        backend,
    )
    return state


def disable(model: torch.nn.Module) -> None:
    """Gives `model` its own indexers back; nothing happens to one that was not enabled.

    Raises ValueError for a model without a supported indexer.
    """
    modules = _indexers(model).values()
    for module in modules:
        vars(module).pop("usage", None)
    _release(modules)


def usage(model: torch.nn.Module) -> Usage | None:
    """What `enable` returned for `model`, or None where its own indexers select.

    Raises ValueError for a model without a supported indexer.
    """
    return vars(next(iter(_indexers(model).values()))).get("usage")


@contextmanager
def capture(
    model: torch.nn.Module,
    path: str | Path,
    *,
    layers: int | Sequence[int] | None = None,
    rows: int | None = None,
) -> Iterator[None]:
    """Records what indexers see in the first forward pass inside the block, a file a layer.

    The files hold `q`, `w`, `k`, `ks` and `ke` as docs/formats.md lists them (safetensors), the
    sequences of a batch one after the other, and are written when the block ends. It makes no
    difference whether the model is enabled.

    layers: numbers of layers that have an indexer; None is all of them. `{layer}` in `path` becomes
    the layer's number and may be left out where `layers` is one number.
    rows: queries to write, spread evenly over those of the pass; None writes all.

    Raises ValueError for a wrong argument and for an indexer with a `forward` of its own that keeps
    calls from this library, RuntimeError if no forward pass ran.
    """
    named = _indexers(model)
    present = [module.layer_idx for module in named.values()]
    wanted = present if layers is None else [layers] if isinstance(layers, int) else layers
    for layer in wanted:
        if layer not in present:
            raise ValueError(f"layers: expected some of {present}, got {layer}")
    if not isinstance(layers, int) and "{layer}" not in str(path):
        raise ValueError(f"path: expected '{{layer}}' in it with several layers, got '{path}'")
    if rows is not None and rows < 1:
        raise ValueError(f"rows: expected 1 or more, got {rows}")

    traces: dict[int, _Operands] = {}

    def record(module: Any, *args: Any) -> None:
        if module.layer_idx not in traces:
            traces[module.layer_idx] = _seen(module, *args)

    watched = {name: each for name, each in named.items() if each.layer_idx in wanted}
    _intercept(watched)
    for module in watched.values():
        module.recorders = (*module.recorders, record)
    try:
        yield
    finally:
        for module in watched.values():
            module.recorders = tuple(each for each in module.recorders if each is not record)
        _release(watched.values())
    if not traces:
        raise RuntimeError("capture: expected a forward pass inside the block, got none")
    for layer, trace in traces.items():
        tensors = {"q": trace.q, "w": trace.w, "ks": trace.ks, "ke": trace.ke}
        if rows is not None and rows < len(trace.q):
            kept = torch.linspace(0, len(trace.q) - 1, rows, dtype=torch.float64).round().long()
            tensors = {name: each[kept.to(each.device)] for name, each in tensors.items()}
        tensors["k"] = trace.k
        save_file(
            {name: each.contiguous().cpu() for name, each in tensors.items()},
            str(path).replace("{layer}", str(layer)),
            metadata={"model": type(model).__name__, "layer": str(layer)},
        )


class _Intercepting:
    """Forward pass of an indexer that this library selects for or records; mixed into its class."""

    usage: Usage | None = None
    recorders: tuple[Callable[..., None], ...] = ()

    # The mask is checked on the host, and calls are counted there: a compiled graph holds neither.
    @torch.compiler.disable
    @torch.no_grad()
    def forward(
        self,
        hidden_states: torch.Tensor,
        q_resid: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """As the model's own: int32 [B, S, min(top_k, T)] distinct positions of the T keys.

        Where a query sees fewer, positions that the mask hides fill the row: those behind its last.
        """
        inputs = (hidden_states, q_resid, position_embeddings, attention_mask, position_ids, cache)
        # A wrapper may have kept this method and call it when the module has its own class again.
        usage = vars(self).get("usage")
        forward = _own_class(self).forward if usage is None else _select
        positions = forward(self, *inputs)
        for record in vars(self).get("recorders", ()):
            record(self, *inputs)
        return positions

    def extra_repr(self) -> str:
        own = super().extra_repr()  # type: ignore[misc]  # the other class has it
        if self.usage is None:
            return own
        return f"{own}{', ' if own else ''}selects with {self.usage.config}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # No module holds this class under a name that a pickle could refer to. What is recorded is
        # the module's, not its copies'.
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = reduced
        kept = {name: value for name, value in state.items() if name != "recorders"}
        return _blank, (_own_class(self),), kept, *rest


@functools.cache
def _intercepting(own: type) -> Any:
    """The class of an intercepted indexer of the class `own`.

    It has the same name, because device maps and hooks find modules by the names of their classes.
    """
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (_Intercepting, own), names)


def _blank(own: type) -> Any:
    """An intercepted indexer of the class `own` before `copy` or `pickle` gives it its state."""
    cls = _intercepting(own)
    return cls.__new__(cls)


def _intercept(modules: dict[str, Any]) -> None:
    """Lets the forward passes of `modules`, by name, run that of `_Intercepting` until `_release`.

    Raises ValueError, and changes nothing, if a call of one would not reach its class's `forward`.
    """
    for name, module in modules.items():
        forward = _innermost(module)
        if forward != MethodType(type(module).forward, module):
            raise ValueError(
                f"model: expected {name} to run the forward of its class, plain or under hooks of "
                f"accelerate, got {forward!r} set on the module"
            )
    for module in modules.values():
        if not isinstance(module, _Intercepting):
            _change_class(module, _intercepting(module.__class__))


def _release(modules: Iterable[Any]) -> None:
    """Gives `modules` that this library neither selects for nor records their own class back."""
    for module in modules:
        if vars(module).get("usage") is None and not vars(module).get("recorders"):
            vars(module).pop("recorders", None)
            own = _own_class(module)
            if type(module) is _intercepting(own):  # else a class was derived from it since
                _change_class(module, own)


def _innermost(module: torch.nn.Module) -> Any:
    """What a call of `module` runs below the hooks that accelerate put on it.

    Those wrap `forward` on the module itself, which wins over that of its class, and call what they
    find as `_old_forward`. What another wrapper calls cannot be known: it is taken as innermost.
    """
    forward = module.forward
    if isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks":
        forward = module._old_forward
    return forward


def _change_class(module: torch.nn.Module, cls: Any) -> None:
    """Makes `module` one of `cls`, and so the `forward` of its class where accelerate stored it."""
    old = MethodType(type(module).forward, module)
    module.__class__ = cls
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value == old:
            vars(module)[name] = MethodType(cls.forward, module)


# V3.2 rotates the two halves of a head's first dimensions, GLM neighbouring pairs.
_ROTATE: dict[type, Callable[..., tuple[torch.Tensor, torch.Tensor]]] = {
    deepseek.DeepseekV32Indexer: deepseek.apply_rotary_pos_emb,
    glm.GlmMoeDsaIndexer: glm.apply_rotary_pos_emb_interleave,
}


def _own_class(module: torch.nn.Module) -> Any:
    """The model's class of an indexer, intercepted or not; None for any other module."""
    for cls in type(module).__mro__:
        if issubclass(cls, tuple(_ROTATE)) and not issubclass(cls, _Intercepting):
            return cls
    return None


def _indexers(model: torch.nn.Module) -> dict[str, Any]:
    """The indexers of `model` by their names in it."""
    found = {name: each for name, each in model.named_modules() if _own_class(each) is not None}
    if not found:
        expected = " or ".join(own.__name__ for own in _ROTATE)
        raise ValueError(f"model: expected one with {expected} modules, got {type(model).__name__}")
    return found


def _select(
    indexer: Any,
    hidden_states: torch.Tensor,
    q_resid: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> torch.Tensor:
    """The forward pass of an enabled indexer."""
    q, w, k = _project(indexer, hidden_states, q_resid, position_embeddings)
    if cache is not None:
        k = cache.update_indexer(k, indexer.layer_idx)
    batch, keys = k.shape[:2]
    each = _flattened(q, w, k, attention_mask)
    usage = indexer.usage
    picked = misa.select(
        each.q, each.w, each.k, each.ks, each.ke, config=usage.config, backend=usage.backend
    ).indices[:, : min(usage.config.top_k, keys)]
    usage.calls += 1
    usage.queries += len(picked)
    # Padding in column i stands in for the i-th position from ks on, as a row is padded only
    # after it took every position that it sees.
    columns = torch.arange(picked.shape[1], dtype=torch.int32, device=picked.device)
    positions = (torch.where(picked < 0, columns, picked) + each.ks[:, None] % keys) % keys
    return positions.view(batch, -1, picked.shape[1])


def _project(
    indexer: Any,
    hidden_states: torch.Tensor,
    q_resid: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q [B, S, H, D], w [B, S, H] and k [B, S, D] of new tokens, by the model's own modules.

    w is float32 with D^-1/2 and H^-1/2 folded in.
    """
    q = indexer.wq_b(q_resid).unflatten(-1, (indexer.n_heads, indexer.head_dim))
    k = indexer.k_norm(indexer.wk(hidden_states)).unsqueeze(2)
    rotated = indexer.qk_rope_head_dim
    rotate = next(each for own, each in _ROTATE.items() if isinstance(indexer, own))
    q_turned, k_turned = rotate(
        q[..., :rotated], k[..., :rotated], *position_embeddings, unsqueeze_dim=2
    )
    q = torch.cat([q_turned, q[..., rotated:]], dim=-1)
    k = torch.cat([k_turned, k[..., rotated:]], dim=-1).squeeze(2)
    w = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype)).float()
    return q, w * (indexer.softmax_scale * indexer.n_heads**-0.5), k


def _flattened(q: torch.Tensor, w: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> _Operands:
    """The batch as one pack of sequences; a query sees what its row of `mask` shows.

    q [B, S, H, D], w [B, S, H], k [B, T, D]; mask [B or 1, S, T] is true or 0 where a key is seen,
    else false or below 0. Raises ValueError for a row that sees keys on both sides of hidden ones.
    """
    batch, keys = k.shape[:2]
    seen = (mask if mask.dtype == torch.bool else mask == 0).expand(batch, *mask.shape[1:])
    starts = seen.clone()
    starts[..., 1:] &= ~seen[..., :-1]
    if (starts.sum(-1) > 1).any():
        raise ValueError(
            "attention_mask: expected one run of visible keys a query, got hidden keys between"
        )
    first = starts.to(torch.uint8).argmax(-1)
    first += keys * torch.arange(batch, device=k.device)[:, None]
    if k.dtype != torch.bfloat16:
        q, k = q.float(), k.float()
    return _Operands(
        q=q.flatten(0, 1),
        w=w.flatten(0, 1),
        k=k.flatten(0, 1),
        ks=first.flatten().int(),
        ke=(first + seen.sum(-1)).flatten().int(),
    )


def _seen(
    indexer: Any,
    hidden_states: torch.Tensor,
    q_resid: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> _Operands:
    """What an indexer scored in a forward pass that ran, whose keys the cache holds by now."""
    q, w, k = _project(indexer, hidden_states, q_resid, position_embeddings)
    if cache is not None:
        k = cache.layers[indexer.layer_idx].indexer_keys
    return _flattened(q, w, k, attention_mask)
