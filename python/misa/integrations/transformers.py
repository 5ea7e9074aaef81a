# SPDX-License-Identifier: Apache-2.0
"""This library's indexers inside the sparse-attention models of Hugging Face transformers.

`enable` replaces how a model's indexers score and select; projections, norm, rotary embedding and
key cache stay the model's own. `capture` records the inputs of an indexer, to compare indexers.

Supported models: those whose indexer modules are `DeepseekV32Indexer` or `GlmMoeDsaIndexer`.
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

from ._attention import TRACED_ROWS, attentions, on_call, spread, traced_attention

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

_log = logging.getLogger("misa")


@dataclass
class Usage:
    """What `enable` configured in a model, and how often it has run."""

    config: misa.Config
    backend: str
    layers: tuple[int, ...]  #: layers that have an indexer
    calls: int = 0  #: selections run, one per layer of `layers` and forward pass
    queries: int = 0  #: queries of these selections, padding included


@dataclass(frozen=True)
class _Operands:
    """The operands of an indexer with a flattened batch: the arguments of `misa.select`.

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
    """Makes every indexer of `model` select with this library, from the next forward pass on.

    indexer and overrides are those of `misa.Config`; top_k is the model's own `index_topk`. On a
    model that is already enabled, the new choice replaces the old one. Returns the counters, which
    `usage` returns too. Hooks of accelerate may be added and removed before and after.

    Raises ValueError for a model without a supported indexer, for a top_k, for a configuration that
    the number or size of the model's heads does not allow, and for an indexer module with its own
    `forward` attribute, which would bypass this library; RuntimeError for an unknown backend. The
    model is not changed then.
    """
    named = _indexers(model)
    _, _, top_k = _size(named)
    if "top_k" in overrides:
        raise ValueError(
            f"top_k: expected none, for it is the model's index_topk = {top_k}, got "
            f"{overrides['top_k']}"
        )
    config = misa.Config(indexer, top_k=top_k, **overrides)
    _check(named, config, backend)
    state = _select_with(named, config, backend)
    _log.info(
        "%s selects with %s on %d layers, backend %s",
        type(model).__name__,
        state.config,
        len(state.layers),
        backend,
    )
    return state


def _size(named: dict[str, Any]) -> tuple[int, int, int]:
    """Heads, their size and top_k of all the named indexers."""
    sizes = {(module.n_heads, module.head_dim, module.index_topk) for module in named.values()}
    if len(sizes) > 1:
        raise ValueError(f"model: expected indexers of one size, got (heads, size, top k) {sizes}")
    return sizes.pop()


def _check(named: dict[str, Any], config: misa.Config, backend: str) -> None:
    """Raises what `enable` does for a configuration that the named indexers cannot have."""
    heads, dim, _ = _size(named)
    none = torch.zeros(0, dtype=torch.int32)
    misa.select(  # without queries, the call only validates
        torch.zeros(0, heads, dim),
        torch.zeros(0, heads),
        torch.zeros(0, dim),
        none,
        none,
        config=config,
        backend=backend,
    )


def _select_with(named: dict[str, Any], config: misa.Config, backend: str) -> Usage:
    """Makes the named indexers select with `config`, which _check has passed."""
    layers = tuple(module.layer_idx for module in named.values())
    state = Usage(config=config, backend=backend, layers=layers)
    _intercept(named)
    for module in named.values():
        module.usage = state
    return state


def disable(model: torch.nn.Module) -> None:
    """Restores the model's own indexers; does nothing to a model that is not enabled.

    Raises ValueError for a model without a supported indexer.
    """
    modules = _indexers(model).values()
    for module in modules:
        vars(module).pop("usage", None)
    _release(modules)


def usage(model: torch.nn.Module) -> Usage | None:
    """What `enable` returned for `model`, or None if it is not enabled.

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
    """Records the inputs of indexers in the first forward pass inside the block, a file per layer.

    The safetensors files hold `q`, `w`, `k`, `ks` and `ke` as described in docs/formats.md, with
    the sequences of a batch concatenated, and are written when the block ends. Files of 32 queries
    or more also hold `attn_last32`, from which `misa compare` tells the attention that a selection
    keeps; indexers outside of DeepSeek-V3.2's and GLM-5's own attention modules have none. The
    model may be enabled or not.

    layers: numbers of layers that have an indexer; None is all of them. `{layer}` in `path` becomes
        the layer's number and may be omitted if `layers` is one number.
    rows: queries to write, spread evenly over those of the pass; None writes all.

    Raises ValueError for a wrong argument and for an indexer module with its own `forward`
    attribute, which would bypass this library; RuntimeError if no forward pass ran.
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

    traces: dict[int, dict[str, torch.Tensor]] = {}  # in host memory, without rows not written

    def record(module: Any, _: torch.Tensor, *args: Any) -> None:
        if module.layer_idx not in traces:
            seen = _seen(module, *args)
            kept = spread(len(seen.q), rows).to(seen.q.device)
            tensors = {"q": seen.q, "w": seen.w, "ks": seen.ks, "ke": seen.ke}
            traces[module.layer_idx] = {name: x[kept].cpu() for name, x in tensors.items()}
            traces[module.layer_idx]["k"] = seen.k.cpu()

    def record_attention(module: Any, call: dict[str, Any]) -> None:
        trace = traces.get(module.layer_idx, {})
        if trace and "attn_last32" not in trace and len(trace["q"]) >= TRACED_ROWS:
            last = spread(call["hidden_states"].shape[:2].numel(), rows)[-TRACED_ROWS:]
            trace["attn_last32"] = traced_attention(module, last, len(trace["k"]), call)

    watched = {name: module for name, module in named.items() if module.layer_idx in wanted}
    around = attentions(model)
    hooks = [on_call(around[layer], record_attention) for layer in wanted if layer in around]
    try:
        with _recording(watched, record):
            yield
    finally:
        for hook in hooks:
            hook.remove()
    if not traces:
        raise RuntimeError("capture: expected a forward pass inside the block, got none")
    for layer, trace in traces.items():
        save_file(
            {name: tensor.contiguous() for name, tensor in trace.items()},
            str(path).replace("{layer}", str(layer)),
            metadata={"model": type(model).__name__, "layer": str(layer)},
        )


def evaluate(
    model: torch.nn.Module,
    texts: Sequence[str | torch.Tensor | Sequence[int]],
    indexers: Sequence[str | misa.Config] = ("misa", "hisa", "misa-r", "misa-r:h=3:m=2k"),
    *,
    tokenizer: Callable[..., Any] | None = None,
    path: str | Path | None = None,
    chunk: int = 256,
    backend: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """What other indexers cost on a model and texts, against the model's own indexers.

    Each text is prefilled in chunks with a cache, once with the model's own indexers and once with
    each of `indexers`. Positions that see no more than index_topk keys are not counted, since every
    indexer selects all there. In the first pass each indexer also selects, in every layer, from
    what the own indexer sees: recall of the own set, the attention that the selection keeps, and
    time. The others give the Kullback-Leibler divergence of the next token, agreement of the
    likeliest one, and loss. Time is that of scoring and selection by `misa.select`, beside its DSA.

    model: one that gives logits, not enabled; on any device, or spread by accelerate.
    texts: strings, or token ids int [T]; T is index_topk + 2 or more.
    indexers: configurations with the model's top_k, or in the notation of `misa compare`, such as
        misa-r:h=3:m=2k.
    tokenizer: of the model; needed for strings.
    path: a JSON file, FILE.json, with a page beside it, FILE.html. Both are replaced after each
        pass. A call with the same arguments goes on after the passes that are in the file. None
        keeps nothing.
    chunk: tokens a forward pass.
    backend: that of `misa.select`.
    progress: whether to show a bar on stderr.

    Returns what the file holds: `indexers`, a dict each with `config`, `output` (`kl`, `kl_max`,
    `top1`, `own_loss` and `loss`, also `by_keys`, the number of keys seen), `recall`,
    `attention_kept` and `less_time`, `layers` and a `verdict`; `dsa`, the same of this library's
    DSA, without an output; `layers`, `settings` and the `sums` of each text. What is not known is
    None: recall and time of layers that share another's selection, and the attention of modules
    that are not DeepSeek-V3.2's or GLM-5's own.

    Memory beside the model and its cache of one text: T rows of the last hidden state, in host
    memory; of one layer at a time the own indexer's scores (twice 4 * chunk * heads * T
    bytes), the keys and values of all attention heads (as in any forward pass of these models),
    and 256 MiB of attention; of one chunk two arrays of logits.

    Raises ValueError for a wrong argument, and for a file at `path` whose settings are others;
    RuntimeError for an unknown backend and for logits that are not finite.
    """
    from . import _evaluate  # which imports this module

    return _evaluate.evaluate(
        model,
        texts,
        indexers,
        tokenizer=tokenizer,
        path=path,
        chunk=chunk,
        backend=backend,
        progress=progress,
    )


class _Intercepting:
    """Mixin with the forward pass of an indexer that this library replaces or records."""

    usage: Usage | None = None
    #: Called with the module, the positions that it selected and the arguments of its `forward`.
    recorders: tuple[Callable[..., None], ...] = ()

    # Not compiled, because the mask is checked and calls are counted on the host.
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

        If a query sees fewer, the row is padded with masked positions, those after its last one.
        """
        inputs = (hidden_states, q_resid, position_embeddings, attention_mask, position_ids, cache)
        # A wrapper may have stored this method and call it after the module's class was restored.
        usage = vars(self).get("usage")
        forward = _own_class(self).forward if usage is None else _select
        positions = forward(self, *inputs)
        for record in vars(self).get("recorders", ()):
            record(self, positions, *inputs)
        return positions

    def extra_repr(self) -> str:
        text = super().extra_repr()  # type: ignore[misc]  # defined by the other base
        if self.usage is None:
            return text
        return f"{text}{', ' if text else ''}selects with {self.usage.config}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # A pickle cannot refer to this class by name, because no module defines it. Copies of the
        # module do not record.
        reduced: Any = super().__reduce_ex__(protocol)
        _, _, state, *rest = reduced
        kept = {name: value for name, value in state.items() if name != "recorders"}
        return _blank, (_own_class(self),), kept, *rest


@functools.cache
def _intercepting(own: type) -> Any:
    """The class of an intercepted indexer of the class `own`.

    It has the same name, because device maps and hooks find modules by class name.
    """
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__}
    return type(own.__name__, (_Intercepting, own), names)


def _blank(own: type) -> Any:
    """An intercepted indexer of the class `own` before `copy` or `pickle` gives it its state."""
    cls = _intercepting(own)
    return cls.__new__(cls)


def _intercept(modules: dict[str, Any]) -> None:
    """Makes the named `modules` run the forward pass of `_Intercepting` until `_release`.

    Raises ValueError, and changes nothing, if calls of a module do not reach its class's `forward`.
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
    """Restores the class of those `modules` that this library neither replaces nor records."""
    for module in modules:
        if vars(module).get("usage") is None and not vars(module).get("recorders"):
            vars(module).pop("recorders", None)
            own = _own_class(module)
            if type(module) is _intercepting(own):  # otherwise someone has derived a class from it
                _change_class(module, own)


@contextmanager
def _recording(modules: dict[str, Any], record: Callable[..., None]) -> Iterator[None]:
    """Has the named indexers call `record`, as one of their recorders, inside the block."""
    _intercept(modules)
    for module in modules.values():
        module.recorders = (*module.recorders, record)
    try:
        yield
    finally:
        for module in modules.values():
            module.recorders = tuple(r for r in module.recorders if r is not record)
        _release(modules.values())


def _innermost(module: torch.nn.Module) -> Any:
    """What a call of `module` runs inside the hooks of accelerate.

    These hooks set a `forward` on the module itself, which hides that of its class, and call the
    one they replaced as `_old_forward`. Any other wrapper counts as innermost, because what it
    calls is unknown.
    """
    forward = module.forward
    if isinstance(forward, functools.partial) and forward.func.__module__ == "accelerate.hooks":
        forward = module._old_forward
    return forward


def _change_class(module: torch.nn.Module, cls: Any) -> None:
    """Changes the class of `module` to `cls`, also in the `forward` that accelerate has stored."""
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
    """The indexers of `model` by module name."""
    indexers = {n: module for n, module in model.named_modules() if _own_class(module) is not None}
    if not indexers:
        expected = " or ".join(own.__name__ for own in _ROTATE)
        raise ValueError(f"model: expected one with {expected} modules, got {type(model).__name__}")
    return indexers


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
    operands = _flattened(q, w, k, attention_mask)
    usage = indexer.usage
    picked = misa.select(
        operands.q,
        operands.w,
        operands.k,
        operands.ks,
        operands.ke,
        config=usage.config,
        backend=usage.backend,
    ).indices[:, : min(usage.config.top_k, keys)]
    usage.calls += 1
    usage.queries += len(picked)
    # A row is padded only after all positions that it sees, which begin at ks: the padding in
    # column i becomes position ks + i.
    columns = torch.arange(picked.shape[1], dtype=torch.int32, device=picked.device)
    positions = (torch.where(picked < 0, columns, picked) + operands.ks[:, None] % keys) % keys
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
    rotate = next(rotate for cls, rotate in _ROTATE.items() if isinstance(indexer, cls))
    q_rotated, k_rotated = rotate(
        q[..., :rotated], k[..., :rotated], *position_embeddings, unsqueeze_dim=2
    )
    q = torch.cat([q_rotated, q[..., rotated:]], dim=-1)
    k = torch.cat([k_rotated, k[..., rotated:]], dim=-1).squeeze(2)
    w = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype)).float()
    return q, w * (indexer.softmax_scale * indexer.n_heads**-0.5), k


def _flattened(q: torch.Tensor, w: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> _Operands:
    """The batch as packed sequences; the rows of `mask` tell which keys each query sees.

    q [B, S, H, D], w [B, S, H], k [B, T, D]; mask [B or 1, S, T] is true or 0 where a key is seen,
    otherwise false or below 0. Raises ValueError for a row with hidden keys between visible ones.
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
    """The operands of an indexer in a finished forward pass; the cache already has its keys."""
    q, w, k = _project(indexer, hidden_states, q_resid, position_embeddings)
    if cache is not None:
        k = cache.layers[indexer.layer_idx].indexer_keys
    return _flattened(q, w, k, attention_mask)
