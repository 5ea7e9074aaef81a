# SPDX-License-Identifier: Apache-2.0
"""A tiny random model and text."""

import pytest
from tiny import LENGTH, VOCABULARY


@pytest.fixture(scope="module")
def model():
    torch, transformers = map(pytest.importorskip, ("torch", "transformers"))
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
    for layer in made.model.layers:  # attention that prefers some tokens to others
        layer.self_attn.q_proj.weight.mul_(5)
        layer.self_attn.k_proj.weight.mul_(5)
    return made


@pytest.fixture(scope="module")
def windows():
    import numpy as np

    from lab import text

    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 2000).astype(np.int32)
    return text.Windows([tokens], LENGTH, 0)


@pytest.fixture(scope="session")
def book(tmp_path_factory):
    """Documents of words by chance, some of them held out."""
    import json
    import random

    choice = random.Random(0)
    words = ["".join(choice.choices("abcdefghijklmnop", k=4)) for _ in range(60)]
    path = tmp_path_factory.mktemp("book") / "book.jsonl"
    with path.open("w") as file:
        for number in range(40):
            text = " ".join(choice.choices([*words, "The code of", "is", "12.\n"], k=1000))
            file.write(json.dumps({"title": f"book {number}", "text": text}) + "\n")
    return path


@pytest.fixture(scope="session")
def tokenizer(book):
    pytest.importorskip("transformers")
    from lab import decoder, text

    return decoder.tokenizer_of((document.text for document in text.documents([book])), 400)


@pytest.fixture(scope="session")
def tokens(book, tokenizer):
    from lab import text

    return text.tokens_of([book], tokenizer, held_out=False)
