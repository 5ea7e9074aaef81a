# SPDX-License-Identifier: Apache-2.0
"""A connector for vLLM that gives every prompt keys without computing them.

Sequences find random bytes in their own pages, as if another instance had computed them, so that
long contexts of many sequences can be decoded without a prefill. `ON` says whether prompts are
given keys at all.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.decode_bench_connector import (
    DecodeBenchConnector,
)

ON = False

# Index keys: 64 keys of 128 e4m3 numbers in each page, then 64 scales.
INDEX_ROW, PAGE, DIM = 132, 64, 128


class LoadedConnector(DecodeBenchConnector):
    """Fills the caches once; loading does nothing."""

    @torch.inference_mode()
    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        super().register_kv_caches(kv_caches)
        generator = torch.Generator(device="cuda").manual_seed(0)
        for cache in kv_caches.values():
            for pages in cache.split(4096):
                if pages.dtype == torch.uint8 and pages.shape[-1] == INDEX_ROW:
                    fill_index(pages, generator)
                elif pages.dtype == torch.uint8:
                    pages.random_(0, 64, generator=generator)
                else:
                    pages.normal_(generator=generator)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if not ON:
            return 0, False
        return super().get_num_new_matched_tokens(request, num_computed_tokens)


def fill_index(pages: torch.Tensor, generator: torch.Generator) -> None:
    """Keys of normal numbers with scales of powers of two."""
    count = pages.shape[0]
    keys = torch.randn((count, PAGE * DIM), generator=generator, device=pages.device) * 64
    keys.clamp_(-448, 448)
    scales = torch.full((count, PAGE), 2.0**-6, device=pages.device)
    packed = torch.cat(
        [keys.to(torch.float8_e4m3fn).view(torch.uint8), scales.view(torch.uint8)], dim=1
    )
    pages.copy_(packed.view(count, PAGE, INDEX_ROW))
