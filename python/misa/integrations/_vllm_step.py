# SPDX-License-Identifier: Apache-2.0
"""What MISA reads of a call of vLLM's operator, and of the metadata of a step, worked out once for
all layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import torch

# Arguments that change the selection unless they have this value.
PLAIN = {"use_fp4_cache": False, "use_pcp": False, "dcp_world_size": 1, "candidate_blocks": None}


class Call(NamedTuple):
    """The arguments of vLLM's operator that the replacement reads; those with a default may be
    missing."""

    hidden_states: torch.Tensor
    k_cache_prefix: Any
    kv_cache: torch.Tensor
    q_quant: torch.Tensor
    k: torch.Tensor | None
    weights: torch.Tensor
    quant_block_size: int
    scale_fmt: str | None
    topk_tokens: int
    head_dim: int
    total_seq_lens: int
    topk_indices_buffer: torch.Tensor
    skip_k_cache_insert: bool
    skip_topk_buffer_clear: bool = False
    dense_mha_metadata_layer_name: Any = ""
    use_fp4_cache: bool = False
    use_pcp: bool = False
    dcp_world_size: int = 1
    candidate_blocks: torch.Tensor | None = None


# Arguments that the replacement knows and does not need.
UNREAD = {
    "q_scale",
    "max_model_len",
    "pcp_shard_decode_requests",
    "dcp_rank",
    "cp_kv_cache_interleave_size",
    "candidate_block_size",
    "candidate_write",
    "topk_backend",
}

# The fields that are read, by the class that has them in vLLM's module of the metadata.
METADATA = {
    "DeepseekV32IndexerMetadata": (
        "num_decodes",
        "num_decode_tokens",
        "num_prefills",
        "num_prefill_tokens",
        "slot_mapping",
        "decode",
        "prefill",
    ),
    "DeepSeekV32IndexerDecodeMetadata": (
        "block_table",
        "seq_lens",
        "decode_lens",
        "requires_padding",
    ),
    "DeepseekV32IndexerPrefillMetadata": ("chunks",),
    "DeepseekV32IndexerPrefillChunkMetadata": (
        "block_table",
        "cu_seqlen_ks",
        "cu_seqlen_ke",
        "cu_seq_lens",
        "total_seq_lens",
        "token_start",
        "token_end",
        "skip_kv_gather",
    ),
}


class Decode(NamedTuple):
    """Arguments of Selector.paged."""

    table: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor | None


class Gather(NamedTuple):
    """Keys of some sequences, to be put in a row behind others."""

    table: torch.Tensor
    cu_lengths: torch.Tensor
    first: int
    end: int


class Group:
    """Prefill rows `start` to `end` that are selected in one call, on keys that are gathered for
    it. vLLM cuts them into chunks so that its scores fit a budget; MISA has no scores to fit.
    """

    def __init__(self) -> None:
        self.start = self.end = 0
        self.gathers: list[Gather] = []
        self.ks: list[torch.Tensor] = []
        self.ke: list[torch.Tensor] = []

    def add(self, start: int, end: int, ks: torch.Tensor, ke: torch.Tensor) -> None:
        """Adds rows whose bounds count from the first key of the last gather."""
        if not self.ks:
            self.start = start
        self.end = end
        shift = self.gathers[-1].first
        self.ks.append(ks + shift if shift else ks)
        self.ke.append(ke + shift if shift else ke)

    @property
    def keys(self) -> int:
        return self.gathers[-1].end

    @functools.cached_property
    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """ks and ke of all rows."""
        if len(self.ks) == 1:
            return self.ks[0], self.ke[0]
        return torch.cat(self.ks), torch.cat(self.ke)


def rows_of(metadata: Any) -> dict[str, int]:
    """How many rows of a step, of vLLM's metadata, are "decode" and "prefill"; without zeros."""
    rows = {
        "decode": metadata.num_decode_tokens if metadata.num_decodes > 0 else 0,
        "prefill": metadata.num_prefill_tokens if metadata.num_prefills > 0 else 0,
    }
    return {work: count for work, count in rows.items() if count}


class Step:
    """A step's metadata in the form of MISA's calls.

    Args:
        metadata: vLLM's, of a step.
        most_keys: of a group.
        shards: vLLM's class that says which prefill rows are of this rank, or None.
    """

    def __init__(self, metadata: Any, most_keys: int, shards: Any) -> None:
        self.metadata = metadata
        self.rows = rows_of(metadata)
        self.decode_rows = self.rows.get("decode", 0)
        self.prefill_rows = self.rows.get("prefill", 0)
        self.decode = self._decode() if self.decode_rows else None
        self.shard = None
        self.groups: list[Group] = []
        if self.prefill_rows:
            self.shard = shards and shards.from_metadata(metadata.prefill, self.decode_rows)
            self.groups = self._groups(most_keys)
        self._left: dict[tuple[str, ...], Any] = {}

    @property
    def covered(self) -> int:
        """The first row that no call of MISA writes."""
        row = self.decode_rows
        for group in self.groups:
            if group.start != row:
                break
            row = group.end
        return row

    def without(self, taken: list[str]) -> Any:
        """The metadata for vLLM's operator without the work that MISA does: "decode", "prefill"."""
        if not taken:
            return self.metadata
        key = tuple(taken)
        if key not in self._left:
            gone: dict[str, Any] = {}
            for work in taken:
                gone |= {f"num_{work}s": 0, work: None}
            self._left[key] = dataclasses.replace(self.metadata, **gone)
        return self._left[key]

    @functools.cached_property
    def grouped(self) -> Decode | None:
        """The decode rows by sequence where every row has a row of the block table of its own and
        all sequences have as many queries, so that these share a read of their keys.

        Only a captured batch is known to be like that, whatever its numbers are in a replay.
        """
        sequences, decode = self.metadata.num_decodes, self.decode
        if decode is None or decode.starts is not None or decode.lengths.dim() != 1:
            return decode
        queries, rest = divmod(self.decode_rows, sequences)
        if queries < 2 or rest:
            return decode
        lengths = decode.lengths.view(sequences, queries)
        return Decode(decode.table[::queries], lengths, None)

    def _decode(self) -> Decode:
        decode, rows = self.metadata.decode, self.decode_rows
        lengths = decode.seq_lens
        if lengths.dim() == 2 and lengths.shape[1] == 1:
            lengths = lengths.view(-1)
        sequences = lengths.shape[0]
        table = decode.block_table[:sequences]
        if not decode.requires_padding and lengths.numel() == rows:
            return Decode(table, lengths, None)
        # Sequences with unequal numbers of queries, of which vLLM gives the last one's length.
        if lengths.dim() == 2:
            lengths = lengths[:, -1].contiguous()
        counts = decode.decode_lens[:sequences]
        starts = torch.zeros(sequences + 1, dtype=torch.int32, device=counts.device)
        torch.cumsum(counts, 0, out=starts[1:])
        return Decode(table, lengths, starts)

    def _groups(self, most_keys: int) -> list[Group]:
        groups: list[Group] = []
        group: Group | None = None
        for chunk in self.metadata.prefill.chunks:
            rows = (chunk.token_start, chunk.token_end, chunk.cu_seqlen_ks, chunk.cu_seqlen_ke)
            if self.shard is not None:
                rows = self.shard.narrow(chunk)
            if group is None or not chunk.skip_kv_gather:
                first = group.keys if group is not None else 0
                apart = rows is not None and group is not None and group.ks and group.end != rows[0]
                if group is None or apart or first + chunk.total_seq_lens > most_keys:
                    first, group = 0, Group()
                    groups.append(group)
                end = first + chunk.total_seq_lens
                group.gathers.append(Gather(chunk.block_table, chunk.cu_seq_lens, first, end))
            if rows is not None and rows[0] < rows[1]:
                group.add(*rows)
        return [group for group in groups if group.ks]
