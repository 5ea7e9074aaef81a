# SPDX-License-Identifier: Apache-2.0
"""The SGLang plugin, against stand-ins for SGLang and, where it is installed, against SGLang.

Without a GPU SGLang's kernel that gathers keys is not there. It is replaced by a loop that does
what it says, behind its Python signature; pool, metadata and hooks are SGLang's.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import gc
import json
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")

from paged import DIM, HEADS, PAGE, Sequences, gather, new_rows, queries  # noqa: E402

from misa.integrations import sglang as plugin  # noqa: E402
from misa.integrations._environment import Settings  # noqa: E402

TOP_K = 64
SETTINGS = Settings("misa", (("heads", 4), ("block", 128)))
DECODE = Settings("misa", (("heads", 4), ("block", 128)), decode=True)
PADDING = 3

# 0 has a cached prefix, 1 is new, 2 is shorter than top_k.
LENGTHS, NEW = [400, 130, 40], [40, 130, 7]


@dataclass
class World:
    """SGLang, or what the plugin uses of it."""

    engine: Any
    pool: Any
    indexer: Any
    sequences: Sequences
    fuse: Callable[[bool], None]
    metadata: Callable[..., Any]  # (method, unfused, next_n, **fields of DSAMetadata)

    def call(self, wrap, settings: Settings, q, w, metadata, **extra):
        """What the wrapped method returns, and how often it called the method itself."""
        method = mock.Mock(return_value="SGLang's own")
        hook = extra.pop("hook", None) or wrap(self.engine, settings, max(LENGTHS))
        batch = SimpleNamespace(attn_cp_metadata=None)
        batch.__dict__.update(extra.pop("batch", {}))
        result = hook(
            method,
            self.indexer,
            *([False] if wrap is plugin.ragged else []),
            forward_batch=batch,
            layer_id=0,
            q_fp8=q,
            weights=w[:, :, None],
            metadata=metadata,
            **extra,
        )
        return result, method.call_count


class AttentionMetadata(SimpleNamespace):
    """SGLang's DSAMetadata."""

    page_size = real_page_table = topk_indices_offset = None


class OlderMetadata:
    """SGLang 0.5.17's DSAIndexerMetadata, as far as the plugin reads it."""

    force_unfused_topk = False
    attn_metadata = topk_transform_method = None

    def __init__(self, attention, method: str, unfused: bool) -> None:
        self.attn_metadata = attention
        self.topk_transform_method = SimpleNamespace(name=method)
        self.force_unfused_topk = unfused

    def get_seqlens_expanded(self):
        return self.attn_metadata.dsa_seqlens_expanded

    def get_page_table_64(self):
        return self.attn_metadata.real_page_table

    def get_indexer_kvcache_range(self):
        return self.attn_metadata.indexer_k_start_end

    def get_indexer_seq_len(self):
        return self.attn_metadata.indexer_seq_lens

    def get_indexer_seq_len_cpu(self):
        return self.attn_metadata.indexer_seq_lens_cpu

    def get_dsa_extend_len_cpu(self):
        return self.attn_metadata.dsa_extend_seq_lens_list

    def get_token_to_batch_idx(self):
        return self.attn_metadata.token_to_batch_idx


class Metadata(OlderMetadata):
    """That of 0.5.23."""

    def get_logical_page_table(self):
        return self.attn_metadata.real_page_table


def gather_pages(buf, page_indices, seq_lens, seq_len_sum, max_seq_len, page_size, index_head_dim):
    """SGLang's gather: k uint8 [seq_len_sum, D] and scales uint8 [seq_len_sum, 4]."""
    assert (page_size, index_head_dim) == (PAGE, DIM) and max_seq_len == int(max(seq_lens))
    k = torch.full((seq_len_sum, DIM), 127, dtype=torch.uint8)
    scale = torch.full((seq_len_sum, 4), 127, dtype=torch.uint8)
    gather(buf, k, scale, page_indices, torch.tensor([0, *seq_lens]).cumsum(0))
    return k, scale


def attention_fields(sequences: Sequences, new: list[int], next_n: int) -> dict[str, Any]:
    """Fields of SGLang's DSAMetadata: of prefill where next_n is 0, else of decode with a row of
    the page table for each of next_n queries a sequence.
    """
    lengths = torch.tensor(LENGTHS)
    counts = [next_n] * len(LENGTHS) if next_n else new
    seen = torch.tensor([count for _, count in new_rows(LENGTHS, counts)]).int()
    cu = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    ks = torch.repeat_interleave(cu[:-1], torch.tensor(counts)).int()
    requests = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int()
    table = sequences.table.repeat_interleave(next_n, 0) if next_n else sequences.table
    cu_rows = torch.arange(len(seen) + 1).int()
    return {
        "page_size": PAGE,
        "cache_seqlens_int32": lengths.int(),
        "max_seq_len_q": max(counts),
        "max_seq_len_k": max(LENGTHS),
        "cu_seqlens_q": torch.tensor([0, *counts]).cumsum(0).int(),
        "cu_seqlens_k": cu,
        "page_table_1": None,
        "real_page_table": table,
        "dsa_cache_seqlens_int32": seen.clamp(max=TOP_K),
        "dsa_cu_seqlens_q": cu_rows,
        "dsa_cu_seqlens_k": cu_rows,
        "dsa_extend_seq_lens_list": counts if not next_n else [1] * len(seen),
        "dsa_seqlens_expanded": seen,
        "topk_indices_offset": ks,
        "indexer_k_start_end": (ks, ks + seen),
        "indexer_seq_lens_cpu": lengths,
        "indexer_seq_lens": lengths.int(),
        "token_to_batch_idx": requests,
    }


def stand_in(older: bool = False) -> World:
    """What there is of 0.5.23, or `older`, of 0.5.17."""
    sequences = Sequences(LENGTHS)
    buffer = sequences.cache.flatten(1)

    class Pool:
        def __init__(self, page_size):
            setattr(self, "page_size" if older else "index_page_size", page_size)

        def get_index_k_scale_buffer(
            self, layer_id, seq_len_tensor, page_indices, seq_len_sum, max_seq_len
        ):
            sizes = (seq_len_sum, max_seq_len, PAGE, DIM)
            return gather_pages(buffer, page_indices, seq_len_tensor, *sizes)

    class Indexer:
        def __init__(self, index_topk):
            self.index_topk = index_topk

        def _get_topk_ragged(
            self,
            enable_dual_stream,
            forward_batch,
            layer_id,
            q_fp8,
            weights,
            metadata,
            topk_result=None,
        ):
            pass

        def _get_topk_paged(self, forward_batch, layer_id, q_fp8, weights, metadata):
            pass

        @staticmethod
        def _get_index_k_read_buffer(pool, layer_id):
            return buffer

    fused = SimpleNamespace(get=lambda: True)
    pool = Pool(PAGE)
    engine = SimpleNamespace(
        Indexer=Indexer,
        get_token_to_kv_pool=lambda: pool,
        envs=SimpleNamespace(SGLANG_DSA_FUSE_TOPK=fused),
    )

    def metadata(method="PAGED", unfused=False, next_n=0, **changes):
        fields = attention_fields(sequences, NEW, next_n) | changes
        kind = OlderMetadata if older else Metadata
        return kind(AttentionMetadata(**fields), method, unfused)

    def fuse(on):
        fused.get = lambda: on

    return World(engine, pool, Indexer(TOP_K), sequences, fuse, metadata)


def sglang(patch) -> World:
    pytest.importorskip("sglang")
    try:
        from sglang.kernels.ops.kvcache import dsa_index_k_cache as accessor
    except ImportError:  # 0.5.17
        from sglang.kernels.ops.attention.dsa import index_buf_accessor as accessor
    from sglang.srt.layers.attention import dsa_backend
    from sglang.srt.layers.attention.dsa import dsa_indexer, dsa_indexer_metadata
    from sglang.srt.layers.attention.dsa.dsa_topk_backend import TopkTransformMethod
    from sglang.srt.mem_cache.memory_pool import DSATokenToKVPool
    from sglang.srt.model_executor import forward_context
    from sglang.srt.model_executor.forward_batch_info import ForwardMode
    from sglang.srt.runtime_context import get_parallel

    kernel = mock.create_autospec(accessor._get_k_and_s_triton, side_effect=gather_pages)
    patch.setattr(accessor, "_get_k_and_s_triton", kernel)
    sequences = Sequences(LENGTHS)
    with get_parallel().override(attn_dcp_size=1):
        pool = DSATokenToKVPool(
            size=PAGE * sequences.cache.shape[0],
            page_size=PAGE,
            kv_lora_rank=512,
            dtype=torch.bfloat16,
            qk_rope_head_dim=64,
            layer_num=1,
            device="cpu",
            index_head_dim=DIM,
            enable_memory_saver=False,
            kv_cache_dim=576,
        )
    buffer = pool.index_k_with_scale_buffer[0]
    buffer[: sequences.cache.shape[0]] = sequences.cache.flatten(1)
    backend = SimpleNamespace(token_to_kv_pool=pool)
    patch.setattr(forward_context, "_current", forward_context.ForwardContext(backend))
    indexer = object.__new__(dsa_indexer.Indexer)
    torch.nn.Module.__init__(indexer)
    indexer.index_topk, indexer.n_heads = TOP_K, HEADS
    indexer.num_init_tokens = indexer.num_local_tokens = 0

    def metadata(method="PAGED", unfused=False, next_n=0, **changes):
        fields = attention_fields(sequences, NEW, next_n) | changes
        if not next_n:
            # Bounds and requests of the queries are worked out by SGLang.
            batch = SimpleNamespace(
                forward_mode=ForwardMode.EXTEND,
                batch_size=len(LENGTHS),
                seq_lens_cpu=torch.tensor(LENGTHS),
                extend_seq_lens_cpu=NEW,
            )
            ranges, requests = dsa_backend.DeepseekSparseAttnBackend._cal_indexer_k_start_end(
                SimpleNamespace(device="cpu"), batch
            )
            fields |= {"indexer_k_start_end": ranges, "token_to_batch_idx": requests} | changes
        return dsa_indexer_metadata.DSAIndexerMetadata(
            attn_metadata=dsa_backend.DSAMetadata(**fields),
            topk_transform_method=TopkTransformMethod[method],
            force_unfused_topk=unfused,
        )

    def fuse(on):
        patch.setenv("SGLANG_DSA_FUSE_TOPK", str(int(on)))

    return World(dsa_indexer, pool, indexer, sequences, fuse, metadata)


@pytest.fixture(params=["stand-in", "older stand-in", "sglang"])
def world(request, monkeypatch):
    monkeypatch.setattr(plugin, "_counters", plugin.Counters(plugin._logger))
    monkeypatch.setattr(plugin, "_failed", {})
    monkeypatch.setattr(plugin, "_counted", None)
    if request.param == "sglang":
        return sglang(monkeypatch)
    return stand_in(older=request.param == "older stand-in")


def padded_queries(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return queries(rows + PADDING)


def meant(world: World, positions: torch.Tensor, rows, meaning: str) -> torch.Tensor:
    """Sorted positions in the meaning that the attention backend wants, row by row."""
    out = positions.clone()
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    for row, (sequence, _) in enumerate(rows):
        for column, position in enumerate(positions[row].tolist()):
            if position >= 0 and meaning == "PAGED":
                out[row, column] = world.sequences.slot(sequence, position)
            elif position >= 0 and meaning == "RAGGED":
                out[row, column] = starts[sequence] + position
    return out.sort(1).values


def assert_selected(world, result, q, w, rows, settings, meaning) -> None:
    expected = world.sequences.expected(q, w, rows, settings.config(TOP_K))
    assert result.dtype == torch.int32
    assert torch.equal(result[: len(rows)].sort(1).values, meant(world, expected, rows, meaning))
    assert (result[len(rows) :] == -1).all()


@pytest.mark.parametrize("meaning", ["PAGED", "RAGGED", "positions"])
def test_prefill(world, meaning):
    rows = new_rows(LENGTHS, NEW)
    q, w = padded_queries(len(rows))
    world.fuse(meaning != "positions")
    metadata = world.metadata("RAGGED" if meaning == "RAGGED" else "PAGED")
    result, calls = world.call(plugin.ragged, SETTINGS, q, w, metadata)
    assert calls == 0
    assert_selected(world, result, q, w, rows, SETTINGS, meaning)
    assert plugin.counters() == {"misa_prefill": len(rows)}


def test_prefill_into_a_given_buffer(world):
    rows = new_rows(LENGTHS, NEW)
    q, w = padded_queries(len(rows))
    buffer = torch.full((len(rows) + PADDING, TOP_K), -1, dtype=torch.int32)
    metadata = world.metadata(unfused=True)
    result, _ = world.call(plugin.ragged, SETTINGS, q, w, metadata, topk_result=buffer)
    assert result is buffer
    assert_selected(world, buffer, q, w, rows, SETTINGS, "positions")


@pytest.mark.parametrize("next_n", [1, 3])
@pytest.mark.parametrize("meaning", ["PAGED", "positions"])
def test_decode_if_asked_for(world, next_n, meaning):
    rows = new_rows(LENGTHS, [next_n] * len(LENGTHS))
    q, w = padded_queries(len(rows))
    world.fuse(meaning == "PAGED")
    metadata = world.metadata(next_n=next_n)
    result, calls = world.call(plugin.paged, DECODE, q, w, metadata)
    assert calls == 0
    assert_selected(world, result, q, w, rows, DECODE, meaning)
    assert plugin.counters() == {"misa_decode": len(rows)}


def test_decode_in_batches_of_every_size(world):
    """Plans are made for the largest batch so far; smaller ones use its plans."""
    hook = plugin.paged(world.engine, DECODE, max(LENGTHS))
    batch = SimpleNamespace(attn_cp_metadata=None)
    for next_n in (1, 3, 2, 5, 1):
        rows = new_rows(LENGTHS, [next_n] * len(LENGTHS))
        q, w = padded_queries(len(rows))
        metadata = world.metadata(next_n=next_n)
        result = hook(mock.Mock(), world.indexer, batch, 0, q, w[:, :, None], metadata)
        assert_selected(world, result, q, w, rows, DECODE, "PAGED")


def test_prefill_in_calls_of_every_size(world):
    """Plans are made for bounds: few of them for all calls, and each call has its own results."""
    hook = plugin.ragged(world.engine, SETTINGS, max(LENGTHS))
    rows = new_rows(LENGTHS, NEW)
    with mock.patch.object(plugin, "Selector", wraps=plugin.Selector) as made:
        for count in (1, 3, 70, 65, len(rows), 2):
            q, w = queries(count)
            whole = world.metadata().attn_metadata
            bounds = tuple(each[:count] for each in whole.indexer_k_start_end)
            requests = whole.token_to_batch_idx[:count]
            metadata = world.metadata(indexer_k_start_end=bounds, token_to_batch_idx=requests)
            result, calls = world.call(plugin.ragged, SETTINGS, q, w, metadata, hook=hook)
            assert calls == 0
            assert_selected(world, result, q, w, rows[:count], SETTINGS, "PAGED")
    asked = [call.kwargs["prefill"] for call in made.call_args_list]
    assert [each.rows for each in asked] == [1, 4, 128, 256]
    assert {each.total for each in asked} == {1024}


def test_more_than_there_is_memory_for_is_left(world, caplog, monkeypatch):
    """And other calls are not."""
    q, _ = queries(4)
    made = SimpleNamespace(prefill=plugin.Bounds(4, 9, 100), decode=plugin.Bounds(4, 9, 0, 3))
    monkeypatch.setattr(plugin, "Selector", lambda *_args, **_kwargs: made)
    plans = plugin._Plans(DECODE, max(LENGTHS))
    assert [plans.ragged(q, 4, keys, TOP_K) for keys in (100, 101, 99)] == [made, None, made]
    plans = plugin._Plans(DECODE, max(LENGTHS))
    assert [plans.paged(q, rows, TOP_K, False) for rows in (3, 4, 2)] == [made, None, made]

    for wrap, counts in ((plugin.ragged, NEW), (plugin.paged, [1] * len(LENGTHS))):
        monkeypatch.setattr(plugin._Plans, wrap.__name__, lambda *_args: None)
        q, w = padded_queries(sum(counts))
        metadata = world.metadata(next_n=int(wrap is plugin.paged))
        assert world.call(wrap, DECODE, q, w, metadata) == ("SGLang's own", 1)
    assert f"{sum(NEW)} rows on {sum(LENGTHS)} keys, more than can be planned for" in caplog.text
    assert f"{len(LENGTHS)} rows, more than can be planned for" in caplog.text
    assert plugin._failed == {}


def test_a_captured_batch_that_nothing_came_before_is_left(world, caplog, monkeypatch):
    monkeypatch.setattr(plugin, "_capturing", lambda tensor: True)
    q, w = padded_queries(len(LENGTHS))
    result, calls = world.call(plugin.paged, DECODE, q, w, world.metadata(next_n=1))
    assert (result, calls) == ("SGLang's own", 1)
    assert "in a CUDA graph before any other batch" in caplog.text
    assert plugin.counters() == {}


@pytest.mark.parametrize("settings", [SETTINGS, DECODE])
@pytest.mark.parametrize("work", ["prefill", "decode"])
def test_captured_rows_are_counted(world, monkeypatch, work, settings):
    """By a kernel that is captured too, whoever selects, once a step ran before."""
    wrap = plugin.paged if work == "decode" else plugin.ragged
    counts = [1] * len(LENGTHS) if work == "decode" else NEW
    q, w = padded_queries(sum(counts))
    hook = wrap(world.engine, settings, max(LENGTHS))
    metadata = world.metadata(next_n=int(work == "decode"))
    for capturing in (False, True):
        monkeypatch.setattr(plugin, "_capturing", lambda tensor, now=capturing: now)
        world.call(wrap, settings, q, w, metadata, hook=hook)
    eager = "misa" if work == "prefill" or settings.decode else "engine"
    captured = "misa" if work == "decode" and settings.decode else "engine"
    total = {f"{eager}_{work}": sum(counts)}
    total[f"{captured}_{work}"] = total.get(f"{captured}_{work}", 0) + sum(counts)
    assert plugin.counters() == total
    assert {path: int(n) for path, n in plugin._counters._replayed.items() if n} == {
        f"{captured}_{work}": sum(counts)
    }


def test_rows_are_counted_in_one_layer(world):
    q, w = padded_queries(sum(NEW))
    world.call(plugin.ragged, SETTINGS, q, w, world.metadata())
    world.indexer = copy.copy(world.indexer)
    world.call(plugin.ragged, SETTINGS, q, w, world.metadata())
    assert plugin.counters() == {"misa_prefill": sum(NEW)}


def test_plans_that_no_graph_holds_are_dropped(world, monkeypatch):
    """Batches grow; graphs hold the memory of those plans that they were captured with."""
    monkeypatch.setattr(plugin, "_capturing", lambda tensor: capturing)
    plans, alive = plugin._Plans(DECODE, max(LENGTHS)), []
    for rows, capturing in ((1, False), (2, False), (2, True), (1, True), (4, False), (9, False)):
        q, _ = queries(rows)
        made = plans.paged(q, rows, TOP_K, capturing)
        assert made.decode.sequences >= rows
        if not any(each() is made for each in alive):
            alive.append(weakref.ref(made))
        del made
        gc.collect()
    assert [each() is not None for each in alive] == [False, True, False, True]
    assert plans._captured == [alive[1]()]


def test_a_layer_that_shares_a_selection_gets_that_of_the_layer_before(world):
    """SGLang makes no call for it and passes on what the hook returned, which is a tensor of its
    own: later calls, for other layers, write elsewhere."""
    rows = new_rows(LENGTHS, NEW)
    q, w = padded_queries(len(rows))
    other, _ = queries(len(rows) + PADDING, seed=9)
    hook = plugin.ragged(world.engine, SETTINGS, max(LENGTHS))
    shared, _ = world.call(plugin.ragged, SETTINGS, q, w, world.metadata(), hook=hook)
    expected = shared.clone()
    world.call(plugin.ragged, SETTINGS, other, w, world.metadata(), hook=hook)
    assert torch.equal(shared, expected)


def test_decode_is_left_by_default(world):
    q, w = padded_queries(len(LENGTHS))
    result, calls = world.call(plugin.paged, SETTINGS, q, w, world.metadata(next_n=1))
    assert (result, calls) == ("SGLang's own", 1)
    assert plugin.counters() == {"engine_decode": len(LENGTHS)}


def page_name(world: World) -> str:
    return "index_page_size" if hasattr(world.pool, "index_page_size") else "page_size"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda world: setattr(world.pool, page_name(world), 16), "index pages of 16 tokens"),
        (lambda world: delattr(world.pool, page_name(world)), "index pages of None tokens"),
        (lambda world: setattr(world.pool, "index_kpool", 4), "pooled index keys"),
        (lambda world: setattr(world.indexer, "num_local_tokens", 8), "always selected"),
    ],
)
def test_what_is_not_covered_is_left_with_a_warning(world, caplog, spoil, reason):
    spoil(world)
    rows = new_rows(LENGTHS, NEW)
    q, w = padded_queries(len(rows))
    for _ in range(2):
        result, calls = world.call(plugin.ragged, SETTINGS, q, w, world.metadata())
        assert (result, calls) == ("SGLang's own", 1)
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and reason in warnings[0]
    assert plugin.counters() == {"engine_prefill": 2 * len(rows)}


def test_context_parallelism_is_left(world):
    q, w = padded_queries(sum(NEW))
    parallel = {"attn_cp_metadata": object()}
    result, _ = world.call(plugin.ragged, SETTINGS, q, w, world.metadata(), batch=parallel)
    assert result == "SGLang's own"


def test_shared_rows_of_the_page_table_are_left(world):
    q, w = padded_queries(2 * len(LENGTHS))
    metadata = world.metadata(next_n=2, real_page_table=world.sequences.table)
    result, _ = world.call(plugin.paged, DECODE, q, w, metadata)
    assert result == "SGLang's own"


ERRORS = [
    ValueError,
    MemoryError,
    RuntimeError,
    AttributeError,
    IndexError,
    KeyError,
    AssertionError,
]


@pytest.mark.parametrize("work", ["prefill", "decode"])
@pytest.mark.parametrize("error", ERRORS)
def test_an_error_leaves_the_work_to_sglang(world, caplog, monkeypatch, work, error):
    """The call that fails, and all that follow, without asking again."""
    calls = []

    def fails(*_arguments, **_more):
        calls.append(work)
        raise error("not today")

    decode = work == "decode"
    monkeypatch.setattr(plugin.Selector, "paged" if decode else "ragged", fails)
    counts = [1] * len(LENGTHS) if decode else NEW
    q, w = padded_queries(sum(counts))
    metadata = world.metadata(next_n=int(decode))
    for _ in range(2):
        wrap = plugin.paged if decode else plugin.ragged
        result, originals = world.call(wrap, DECODE, q, w, metadata)
        assert (result, originals) == ("SGLang's own", 1)
    assert calls == [work]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    reason = f"{error.__name__}: {error('not today')}"
    assert warnings == [f"MISA: {work} left to the engine's own operator: {reason}"]
    assert plugin.counters() == {f"engine_{work}": 2 * sum(counts)}


READ = {
    "prefill": [
        "get_indexer_kvcache_range",
        "get_indexer_seq_len",
        "get_indexer_seq_len_cpu",
        "get_token_to_batch_idx",
    ],
    "decode": ["get_dsa_extend_len_cpu", "get_seqlens_expanded", "get_page_table_64"],
}


@pytest.mark.parametrize(
    ("work", "name"), [(w, name) for w, names in READ.items() for name in names]
)
@pytest.mark.parametrize("strict", [False, True])
def test_metadata_that_cannot_be_read_leaves_the_work(world, monkeypatch, work, name, strict):
    metadata = world.metadata(next_n=int(work == "decode"))
    monkeypatch.setattr(type(metadata), name, mock.Mock(side_effect=IndexError("not today")))
    wrap = plugin.paged if work == "decode" else plugin.ragged
    settings = dataclasses.replace(DECODE, strict=strict)
    q, w = padded_queries(sum(NEW) if work == "prefill" else len(LENGTHS))
    if strict:
        with pytest.raises(RuntimeError, match=f"MISA_STRICT: .* {work}, but IndexError"):
            world.call(wrap, settings, q, w, metadata)
        return
    assert world.call(wrap, settings, q, w, metadata) == ("SGLang's own", 1)
    assert list(plugin.counters()) == [f"engine_{work}"]


def test_what_is_left_is_an_error_if_strict(world):
    settings = dataclasses.replace(DECODE, strict=True)
    q, w = padded_queries(2 * len(LENGTHS))
    metadata = world.metadata(next_n=2, real_page_table=world.sequences.table)
    with pytest.raises(RuntimeError, match="MISA_STRICT: .* decode, but sequences that share"):
        world.call(plugin.paged, settings, q, w, metadata)
    world.indexer.num_local_tokens = 8
    q, w = padded_queries(sum(NEW))
    with pytest.raises(RuntimeError, match="MISA_STRICT: .* prefill, but .*always selected"):
        world.call(plugin.ragged, settings, q, w, world.metadata())


def test_decode_that_nobody_asked_for_is_no_error(world):
    settings = dataclasses.replace(SETTINGS, strict=True)
    q, w = padded_queries(len(LENGTHS))
    result, _ = world.call(plugin.paged, settings, q, w, world.metadata(next_n=1))
    assert result == "SGLang's own"


@pytest.fixture
def modules(monkeypatch):
    """SGLang's modules as far as the guard looks at them."""
    world = stand_in(older=True)
    classes = {
        "DSAIndexerMetadata": type("Any", (Metadata,), {}),
        "DSAMetadata": AttentionMetadata,
        "TopkTransformMethod": enum.Enum("TopkTransformMethod", ["PAGED", "RAGGED"]),
        "DSATokenToKVPool": type(world.pool),
    }
    found = SimpleNamespace(engine=world.engine)
    for kind, (module, _) in plugin._CLASSES.items():
        setattr(found, kind, SimpleNamespace(**{kind: classes[kind]}))
        monkeypatch.setitem(sys.modules, module, getattr(found, kind))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return found


def test_the_guard_accepts_what_has_everything(modules):
    assert plugin._problem(modules.engine, SimpleNamespace()) is None


def test_the_guard_misses_arguments(modules):
    modules.engine.Indexer._get_topk_ragged = lambda self, batch: None
    problem = plugin._problem(modules.engine, SimpleNamespace())
    assert problem is not None and "_get_topk_ragged(q_fp8)" in problem


@pytest.mark.parametrize("name", plugin._HELPERS)
def test_the_guard_misses_helpers(modules, name):
    owner, _, last = name.rpartition(".")
    delattr(getattr(modules.engine, owner) if owner else modules.engine, last)
    problem = plugin._problem(modules.engine, SimpleNamespace())
    assert problem == f"this SGLang has no {name}"


@pytest.mark.parametrize(
    ("kind", "name"), [(k, name) for k, (_, names) in plugin._CLASSES.items() for name in names]
)
def test_the_guard_misses_what_classes_have(modules, kind, name):
    owner = getattr(modules, kind)
    whole = getattr(owner, kind)
    have = {n: v for base in whole.__mro__[:-1] for n, v in vars(base).items() if n[:2] != "__"}
    have["__init__"] = whole.__init__
    setattr(owner, kind, type("Poorer", (), {n: v for n, v in have.items() if n != name}))
    assert plugin._problem(modules.engine, SimpleNamespace()) == f"this SGLang has no {kind}.{name}"


@pytest.mark.parametrize(
    ("kind", "name"), [(k, name) for k, names in plugin._INITIAL.items() for name in names]
)
def test_the_guard_misses_what_instances_have(modules, kind, name):
    owner = modules.engine if kind == "Indexer" else getattr(modules, kind)
    getattr(owner, kind).__init__ = lambda self: None
    assert (
        plugin._problem(modules.engine, SimpleNamespace()) == f"this SGLang has no {kind}({name})"
    )


def test_the_guard_misses_a_class(modules):
    del modules.DSATokenToKVPool.DSATokenToKVPool
    assert "DSATokenToKVPool(page_size)" in plugin._problem(modules.engine, SimpleNamespace())


@pytest.fixture
def install(monkeypatch, modules):
    """Has the plugin read a model with an SGLang whose registry passes over the methods `hooked`;
    returns the indexer's class.
    """
    monkeypatch.setenv("MISA_INDEXER", "dsa")
    monkeypatch.setattr(plugin, "_installed", False)

    def run(hooked: tuple[str, ...] = (), **fields):
        engine = modules.engine
        registered = {}

        def apply():
            for target, hook in registered.items():
                method = target.rsplit(".", 1)[1]
                if method not in hooked:
                    setattr(engine.Indexer, method, hook)

        registry = SimpleNamespace(
            register=lambda target, hook, _: registered.setdefault(target, hook),
            apply_hooks=apply,
        )
        hooks = SimpleNamespace(HookRegistry=registry, HookType=SimpleNamespace(AROUND="around"))
        monkeypatch.setitem(sys.modules, plugin._MODULE, engine)
        monkeypatch.setitem(sys.modules, "sglang.srt.plugins.hook_registry", hooks)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        sizes = {"index_topk": TOP_K, "index_n_heads": HEADS, "index_head_dim": DIM}
        model = SimpleNamespace(**sizes, **fields)
        plugin._install(None, SimpleNamespace(hf_text_config=model, context_len=4096))
        return engine.Indexer

    return run


def test_it_is_on_where_the_methods_are_hooked(install, caplog):
    with caplog.at_level("INFO"):
        indexer = install(index_kpool=None)
    for method in (indexer._get_topk_ragged, indexer._get_topk_paged):
        assert method.__module__ == plugin.__name__
    assert "MISA is on" in caplog.text


@pytest.mark.parametrize("method", ["_get_topk_ragged", "_get_topk_paged"])
def test_a_method_that_stays_unhooked_is_an_error(install, caplog, method):
    with (
        caplog.at_level("INFO"),
        pytest.raises(RuntimeError, match=f"expected SGLang to hook {method} of"),
    ):
        install(hooked=(method,))
    assert "MISA is on" not in caplog.text


def test_models_with_pooled_index_keys_are_left(install, caplog):
    with caplog.at_level("INFO"):
        indexer = install(index_kpool=4)
    assert indexer._get_topk_ragged.__qualname__.endswith("Indexer._get_topk_ragged")
    assert "MISA is off: pooled index keys" in caplog.text


def test_what_cannot_be_served_is_an_error_if_strict(install, monkeypatch):
    monkeypatch.setenv("MISA_STRICT", "1")
    with pytest.raises(RuntimeError, match="MISA_STRICT.*pooled index keys"):
        install(index_kpool=4)


@pytest.mark.parametrize("strict", [False, True])
def test_decode_on_sketches_is_left_at_start(install, monkeypatch, caplog, strict):
    for name, value in {
        "MISA_INDEXER": "misa-r",
        "MISA_CANDIDATES": "100",
        "MISA_SKETCH": "2",
        "MISA_DECODE": "1",
        "MISA_STRICT": str(int(strict)),
    }.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level("INFO"):
        if strict:
            with pytest.raises(RuntimeError, match="MISA_STRICT.*no sketches"):
                install()
            return
        install()
    assert "decode left to the engine's own operator: SGLang's pool has no sketches" in caplog.text
    assert "SGLang's indexer for decode" in caplog.text


@pytest.mark.parametrize("strict", [False, True])
def test_an_sglang_that_cannot_be_looked_at_is_left(install, modules, monkeypatch, caplog, strict):
    monkeypatch.setenv("MISA_STRICT", str(int(strict)))
    del modules.engine.Indexer._get_topk_paged
    if strict:
        with pytest.raises(RuntimeError, match="MISA_STRICT.*AttributeError"):
            install()
    else:
        install()
        assert "MISA is off: AttributeError" in caplog.text


def test_sglang_loads_the_plugin(monkeypatch, tmp_path):
    """SGLang finds the entry point, hooks its indexer once a model asks for it, and not before, and
    the hooked method selects.
    """
    world = sglang(monkeypatch)
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.plugins import load_plugins

    for name in ("MISA_INDEXER", "MISA_HEADS", "MISA_BLOCK", "MISA_DECODE"):
        monkeypatch.delenv(name, raising=False)
    names = {entry.name: entry.value for entry in entry_points(group="sglang.srt.plugins")}
    assert names["misa"] == "misa.integrations.sglang:register"

    def read_model(**fields):
        sizes = {
            "hidden_size": 256,
            "num_attention_heads": 4,
            "num_hidden_layers": 1,
            "vocab_size": 100,
            "intermediate_size": 128,
            "kv_lora_rank": 512,
            "q_lora_rank": 128,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "max_position_embeddings": 4096,
            "index_topk": TOP_K,
            "index_n_heads": HEADS,
            "index_head_dim": DIM,
        }
        names = {"architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32"}
        folder = tmp_path / f"model{len(fields)}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(names | sizes | fields))
        ModelConfig(str(folder))

    assert plugin._problem(world.engine, SimpleNamespace()) is None
    methods = vars(world.engine.Indexer)
    before = dict(methods)
    load_plugins()
    read_model()
    assert methods["_get_topk_ragged"] is before["_get_topk_ragged"]
    read_model(use_misa=True, misa_topk_heads=4, misa_k_block_size=128)
    for method in ("_get_topk_ragged", "_get_topk_paged"):
        assert methods[method].__wrapped__ is before[method]

    rows = new_rows(LENGTHS, NEW)
    q, w = padded_queries(len(rows))
    batch = SimpleNamespace(attn_cp_metadata=None)
    result = world.indexer._get_topk_ragged(
        False, batch, 0, q, w[:, :, None], world.metadata("RAGGED")
    )
    assert_selected(world, result, q, w, rows, SETTINGS, "RAGGED")
