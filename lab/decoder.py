# SPDX-License-Identifier: Apache-2.0
"""A small decoder for long contexts, and its tokenizer.

A folder of it is one that transformers loads: a Llama of bfloat16 weights in files of at most
16 MiB, its tokenizer, and beside them state.json, which is the log of its training.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .indexer import FILE_BYTES, replace, state_of

__all__ = ["Shape", "load", "new", "save", "state_of", "tokenizer_of"]

HEAD_DIM = 64  # the indexers' part with RoPE is as wide
CONTEXT = 131072
HEADER = 1 << 16  # of a file, at most: the rest is for tensors
# Its slowest angles turn less than half around in 128K tokens, the fastest in a few.
ROPE_BASE = 5e6
END = "<|endoftext|>"


class Shape(NamedTuple):
    layers: int
    width: int  # a multiple of 64
    vocabulary: int


def tokenizer_of(texts: Iterable[str], vocabulary: int) -> Any:
    """Byte pairs of the texts, in which every digit is a token of its own."""
    made = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True)]
    parts += [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    made.pre_tokenizer = pre_tokenizers.Sequence(parts)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END],
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END)


def new(shape: Shape, seed: int) -> Any:
    """A decoder of random weights."""
    torch.manual_seed(seed)
    heads = shape.width // HEAD_DIM
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=-(-shape.width * 8 // 3 // 64) * 64,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.LlamaForCausalLM(config)


def save(folder: Path, model: Any, tokenizer: Any, state: dict[str, Any]) -> None:
    """state.json is written last."""
    part = folder / "part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    weights = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    del weights["lm_head.weight"]  # the embedding
    model.save_pretrained(part, state_dict=weights, max_shard_size=FILE_BYTES - HEADER)
    tokenizer.save_pretrained(part)
    for path in sorted(part.iterdir()):
        path.replace(folder / path.name)
    part.rmdir()
    text = json.dumps(state, indent=1)
    replace(folder / "state.json", lambda beside: beside.write_text(text))


def load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The decoder and its tokenizer, as they were saved."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, transformers.AutoTokenizer.from_pretrained(folder)
