# SPDX-License-Identifier: Apache-2.0
"""The vLLM plugin, first against stand-ins for vLLM, then in vLLM itself where it is installed.

Without a GPU vLLM's CUDA kernels are not there. They are replaced by loops that do what they say,
behind vLLM's own Python signatures; everything else of vLLM is real.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import sys
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

torch = pytest.importorskip("torch")

from paged import DIM, HEADS, Sequences, gather, new_rows, queries  # noqa: E402

from misa.integrations import _vllm_operator as operators  # noqa: E402
from misa.integrations import vllm as plugin  # noqa: E402
from misa.integrations._environment import Settings  # noqa: E402
from misa.integrations._selector import Bounds, Selector, _powers  # noqa: E402
from misa.integrations._vllm_loads import Loads  # noqa: E402
from misa.integrations._vllm_memory import left, reserve  # noqa: E402

TOP_K = 64
COLUMNS = TOP_K + 16  # of the buffer, which may be wider than top_k
POISON = -77
LAYER = "model.layers.0.self_attn.indexer.k_cache"
SETTINGS = Settings("misa", (("heads", 4), ("block", 128)))
CONFIG = SETTINGS.config(TOP_K)
DSA = Settings("dsa").config(TOP_K)
MOST_KEYS, MOST_ROWS = 4096, 1024

# Decoding sequences, then prefilling ones: 3 has a cached prefix, 4 is new.
DECODING, PREFILLING, NEW = [517, 64, 230], [400, 130], [40, 130]


@dataclass
class Chunk:
    block_table: torch.Tensor
    cu_seqlen_ks: torch.Tensor
    cu_seqlen_ke: torch.Tensor
    cu_seq_lens: torch.Tensor
    total_seq_lens: int
    token_start: int
    token_end: int
    skip_kv_gather: bool = False


@dataclass
class Prefill:
    chunks: list[Chunk]
    row_shard_sizes: list[int] | None = None


@dataclass
class Decode:
    block_table: torch.Tensor
    seq_lens: torch.Tensor
    decode_lens: torch.Tensor
    requires_padding: bool = False


@dataclass
class Metadata:
    num_decodes: int = 0
    num_decode_tokens: int = 0
    num_prefills: int = 0
    num_prefill_tokens: int = 0
    prefill: Prefill | None = None
    decode: Decode | None = None
    slot_mapping: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


def selector(
    decode: bool = True,
    rows: int = MOST_ROWS,
    keys: int = MOST_KEYS,
    config: Any = CONFIG,
) -> Selector:
    return Selector(
        config,
        heads=HEADS,
        dim=DIM,
        prefill=Bounds(rows, keys, total=keys),
        decode=Bounds(rows, keys, sequences=rows) if decode else None,
        device=torch.device("cpu"),
    )


def bounds(lengths: list[int], new: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """cu_seq_lens, ks and ke of queries for the last `new` tokens of sequences put in a row."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    ks = torch.repeat_interleave(cu[:-1], torch.tensor(new)).int()
    seen = torch.tensor([count for _, count in new_rows(lengths, new)]).int()
    return cu, ks, ks + seen


def chunks_of(table: torch.Tensor, first_row: int, apart: bool = False) -> list[Chunk]:
    """The prefilling sequences in two chunks, of which the second reuses the first one's keys; or,
    `apart`, a chunk a sequence.
    """
    cu, ks, ke = bounds(PREFILLING, NEW)
    if apart:
        ends = [0, *torch.tensor(NEW).cumsum(0).tolist()]
        chunks = []
        for i, (a, b) in enumerate(itertools.pairwise(ends)):
            own = torch.tensor([0, PREFILLING[i]]).int()
            rows = ks[a:b] - cu[i], ke[a:b] - cu[i]
            places = first_row + a, first_row + b
            chunks.append(Chunk(table[i : i + 1], *rows, own, PREFILLING[i], *places))
        return chunks
    cuts = [(0, 100, False), (100, sum(NEW), True)]
    return [
        Chunk(table, ks[a:b], ke[a:b], cu, sum(PREFILLING), first_row + a, first_row + b, skip)
        for a, b, skip in cuts
    ]


class Engine:
    """What the plugin uses of vLLM's module, and an operator that records what it was left."""

    def __init__(self) -> None:
        self.context = SimpleNamespace(attn_metadata=None)
        self.left: list[tuple[int, int]] = []
        self.gathers = 0
        self.ops = SimpleNamespace(
            cp_gather_indexer_k_quant_cache=self._gather, indexer_k_quant_and_cache=self._insert
        )

    def get_forward_context(self) -> SimpleNamespace:
        return self.context

    def current_workspace_manager(self) -> SimpleNamespace:
        def get_simultaneous(*specs):
            return [torch.full(shape, 127, dtype=torch.uint8).view(dtype) for shape, dtype in specs]

        return SimpleNamespace(get_simultaneous=get_simultaneous)

    def _gather(self, *arguments) -> None:
        self.gathers += 1
        gather(*arguments)

    def _insert(self, k, kv_cache, slot_mapping, quant_block_size, scale_fmt) -> None:
        assert quant_block_size == DIM
        plugin.misa.append(kv_cache, k, slot_mapping, scale_format=scale_fmt)

    def operator(
        self,
        hidden_states,
        k_cache_prefix,
        kv_cache,
        q_quant,
        k,
        weights,
        quant_block_size,
        scale_fmt,
        topk_tokens,
        head_dim,
        total_seq_lens,
        topk_indices_buffer,
        skip_k_cache_insert=True,
        use_fp4_cache=False,
        dcp_world_size=1,
        candidate_blocks=None,
        something_new=None,
    ):
        metadata = self.context.attn_metadata
        if isinstance(metadata, dict):
            seen = metadata[getattr(k_cache_prefix, "value", k_cache_prefix)]
            self.left.append((seen.num_decodes, seen.num_prefills))
            topk_indices_buffer[: hidden_states.shape[0]] = -1
        return topk_indices_buffer

    def run(
        self,
        chosen: Selector,
        sequences: Sequences,
        q,
        w,
        padding=0,
        strict=False,
        fixed=False,
        **arguments,
    ) -> torch.Tensor:
        """Calls the replacement; returns the poisoned buffer with two rows more than queries and
        rows of padding."""
        rows = q.shape[0] + padding
        buffer = torch.full((rows + 2, arguments.pop("columns", COLUMNS)), POISON).int()
        operator = plugin.replace(self.operator, self, chosen, strict=strict, fixed=fixed)
        arguments = {"k_cache_prefix": LAYER, "kv_cache": sequences.cache, "k": None} | arguments
        result = operator(
            torch.empty(rows, 8),
            q_quant=q,
            weights=w,
            quant_block_size=DIM,
            scale_fmt="ue8m0",
            topk_tokens=TOP_K,
            head_dim=DIM,
            total_seq_lens=MOST_KEYS,
            topk_indices_buffer=buffer,
            **arguments,
        )
        assert result is buffer
        return buffer


@pytest.fixture
def engine(monkeypatch):
    monkeypatch.setattr(plugin, "_counters", plugin.Counters(plugin._logger))
    return Engine()


@pytest.fixture(scope="module")
def sequences():
    return Sequences(DECODING + PREFILLING)


def mixed(
    sequences: Sequences, next_n: int = 1, flat: bool = False, apart: bool = False
) -> Metadata:
    """A batch of every sequence: each decoding one has next_n queries, flattened or not."""
    lens = torch.tensor(DECODING)[:, None] - next_n + 1 + torch.arange(next_n)
    table = sequences.table[: len(DECODING)]
    if flat:
        lens, table = lens.reshape(-1, 1), table.repeat_interleave(next_n, 0)
    rows = len(DECODING) * next_n
    return Metadata(
        num_decodes=len(DECODING),
        num_decode_tokens=rows,
        num_prefills=len(PREFILLING),
        num_prefill_tokens=sum(NEW),
        prefill=Prefill(chunks_of(sequences.table[len(DECODING) :], rows, apart)),
        decode=Decode(table, lens.int(), torch.ones(len(lens), dtype=torch.int32)),
    )


def rows_of(next_n: int) -> list[tuple[int, int]]:
    decode = new_rows(DECODING, [next_n] * len(DECODING))
    return decode + new_rows(PREFILLING, NEW, first=len(DECODING))


def assert_rows(buffer: torch.Tensor, expected: torch.Tensor) -> None:
    """`expected` [rows, top_k], sorted, is what the buffer starts with; -1 beside, poison below."""
    rows = expected.shape[0]
    assert torch.equal(buffer[:rows, :TOP_K].sort(1).values, expected)
    assert (buffer[:rows, TOP_K:] == -1).all()
    assert (buffer[rows:] == POISON).all()


@pytest.mark.parametrize("apart", [False, True])
def test_prefill_is_selected_and_decode_left(engine, sequences, apart):
    metadata = mixed(sequences, apart=apart)
    engine.context.attn_metadata = {LAYER: metadata}
    rows = rows_of(1)
    q, w = queries(len(rows))
    buffer = engine.run(selector(decode=False), sequences, q, w)
    expected = sequences.expected(q, w, rows, CONFIG)
    expected[: len(DECODING)] = -1
    assert_rows(buffer, expected)
    assert engine.left == [(len(DECODING), 0)]
    assert engine.gathers == (2 if apart else 1)
    assert engine.context.attn_metadata == {LAYER: metadata}
    assert plugin.counters() == {"misa_prefill": sum(NEW), "engine_decode": len(DECODING)}


@pytest.mark.parametrize("columns", [TOP_K, COLUMNS])
@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(("next_n", "flat"), [(1, False), (3, False), (3, True)])
def test_decode_is_selected(engine, sequences, next_n, flat, padding, columns):
    engine.context.attn_metadata = {LAYER: mixed(sequences, next_n, flat)}
    rows = rows_of(next_n)
    q, w = queries(len(rows))
    buffer = engine.run(selector(), sequences, q, w, padding, columns=columns)
    assert (buffer[len(rows) : len(rows) + padding] == -1).all()
    kept = torch.cat([buffer[: len(rows)], buffer[len(rows) + padding :]])
    assert_rows(kept, sequences.expected(q, w, rows, CONFIG))
    assert engine.left == []
    assert plugin.counters() == {"misa_prefill": sum(NEW), "misa_decode": len(DECODING) * next_n}


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("next_n", "flat"), [(1, False), (2, False), (4, True)])
def test_queries_of_a_captured_sequence_share_a_read(engine, monkeypatch, next_n, flat, fixed):
    """Rows of padding, which see less than nothing, are empty."""
    monkeypatch.setattr(operators, "is_capturing", lambda tensor: True)
    plugin._counters.prepare("cpu")
    sequences, chosen = Sequences(DECODING), selector(config=DSA)
    metadata = mixed(sequences, next_n, flat)
    metadata.num_prefills = metadata.num_prefill_tokens = 0
    metadata.decode.seq_lens.view(len(DECODING), next_n)[1] = -torch.arange(next_n).int()
    engine.context.attn_metadata = {LAYER: metadata}
    rows = new_rows(DECODING, [next_n] * len(DECODING))
    rows = [(sequence, 0 if sequence == 1 else seen) for sequence, seen in rows]
    q, w = queries(len(rows))
    with mock.patch.object(chosen, "paged", wraps=chosen.paged) as paged:
        buffer = engine.run(chosen, sequences, q, w, fixed=fixed)
    assert_rows(buffer, sequences.expected(q, w, rows, DSA))
    sequences_of_call = paged.call_args.args[3].shape[0]
    assert sequences_of_call == len(DECODING) * (next_n if flat and not fixed else 1)
    assert plugin.counters() == {"misa_decode": len(rows)}


def test_padding_rows_stay_empty(engine, sequences):
    metadata = mixed(sequences)
    metadata.decode.seq_lens[1] = 0
    engine.context.attn_metadata = {LAYER: metadata}
    rows = rows_of(1)
    rows[1] = (1, 0)
    q, w = queries(len(rows))
    buffer = engine.run(selector(), sequences, q, w)
    assert (buffer[1] == -1).all()
    assert_rows(buffer, sequences.expected(q, w, rows, CONFIG))


def test_sequences_with_unequal_numbers_of_queries(engine, sequences):
    """vLLM gives their lengths as [sequences, most], of which the last one is the sequence's."""
    counts = [2, 1, 2]
    lens = torch.tensor(DECODING)[:, None] - 1 + torch.arange(2)
    decode = Decode(sequences.table[:3], lens.int(), torch.tensor(counts).int(), True)
    engine.context.attn_metadata = {LAYER: Metadata(3, sum(counts), decode=decode)}
    rows = new_rows(DECODING, counts)
    q, w = queries(len(rows))
    buffer = engine.run(selector(), sequences, q, w)
    assert_rows(buffer, sequences.expected(q, w, rows, CONFIG))


def test_keys_of_the_step_are_inserted_first(engine):
    sequences = Sequences(DECODING)
    rows = new_rows(DECODING, [1] * len(DECODING))
    keys = torch.randn((len(rows) + 1, DIM), generator=torch.Generator().manual_seed(5))
    slots = torch.tensor([sequences.slot(sequence, seen - 1) for sequence, seen in rows])
    decode = Decode(sequences.table, torch.tensor(DECODING).int()[:, None], torch.ones(3).int())
    engine.context.attn_metadata = {LAYER: Metadata(3, 3, decode=decode, slot_mapping=slots)}
    q, w = queries(len(rows))
    before = sequences.cache.clone()
    buffer = engine.run(selector(), sequences, q, w, k=keys, skip_k_cache_insert=False)
    assert not torch.equal(before, sequences.cache)
    assert_rows(buffer, sequences.expected(q, w, rows, CONFIG))


SKETCHED = Settings("misa-r", (("heads", 2), ("candidates", 100), ("sketch", 2))).config(TOP_K)


def decoded(sequences: Sequences, slots: torch.Tensor) -> Metadata:
    decode = Decode(sequences.table, torch.tensor(DECODING).int()[:, None], torch.ones(3).int())
    return Metadata(3, 3, decode=decode, slot_mapping=slots)


FILTERED = Settings("hisa", (("filter_block", 64), ("filter_blocks", 3))).config(TOP_K)


def same(found, expected):
    """Pages that hold nothing yet may give NaN."""
    pairs = list(zip(found, expected, strict=True))
    assert any(a is not None for a, _ in pairs)
    return all(a is b is None or torch.equal(a.nan_to_num(7), b.nan_to_num(7)) for a, b in pairs)


@pytest.mark.parametrize("config", [CONFIG, FILTERED, SKETCHED])
def test_what_is_derived_is_that_of_the_keys_in_the_cache(engine, config):
    """What is there at first, then the tokens of every step, inserted by the engine or left to it;
    bytes of other slots do not count yet, and another cache begins anew."""
    sequences, chosen = Sequences(DECODING), selector(config=config)
    operator = plugin.replace(engine.operator, engine, chosen)
    rows = new_rows(DECODING, [1] * len(DECODING))
    q, w = queries(len(rows))
    slots = torch.tensor([sequences.slot(sequence, seen - 1) for sequence, seen in rows])
    expected = chosen.derived(sequences.cache)
    assert (expected.sketches is not None) == bool(config.sketch)
    assert (expected.page_sums is not None) == (not config.sketch)

    with mock.patch.object(plugin, "replace", lambda *_a, **_k: operator):
        engine.context.attn_metadata = {LAYER: decoded(sequences, torch.tensor([-1]))}
        engine.run(chosen, sequences, q, w)
        for some in (slots[:2], slots[2:], torch.tensor([-1])):
            # Also those of keys that no step says it has written.
            sequences.cache.flatten(1)[:, : 64 * DIM : 3] ^= 128
            engine.context.attn_metadata = {LAYER: decoded(sequences, some)}
            engine.run(chosen, sequences, q, w)
            plugin.misa.append(sequences.cache, None, some, **expected._asdict())
            (layer,) = operator_of(operator)._layers.values()
            assert same(layer.derived, expected)
        other = Sequences(DECODING, seed=5)
        engine.context.attn_metadata = {LAYER: decoded(other, torch.tensor([-1]))}
        engine.run(chosen, other, q, w)
        (layer,) = operator_of(operator)._layers.values()
        expected = chosen.derived(other.cache)
        assert same(layer.derived, expected)


@pytest.mark.parametrize("config", [CONFIG, FILTERED, SKETCHED])
def test_decode_reads_what_was_derived(engine, config):
    """Of a cache that is filled step by step, through the plugin, in steps of several tokens."""
    whole = Sequences([200])
    sequences = Sequences([200])
    sequences.cache.fill_(255)
    chosen = selector(config=config)
    operator = plugin.replace(engine.operator, engine, chosen)
    with mock.patch.object(plugin, "replace", lambda *_a, **_k: operator):
        for first, last in ((0, 70), (70, 128), (128, 199), (199, 200)):
            slots = torch.tensor([whole.slot(0, p) for p in range(first, last)])
            for slot in slots.tolist():  # what the engine's kernel writes
                page, place = divmod(slot, 64)
                for start, size in ((place * DIM, DIM), (64 * DIM + 4 * place, 4)):
                    to, of = (s.cache[page].flatten() for s in (sequences, whole))
                    to[start : start + size] = of[start : start + size]
                    sequences.cache[page] = to.view_as(sequences.cache[page])
            decode = Decode(whole.table, torch.tensor([[last]]).int(), torch.ones(1).int())
            metadata = Metadata(1, 1, decode=decode, slot_mapping=slots)
            engine.context.attn_metadata = {LAYER: metadata}
            q, w = queries(1, seed=last)
            buffer = engine.run(chosen, sequences, q, w)
            assert_rows(buffer, whole.expected(q, w, [(0, last)], config))
    assert engine.left == []


def operator_of(replacement):
    """The object behind what plugin.replace returns."""
    cells = dict(zip(replacement.__code__.co_freevars, replacement.__closure__, strict=True))
    return cells["operator"].cell_contents


def test_what_cannot_be_derived_leaves_decode_to_the_engine(engine, monkeypatch):
    sequences, chosen = Sequences(DECODING), selector(config=SKETCHED)

    def fails(*_arguments, **_more):
        raise RuntimeError("no memory")

    monkeypatch.setattr(plugin.misa, "append", fails)
    engine.context.attn_metadata = {LAYER: decoded(sequences, torch.tensor([-1]))}
    q, w = queries(3)
    engine.run(chosen, sequences, q, w)
    assert engine.left == [(3, 0)]
    assert plugin.counters() == {"engine_decode": 3}


@pytest.mark.parametrize("strict", [False, True])
def test_a_layer_whose_first_step_is_captured_is_left(engine, monkeypatch, strict):
    """It has no sums of the keys that come before its memory."""
    sequences, chosen = Sequences(DECODING), selector()
    plugin._counters.prepare("cpu")
    operator = plugin.replace(engine.operator, engine, chosen, strict=strict)
    q, w = queries(3)
    with mock.patch.object(plugin, "replace", lambda *_a, **_k: operator):
        engine.context.attn_metadata = {LAYER: decoded(sequences, torch.tensor([-1]))}
        monkeypatch.setattr(operators, "is_capturing", lambda tensor: True)
        if strict:
            with pytest.raises(RuntimeError, match="MISA_STRICT.*first step is captured"):
                engine.run(chosen, sequences, q, w)
            return
        engine.run(chosen, sequences, q, w)
        monkeypatch.setattr(operators, "is_capturing", lambda tensor: False)
        engine.run(chosen, sequences, q, w)
    assert engine.left == 2 * [(3, 0)]
    assert plugin.counters() == {"engine_decode": 6}


@dataclass
class Captured:
    """A layer whose decode was captured into a CUDA graph, which replays without the plugin."""

    engine: Engine
    chosen: Selector
    sequences: Sequences
    operator: Any
    loads: Loads

    def step(self, slots: torch.Tensor, metadata: Metadata | None = None) -> torch.Tensor:
        """A step of decode outside of graphs, which writes keys into `slots`."""
        metadata = metadata or decoded(self.sequences, slots)
        metadata.slot_mapping = slots
        self.engine.context.attn_metadata = {LAYER: metadata}
        q, w = queries(sum(operators.rows_of(metadata).values()))
        with mock.patch.object(plugin, "replace", lambda *_a, **_k: self.operator):
            return self.engine.run(self.chosen, self.sequences, q, w)

    @property
    def derived(self):
        return operator_of(self.operator)._layers[LAYER].derived


@pytest.fixture(params=[CONFIG, FILTERED, SKETCHED], ids=["sums", "filter", "sketch"])
def captured(request, engine, loading, monkeypatch):
    plugin._counters.prepare("cpu")
    sequences = Sequences(DECODING + PREFILLING)
    chosen, loads = selector(config=request.param), Loads(1)
    loads.install()
    operator = plugin.replace(engine.operator, engine, chosen, loads=loads)
    made = Captured(engine, chosen, sequences, operator, loads)
    for capturing in (False, True):
        monkeypatch.setattr(operators, "is_capturing", lambda tensor, now=capturing: now)
        made.step(torch.tensor([-1]))
    monkeypatch.setattr(operators, "is_capturing", lambda tensor: False)
    assert engine.left == []
    return made


def unreadable(sequences: Sequences) -> Metadata:
    metadata = mixed(sequences)
    del metadata.decode.seq_lens
    return metadata


@pytest.mark.parametrize("failing", ["paged", "ragged", "insertion", "metadata"])
def test_graphs_decode_from_the_keys_of_all_steps(captured, monkeypatch, failing):
    """Whatever fails later: a replay runs no Python code that could leave decode to the engine."""

    def fails(*_arguments, **_more):
        raise RuntimeError("not today")

    arrays, metadata = captured.derived, mixed(captured.sequences)
    if failing == "metadata":
        metadata = unreadable(captured.sequences)
    elif failing == "insertion":
        monkeypatch.setattr(operators.Operator, "_insert_and_clear", fails)
    else:
        setattr(captured.chosen, failing, fails)
    sequences = captured.sequences
    expected = captured.chosen.derived(sequences.cache)
    last = [sequences.slot(i, n - 1) for i, n in enumerate(sequences.lengths)]
    for slots in (torch.tensor(last[:2]), torch.tensor(last[2:])):
        for slot in slots.tolist():  # the engine's kernel has written other keys
            page, place = divmod(slot, 64)
            sequences.cache[page].flatten()[place * DIM : (place + 1) * DIM] ^= 128
        plugin.misa.append(sequences.cache, None, slots, **expected._asdict())
        captured.step(slots, metadata)
    assert captured.engine.left
    assert captured.derived is arrays
    assert same(arrays, expected)
    rows = {"decode": len(DECODING), "prefill": sum(NEW)}
    counts = plugin.counters()
    for work in rows if failing in ("metadata", "insertion") else ():
        assert counts[f"engine_{work}"] == 2 * rows[work]


@pytest.mark.parametrize("failing", ["a step", "pages", "scheduled"])
def test_the_engine_stops_where_graphs_would_decode_from_old_keys(
    captured, loading, monkeypatch, failing
):
    def fails(*_arguments, **_more):
        raise RuntimeError("not today")

    arrays, step = captured.derived, SchedulerOutput([NewRequestData(([1],), 100)], NONE_CACHED)
    if failing == "scheduled":
        del step.scheduled_cached_reqs
    names = {"a step": "append", "pages": "rebuild"}
    if failing in names:
        monkeypatch.setattr(plugin.misa, names[failing], fails)
    with pytest.raises(operators.StaleError, match="captured CUDA graphs decode by"):
        if failing == "a step":
            captured.step(torch.tensor([-1]))
        else:
            loading.Worker().execute_model(step)
    assert captured.derived is arrays  # graphs hold their memory


def test_what_cannot_be_derived_is_not_captured(engine, monkeypatch):
    sequences, chosen = Sequences(DECODING), selector(config=SKETCHED)
    plugin._counters.prepare("cpu")
    operator = plugin.replace(engine.operator, engine, chosen)
    q, w = queries(3)
    with (
        mock.patch.object(plugin, "replace", lambda *_a, **_k: operator),
        mock.patch.object(chosen, "derive", side_effect=RuntimeError("no memory")),
    ):
        for capturing in (False, True):
            monkeypatch.setattr(operators, "is_capturing", lambda tensor, now=capturing: now)
            engine.context.attn_metadata = {LAYER: decoded(sequences, torch.tensor([-1]))}
            engine.run(chosen, sequences, q, w)
    assert engine.left[-2:] == 2 * [(3, 0)]
    assert plugin.counters() == {"engine_decode": 6}


def test_a_first_step_without_memory_leaves_decode(engine, sequences):
    """And prefill is selected all the same."""
    chosen = selector(config=SKETCHED)
    engine.context.attn_metadata = {LAYER: mixed(sequences)}
    q, w = queries(len(rows_of(1)))
    with mock.patch.object(chosen, "derived", side_effect=MemoryError):
        engine.run(chosen, sequences, q, w)
    assert engine.left == [(len(DECODING), 0)]
    assert plugin.counters() == {"misa_prefill": sum(NEW), "engine_decode": len(DECODING)}


def test_a_step_that_cannot_be_read_is_left(engine, sequences, caplog):
    """Metadata that differs from what the guard saw."""
    metadata = mixed(sequences)
    del metadata.decode.seq_lens
    engine.context.attn_metadata = {LAYER: metadata}
    q, w = queries(len(rows_of(1)))
    engine.run(selector(), sequences, q, w)
    assert engine.left == [(len(DECODING), len(PREFILLING))]
    assert "everything left to the engine's own operator: AttributeError" in caplog.text
    assert plugin.counters() == {"engine_prefill": sum(NEW), "engine_decode": len(DECODING)}


def test_keys_that_cannot_be_inserted_are_left(engine, sequences, caplog):
    engine.context.attn_metadata = {LAYER: mixed(sequences)}
    q, w = queries(len(rows_of(1)))
    engine.run(selector(), sequences, q, w, k=None, skip_k_cache_insert=False)
    assert engine.left == [(len(DECODING), len(PREFILLING))]
    assert "everything left to the engine's own operator: AssertionError" in caplog.text
    assert plugin.counters() == {"engine_prefill": sum(NEW), "engine_decode": len(DECODING)}


def test_a_layer_that_shares_a_selection_finds_it_in_the_buffer(engine, sequences):
    """The engine makes no call for it, and between two calls nothing is written: neither by what a
    KV connector brings nor by calls for other buffers."""
    chosen = selector()
    operator = plugin.replace(engine.operator, engine, chosen)
    engine.context.attn_metadata = {LAYER: mixed(sequences)}
    q, w = queries(len(rows_of(1)))
    with mock.patch.object(plugin, "replace", lambda *_a, **_k: operator):
        buffer = engine.run(chosen, sequences, q, w)
        expected = buffer.clone()
        operator_of(operator).rebuild([0, 1])
        engine.run(chosen, sequences, *queries(len(rows_of(1)), seed=9))
    assert torch.equal(buffer, expected)


def test_reused_pages_are_read_anew(engine):
    """A page whose bytes changed since the last call counts as it is now."""
    q, w = queries(sum(NEW))
    chosen = selector()
    for seed in (1, 9):
        sequences = Sequences(PREFILLING, seed=seed)
        metadata = Metadata(num_prefills=2, num_prefill_tokens=sum(NEW))
        metadata.prefill = Prefill(chunks_of(sequences.table, 0))
        engine.context.attn_metadata = {LAYER: metadata}
        buffer = engine.run(chosen, sequences, q, w)
        rows = new_rows(PREFILLING, NEW)
        assert_rows(buffer, sequences.expected(q, w, rows, CONFIG))


@pytest.mark.parametrize("apart", [False, True])
def test_ranks_share_the_rows(engine, sequences, apart):
    """Each rank of a tensor-parallel group selects for its rows and the group exchanges them."""
    metadata = mixed(sequences, apart=apart)
    metadata.prefill.row_shard_sizes = [90, sum(NEW) - 90]
    engine.context.attn_metadata = {LAYER: metadata}
    exchanged = []

    class PrefillRowShard:
        @classmethod
        def from_metadata(cls, prefill, num_decode_tokens):
            assert prefill.row_shard_sizes and num_decode_tokens == len(DECODING)
            return cls()

        def narrow(self, chunk):
            start, end = max(chunk.token_start, len(DECODING) + 90), chunk.token_end
            low, high = start - chunk.token_start, end - chunk.token_start
            if start >= end:
                return None
            return start, end, chunk.cu_seqlen_ks[low:high], chunk.cu_seqlen_ke[low:high]

        def exchange_topk(self, buffer, width):
            exchanged.append(width)

    engine.PrefillRowShard = PrefillRowShard
    rows = rows_of(1)
    q, w = queries(len(rows))
    buffer = engine.run(selector(decode=False), sequences, q, w)
    expected = sequences.expected(q, w, rows, CONFIG)
    expected[: len(DECODING) + 90] = -1
    assert_rows(buffer, expected)
    assert exchanged == [TOP_K]


def test_chunks_of_more_keys_than_planned_are_selected_one_by_one(engine, sequences):
    engine.context.attn_metadata = {LAYER: mixed(sequences, apart=True)}
    rows = rows_of(1)
    q, w = queries(len(rows))
    buffer = engine.run(selector(keys=max(DECODING + PREFILLING)), sequences, q, w)
    assert_rows(buffer, sequences.expected(q, w, rows, CONFIG))
    assert plugin.counters() == {"misa_prefill": sum(NEW), "misa_decode": len(DECODING)}


UNCOVERED = [
    ({"use_fp4_cache": True}, "use_fp4_cache is set"),
    ({"dcp_world_size": 2}, "dcp_world_size is set"),
    ({"candidate_blocks": torch.zeros(3, 4)}, "candidate_blocks is set"),
    ({"kv_cache": torch.zeros(4, 32, 132, dtype=torch.uint8)}, "a key cache of shape"),
]


@pytest.mark.parametrize(("arguments", "reason"), UNCOVERED)
def test_what_is_not_covered_is_left_with_a_warning(engine, sequences, caplog, arguments, reason):
    engine.context.attn_metadata = {LAYER: mixed(sequences)}
    q, w = queries(len(rows_of(1)))
    for _ in range(2):
        engine.run(selector(), sequences, q, w, **arguments)
    assert engine.left == 2 * [(len(DECODING), len(PREFILLING))]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 2 and all(reason in warning for warning in warnings)
    assert plugin.counters() == {
        "engine_prefill": 2 * sum(NEW),
        "engine_decode": 2 * len(DECODING),
    }


@pytest.mark.parametrize(("arguments", "reason"), UNCOVERED)
def test_what_is_not_covered_is_an_error_if_strict(engine, sequences, arguments, reason):
    engine.context.attn_metadata = {LAYER: mixed(sequences)}
    q, w = queries(len(rows_of(1)))
    with pytest.raises(RuntimeError, match=f"MISA_STRICT.*{reason}"):
        engine.run(selector(), sequences, q, w, strict=True, **arguments)


@pytest.mark.parametrize("work", ["prefill", "decode"])
@pytest.mark.parametrize("error", [ValueError, MemoryError, RuntimeError])
def test_an_error_leaves_the_work_to_the_engine(engine, sequences, caplog, work, error):
    """The step that fails, and all that follow, without asking again."""
    chosen, calls = selector(), []

    def fails(*_arguments, **_more):
        calls.append(work)
        raise error("not today")

    setattr(chosen, "paged" if work == "decode" else "ragged", fails)
    q, w = queries(len(rows_of(1)))
    operator = plugin.replace(engine.operator, engine, chosen)
    with mock.patch.object(plugin, "replace", lambda *_a, **_k: operator):
        for _ in range(2):
            engine.context.attn_metadata = {LAYER: mixed(sequences)}
            buffer = engine.run(chosen, sequences, q, w)
    decode = work == "decode"
    assert engine.left == 2 * [(3, 0) if decode else (0, 2)]
    assert calls == [work]
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    expected = f"MISA: {work} left to the engine's own operator: {error.__name__}: not today"
    assert warnings == [expected]
    rows = {"decode": len(DECODING), "prefill": sum(NEW)}
    assert plugin.counters() == {
        f"{'engine' if name == work else 'misa'}_{name}": 2 * count for name, count in rows.items()
    }
    first = 0 if decode else len(DECODING)
    assert (buffer[first : first + rows[work]] == -1).all()


@pytest.mark.parametrize("work", ["prefill", "decode", "everything"])
def test_an_error_is_one_if_strict(engine, sequences, work):
    chosen, metadata = selector(), mixed(sequences)
    if work == "everything":
        metadata = unreadable(sequences)
    else:
        name = "paged" if work == "decode" else "ragged"
        setattr(chosen, name, mock.Mock(side_effect=ValueError("not today")))
    engine.context.attn_metadata = {LAYER: metadata}
    q, w = queries(len(rows_of(1)))
    with pytest.raises(RuntimeError, match=f"MISA_STRICT: .* {work}"):
        engine.run(chosen, sequences, q, w, strict=True)


@pytest.mark.parametrize("spoil", ["captured", "rows"])
def test_a_step_that_is_left_is_an_error_if_strict(engine, sequences, monkeypatch, spoil):
    chosen = selector(decode=False, rows=2 if spoil == "rows" else MOST_ROWS)
    if spoil == "captured":
        monkeypatch.setattr(operators, "is_capturing", lambda tensor: True)
    engine.context.attn_metadata = {LAYER: mixed(sequences)}
    q, w = queries(len(rows_of(1)))
    with pytest.raises(RuntimeError, match="MISA_STRICT: expected MISA to select for prefill"):
        engine.run(chosen, sequences, q, w, strict=True)


def test_dense_attention_is_no_error(engine, sequences):
    dense = "model.layers.0.self_attn.attn"
    attention = SimpleNamespace(prefill=SimpleNamespace(use_dense_mha=True))
    engine.context.attn_metadata = {LAYER: mixed(sequences), dense: attention}
    inner = engine.operator

    def operator(*args, dense_mha_metadata_layer_name="", **kwargs):
        return inner(*args, **kwargs)

    operator.__signature__ = inspect.signature(inner).replace(
        parameters=[
            *inspect.signature(inner).parameters.values(),
            inspect.Parameter("dense_mha_metadata_layer_name", inspect.Parameter.KEYWORD_ONLY),
        ]
    )
    engine.operator = operator
    q, w = queries(len(rows_of(1)))
    engine.run(selector(), sequences, q, w, strict=True, dense_mha_metadata_layer_name=dense)
    assert engine.left == [(len(DECODING), len(PREFILLING))]


@pytest.mark.parametrize(("rows", "keys"), [(2, MOST_KEYS), (MOST_ROWS, 100)])
def test_a_step_beyond_the_plans_is_left(engine, sequences, rows, keys):
    engine.context.attn_metadata = {LAYER: mixed(sequences)}
    q, w = queries(len(rows_of(1)))
    chosen = selector()
    chosen.prefill = Bounds(rows, keys, total=keys)
    chosen.decode = Bounds(2, MOST_KEYS, sequences=2)
    engine.run(chosen, sequences, q, w)
    assert engine.left == [(len(DECODING), len(PREFILLING))]
    assert plugin.counters() == {"engine_prefill": sum(NEW), "engine_decode": len(DECODING)}


@pytest.mark.parametrize(
    ("first", "end", "expected"),
    [(1, 1, []), (1, 2, [1]), (1, 8, [1, 2, 4]), (1, 9, [1, 2, 4, 8]), (64, 300, [64, 128, 256]),
     (64, 64, []), (64, 65, [64]), (64, 8, [])],
)  # fmt: skip
def test_the_sizes_that_have_plans(first, end, expected):
    assert _powers(first, end) == expected


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 64, 65, 170])
def test_every_number_of_rows_has_a_plan(rows):
    """And is selected as in any other batch, also on more keys than most calls have."""
    sequences = Sequences([400])
    q, w = queries(rows)
    expected = sequences.expected(q, w, [(0, 400)] * rows, CONFIG)
    k, scale = sequences.keys(0)
    chosen = selector()
    for near in (MOST_KEYS, 100):
        chosen._near = near
        out = torch.full((rows, TOP_K), POISON).int()
        ks, ke = torch.zeros(rows).int(), torch.full((rows,), 400).int()
        chosen.ragged(q, w, k, ks, ke, scale, out)
        assert torch.equal(out.sort(1).values, expected)
    out = torch.full((rows, TOP_K), POISON).int()
    table, lengths = sequences.table.expand(rows, -1), torch.full((rows,), 400).int()
    derived = chosen.derived(sequences.cache)
    chosen.paged(q, w, sequences.cache, table.contiguous(), lengths, out, derived=derived)
    assert torch.equal(out.sort(1).values, expected)


def test_rows_are_counted_in_one_layer(engine, sequences):
    other = LAYER.replace("layers.0", "layers.1")
    metadata = mixed(sequences)
    engine.context.attn_metadata = {LAYER: metadata, other: metadata}
    q, w = queries(len(rows_of(1)))
    operator = plugin.replace(engine.operator, engine, selector())
    with mock.patch.object(plugin, "replace", lambda *_a, **_k: operator):
        for name in (LAYER, other, LAYER):
            engine.run(selector(), sequences, q, w, k_cache_prefix=name)
    assert plugin.counters() == {"misa_prefill": 2 * sum(NEW), "misa_decode": 2 * len(DECODING)}


def test_a_profiling_run_is_left(engine, sequences):
    q, w = queries(4)
    assert (engine.run(selector(), sequences, q, w) == POISON).all()
    assert plugin.counters() == {}


def test_new_arguments_and_wrapped_names_are_accepted(engine, sequences):
    engine.context.attn_metadata = {LAYER: mixed(sequences)}
    q, w = queries(len(rows_of(1)))
    name = SimpleNamespace(value=LAYER)
    engine.run(selector(False), sequences, q, w, k_cache_prefix=name, something_new=3)
    assert engine.left == [(len(DECODING), 0)]


@pytest.fixture
def modules(engine, monkeypatch):
    """vLLM's modules as far as the guard looks at them."""
    metadata = SimpleNamespace(
        get_max_prefill_buffer_size=lambda config: MOST_KEYS,
        **{
            name: dataclasses.make_dataclass(name, fields)
            for name, fields in plugin.METADATA.items()
        },
    )
    monkeypatch.setitem(sys.modules, plugin._METADATA_MODULE, metadata)
    engine.sparse_attn_indexer = engine.operator
    sizes = SimpleNamespace(index_topk=TOP_K, index_n_heads=HEADS, index_head_dim=DIM)
    return SimpleNamespace(
        metadata=metadata,
        engine=engine,
        config=SimpleNamespace(
            model_config=SimpleNamespace(hf_text_config=sizes, max_model_len=MOST_KEYS),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=512, max_num_seqs=8),
            speculative_config=SimpleNamespace(num_speculative_tokens=1),
            parallel_config=SimpleNamespace(),
        ),
        platform=SimpleNamespace(is_rocm=lambda: False, dispatch_key="CPU", device_name="cpu"),
    )


def test_the_guard_accepts_what_has_everything(modules):
    assert plugin._problem(modules.engine, modules.config, modules.platform) is None
    chosen = plugin._selector(
        CONFIG, Settings("misa", decode=True), modules.config, modules.platform
    )
    assert chosen.prefill == (512, MOST_KEYS, MOST_KEYS, 0)
    assert chosen.decode == (16, MOST_KEYS, 0, 16)


@pytest.mark.parametrize("name", plugin._HELPERS)
def test_the_guard_misses_functions(modules, name):
    owner, _, last = name.rpartition(".")
    holder = modules.engine.ops if owner else modules.engine
    proxy = SimpleNamespace(**{n: getattr(holder, n) for n in dir(holder) if n[0] != "_"})
    delattr(proxy, last)
    engine = SimpleNamespace(sparse_attn_indexer=modules.engine.operator, ops=proxy)
    if not owner:
        engine = proxy
    assert f"function {name}" in plugin._problem(engine, modules.config, modules.platform)


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, f) for kind, fields in plugin.METADATA.items() for f in fields]
)
def test_the_guard_misses_fields(modules, kind, field):
    fields = [name for name in plugin.METADATA[kind] if name != field]
    setattr(modules.metadata, kind, dataclasses.make_dataclass(kind, fields))
    problem = plugin._problem(modules.engine, modules.config, modules.platform)
    assert problem == f"this vLLM has no {kind}.{field}"


@pytest.mark.parametrize("name", plugin._CONFIG)
def test_the_guard_misses_settings(modules, name):
    owner, _, last = name.rpartition(".")
    delattr(getattr(modules.config, owner) if owner else modules.config, last)
    problem = plugin._problem(modules.engine, modules.config, modules.platform)
    assert f"setting {name}" in problem


@pytest.mark.parametrize("error", [AssertionError, TypeError])
def test_an_error_of_the_engine_leaves_it_off(modules, monkeypatch, caplog, error):
    def fails(config):
        raise error("not on this platform")

    modules.metadata.get_max_prefill_buffer_size = fails
    monkeypatch.setattr(plugin, "_decided", False)
    monkeypatch.setitem(sys.modules, plugin._MODULE, modules.engine)
    platforms = SimpleNamespace(current_platform=modules.platform)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setenv("MISA_INDEXER", "dsa")
    plugin._install(modules.config)
    assert f"MISA is off: {error.__name__}: not on this platform" in caplog.text


def test_the_guard_misses_arguments(modules):
    def sparse_attn_indexer(hidden_states, q_quant):
        pass

    modules.engine.sparse_attn_indexer = sparse_attn_indexer
    problem = plugin._problem(modules.engine, modules.config, modules.platform)
    assert "argument topk_indices_buffer" in problem and "argument kv_cache" in problem


@pytest.mark.parametrize(
    "setting", ["decode_context_parallel_size", "prefill_context_parallel_size", "use_ubatching"]
)
def test_the_guard_refuses_parallel_settings(modules, setting):
    setattr(modules.config.parallel_config, setting, 2)
    problem = plugin._problem(modules.engine, modules.config, modules.platform)
    assert problem and (setting in problem or "overlapped" in problem)


@dataclass
class NewRequestData:
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int


@dataclass
class CachedRequestData:
    req_ids: list[str]
    resumed_req_ids: set[str]
    new_block_ids: list[Any]
    num_computed_tokens: list[int]


@dataclass
class SchedulerOutput:
    scheduled_new_reqs: list[NewRequestData]
    scheduled_cached_reqs: CachedRequestData


NONE_CACHED = CachedRequestData([], set(), [], [])


@pytest.fixture
def loading(monkeypatch):
    """Stand-ins for what the plugin uses of vLLM where a KV connector loads pages. `connector.load`
    is what it does when a step begins, `before` what it did in the background before."""

    class Connector:
        load = staticmethod(lambda: None)

        def start_load_kv(self, context):
            self.load()

    class Worker:
        def execute_model(self, scheduler_output):
            connector.start_load_kv("a context")
            return "ran"

    connector = Connector()
    scheduled = SimpleNamespace(
        SchedulerOutput=SchedulerOutput,
        NewRequestData=NewRequestData,
        CachedRequestData=CachedRequestData,
    )
    stand_ins = SimpleNamespace(Worker=Worker, connector=connector, scheduled=scheduled)
    transfer = SimpleNamespace(get_kv_transfer_group=lambda: connector)
    monkeypatch.setitem(sys.modules, "vllm.v1.worker.gpu_worker", SimpleNamespace(Worker=Worker))
    monkeypatch.setitem(sys.modules, "vllm.distributed.kv_transfer", transfer)
    monkeypatch.setitem(sys.modules, "vllm.v1.core.sched.output", scheduled)
    return stand_ins


def watching(engine, config):
    """Sequences that decode, a selector, an operator that sees what a connector brings, queries."""
    sequences, chosen = Sequences(DECODING), selector(config=config)
    loads = Loads(1)
    loads.install()
    operator = plugin.replace(engine.operator, engine, chosen, loads=loads)
    engine.context.attn_metadata = {LAYER: decoded(sequences, torch.tensor([-1]))}
    return sequences, chosen, operator, *queries(len(DECODING))


@pytest.mark.parametrize("within_the_step", [False, True])
@pytest.mark.parametrize("config", [CONFIG, FILTERED, SKETCHED])
def test_pages_that_a_connector_brings(engine, loading, config, within_the_step):
    sequences, chosen, operator, q, w = watching(engine, config)
    with mock.patch.object(plugin, "replace", lambda *_a, **_k: operator):
        engine.run(chosen, sequences, q, w)
    (layer,) = operator_of(operator)._layers.values()

    def current():
        return same(layer.derived, chosen.derived(sequences.cache))

    def load():
        sequences.cache[1:4].flatten(1)[:, : 64 * DIM : 3] ^= 128

    assert current()
    loading.connector.load = load if within_the_step else lambda: None
    step = SchedulerOutput([NewRequestData(([], [1, 2]), 100)], NONE_CACHED)
    step.scheduled_cached_reqs = CachedRequestData(
        ["a", "b", "c"], {"b", "c"}, [None, ([3, 10**6],), ([4],)], [500, 70, 0]
    )
    if not within_the_step:
        load()
    assert not within_the_step or current()
    assert loading.Worker().execute_model(scheduler_output=step) == "ran"
    assert current()
    # A step that begins no request makes nothing again.
    with mock.patch.object(chosen, "rebuild", side_effect=AssertionError):
        loading.Worker().execute_model(SchedulerOutput([], NONE_CACHED))
        loading.Worker().execute_model(
            SchedulerOutput(
                [NewRequestData(([1],), 0)], CachedRequestData(["a"], set(), [None], [5])
            )
        )
    assert operator_of(operator)._failed == {}


def test_pages_that_cannot_be_made_again_leave_decode_to_the_engine(engine, loading):
    sequences, chosen, operator, q, w = watching(engine, SKETCHED)
    with mock.patch.object(plugin, "replace", lambda *_a, **_k: operator):
        engine.run(chosen, sequences, q, w)
        assert engine.left == []
        with mock.patch.object(chosen, "rebuild", side_effect=RuntimeError("no memory")):
            step = SchedulerOutput([NewRequestData(([1, 2],), 100)], NONE_CACHED)
            assert loading.Worker().execute_model(step) == "ran"
        engine.run(chosen, sequences, q, w)
    assert engine.left == [(len(DECODING), 0)]


@pytest.mark.parametrize(("per_block", "expected"), [(1, [2, 5]), (2, [4, 5, 10, 11])])
def test_pages_of_blocks(per_block, expected):
    step = SchedulerOutput([NewRequestData(([5, 2], [2]), 1)], NONE_CACHED)
    assert Loads(per_block).pages(step) == expected


def test_what_is_derived_needs_to_see_what_a_connector_brings(modules, loading, caplog):
    modules.config.kv_transfer_config = object()
    settings = Settings("misa-r", (("candidates", 100), ("sketch", 2)))
    arguments = settings.config(TOP_K), settings, modules.config, modules.platform
    assert plugin._selector(*arguments).decode is not None
    del loading.scheduled.CachedRequestData
    dense = Settings("dsa")
    plain = dense.config(TOP_K), dense, modules.config, modules.platform
    assert plugin._selector(*plain).decode is not None
    assert plugin._selector(*arguments).decode is None
    assert "CachedRequestData.resumed_req_ids" in caplog.text
    settings = dataclasses.replace(settings, strict=True)
    with pytest.raises(ValueError, match="KV connector"):
        plugin._selector(arguments[0], settings, *arguments[2:])


def spec(block_size, page_size_bytes):
    return SimpleNamespace(block_size=block_size, page_size_bytes=page_size_bytes)


@pytest.mark.parametrize("block_size", [64, 128])
def test_room_is_left_for_what_is_derived(block_size):
    """What is left holds as many pages as fit with what is derived from them."""
    mla, index, derived = block_size * 1152, block_size * 132, 516
    specs = {"a": spec(block_size, mla), "b": spec(block_size, index), "c": spec(block_size, mla)}
    available = 10**9
    rest = left(available, specs, 132, derived)
    beside = rest / (2 * mla + index) * derived * block_size / 64
    assert rest + beside == pytest.approx(available, abs=2)
    assert left(available, {"a": spec(64, 64 * 576)}, 132, derived) == available
    assert left(available, {}, 132, derived) == available


@pytest.mark.parametrize("given", [None, 5000])
def test_vllm_sizes_its_caches_with_that_room(loading, given, caplog):
    caplog.set_level("INFO", "vllm.misa")
    loading.Worker.determine_available_memory = lambda self: 8448 * 10 + 516 * 10
    reserve(132, 516)
    worker = loading.Worker()
    worker.cache_config = SimpleNamespace(kv_cache_memory_bytes=given)
    worker.model_runner = SimpleNamespace(get_kv_cache_spec=lambda: {"a": spec(64, 8448)})
    assert worker.determine_available_memory() == 8448 * 10 + (516 * 10 if given else 0)
    del worker.model_runner
    assert worker.determine_available_memory() == (8448 + 516) * 10
    assert ("no memory is set aside" in caplog.text) == (given is None)


def test_a_vllm_that_sizes_its_caches_otherwise(loading, caplog):
    reserve(132, 516)
    assert "no memory is set aside" in caplog.text


@pytest.mark.parametrize("strict", [False, True])
def test_what_cannot_be_served_is_an_error_if_strict(modules, monkeypatch, caplog, strict):
    modules.config.parallel_config.decode_context_parallel_size = 2
    monkeypatch.setattr(plugin, "_decided", False)
    monkeypatch.setitem(sys.modules, plugin._MODULE, modules.engine)
    platforms = SimpleNamespace(current_platform=modules.platform)
    monkeypatch.setitem(sys.modules, "vllm.platforms", platforms)
    monkeypatch.setenv("MISA_INDEXER", "dsa")
    monkeypatch.setenv("MISA_STRICT", str(int(strict)))
    if strict:
        with pytest.raises(RuntimeError, match="MISA_STRICT.*decode_context_parallel_size is 2"):
            plugin._install(modules.config)
    else:
        plugin._install(modules.config)
        assert "MISA is off: decode_context_parallel_size is 2" in caplog.text


# From here on in vLLM.


@pytest.fixture(scope="module")
def vllm():
    """vLLM with the plugin loaded and on, its CUDA kernels replaced by loops."""
    pytest.importorskip("vllm")
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import sparse_attn_indexer as layers
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.mla import indexer
    from vllm.v1.worker import workspace

    try:
        from vllm.models.deepseek_v32 import attention
    except (AttributeError, ImportError):  # vLLM 0.26: its model file needs a GPU to be imported
        attention = layers
    original = layers.sparse_attn_indexer

    def stand_in(owner, name, function):
        real = getattr(owner, name)
        patch.setattr(owner, name, mock.create_autospec(real, side_effect=function))

    def build(**fields):
        config = VllmConfig(device_config=DeviceConfig(device="cpu"))
        sizes = {"index_topk": TOP_K, "index_n_heads": HEADS, "index_head_dim": DIM}
        text = SimpleNamespace(**sizes, **fields)
        model = SimpleNamespace(hf_text_config=text, max_model_len=MOST_KEYS)
        object.__setattr__(config, "model_config", model)
        if hasattr(config.attention_config, "sparse_mla_prefill_workspace_factor"):
            config.attention_config.sparse_mla_prefill_workspace_factor = 5  # as on a GPU
        with set_current_vllm_config(config):
            cache = SimpleNamespace(prefix=LAYER, kv_cache=None)
            return layers.SparseAttnIndexer(
                cache, 128, "ue8m0", TOP_K, DIM, 4096, 4096, torch.empty(0)
            )

    with pytest.MonkeyPatch.context() as patch:
        for name in ("MISA_INDEXER", "MISA_HEADS", "MISA_BLOCK", "MISA_DECODE"):
            patch.delenv(name, raising=False)
        load_general_plugins()
        plugin.register()  # vLLM loads plugins more than once
        build()
        untouched = layers.sparse_attn_indexer is original
        layer = build(use_misa=True, misa_topk_heads=4, misa_k_block_size=128)
        workspace.init_workspace_manager(torch.device("cpu"))
        stand_in(layers.ops, "cp_gather_indexer_k_quant_cache", gather)
        stand_in(layers.ops, "indexer_k_quant_and_cache", insert)
        stand_in(layers, "fp8_fp4_paged_mqa_logits", paged_logits)
        if hasattr(layers, "get_indexer_topk"):
            stand_in(layers, "get_indexer_topk", lambda backend: top_k)
            patch.setattr(indexer, "_BUILD_PREFILL_CHUNK_METADATA_KERNEL", chunk_bounds)
        else:  # vLLM 0.26
            stand_in(layers.ops, "top_k_per_row_decode", top_k_per_row)
            patch.setattr(indexer, "_build_prefill_chunk_metadata_kernel", Launched())
        yield SimpleNamespace(
            layers=layers,
            attention=attention,
            indexer=indexer,
            layer=layer,
            original=original,
            untouched=untouched,
        )


def insert(k, kv_cache, slot_mapping, quant_block_size, scale_fmt):
    assert quant_block_size == DIM
    plugin.misa.append(kv_cache, k, slot_mapping, scale_format=scale_fmt)


def paged_logits(
    q, kv_cache, weights, context_lens, block_tables, schedule_metadata, max_model_len, **_
):
    """[rows, max_model_len], every head, as the name says."""
    queries_, _ = q
    batch, next_n = queries_.shape[:2]
    logits = torch.full((batch * next_n, max_model_len), -torch.inf)
    for b in range(batch):
        for i in range(next_n):
            n, row = int(context_lens[b, min(i, context_lens.shape[1] - 1)]), b * next_n + i
            k, scale = torch.empty((n, DIM), dtype=torch.uint8), torch.empty((n, 4))
            scale = scale.to(torch.uint8)
            gather(kv_cache.squeeze(-2), k, scale, block_tables[b : b + 1], torch.tensor([0, n]))
            keys = k.view(torch.float8_e4m3fn).float() * scale.view(torch.float32)
            hits = torch.relu(queries_[b, i].float() @ keys.T)
            logits[row, :n] = weights[row] @ hits
    return logits


def top_k(logits, seq_lens, next_n, topk_indices, topk_tokens, max_seq_len):
    for row in range(logits.shape[0]):
        n = int(seq_lens.reshape(-1)[row])
        best = logits[row, :n].topk(min(n, topk_tokens)).indices.int()
        topk_indices[row] = -1
        topk_indices[row, : len(best)] = best


def top_k_per_row(logits, next_n, seq_lens, topk_indices, num_rows, stride0, stride1, topk_tokens):
    top_k(logits, seq_lens, next_n, topk_indices, topk_tokens, None)


class Launched:
    """chunk_bounds as a kernel of Triton, launched on a grid of requests."""

    def __getitem__(self, grid):
        def launch(*arguments, COMPRESS_RATIO, BLOCK_SIZE):
            starts, lengths, cu, row_starts, *rest = arguments
            chunk_bounds(
                *(starts, lengths, cu, row_starts, *rest),
                num_reqs=grid[0],
                COMPRESS_RATIO=COMPRESS_RATIO,
            )

        return launch


def chunk_bounds(
    starts, lengths, cu, row_starts, token_to_seq, ks, ke, begin, end, *_, num_reqs, COMPRESS_RATIO
):
    """ks and ke of the queries begin ... end of a chunk's requests."""
    for request in range(num_reqs):
        new = int(starts[request + 1] - starts[request])
        for i in range(new):
            place = int(starts[request]) + i
            if begin <= place < end:
                seen = (int(lengths[request]) - new + 1 + i) // COMPRESS_RATIO
                ks[place - begin] = row_starts[request]
                ke[place - begin] = row_starts[request] + seen
        token_to_seq[int(cu[request]) : int(cu[request + 1])] = request


def vllm_metadata(vllm, sequences: Sequences, next_n: int, slots: torch.Tensor):
    """The batch of `mixed` in vLLM's own metadata, its chunks cut by vLLM."""
    tables = sequences.table
    decode_rows = len(DECODING) * next_n
    starts = [0, *(next_n * (i + 1) for i in range(len(DECODING)))]
    for count in NEW:
        starts.append(starts[-1] + count)
    lengths = torch.tensor(DECODING + PREFILLING).int()
    chunks = [
        vllm.indexer.build_prefill_chunk_metadata(
            start_idx=len(DECODING),
            end_idx=len(lengths),
            query_start_loc=torch.tensor(starts).int(),
            query_start_loc_cpu=torch.tensor(starts).int(),
            uncompressed_seq_lens=lengths,
            compressed_seq_lens=lengths,
            compressed_seq_lens_cpu=lengths,
            block_table=tables,
            compress_ratio=1,
            query_slice=part,
        )
        for part in (slice(0, 100), slice(100, sum(NEW)))
    ]
    lens = torch.tensor(DECODING)[:, None] - next_n + 1 + torch.arange(next_n)
    return vllm.indexer.DeepseekV32IndexerMetadata(
        seq_lens=lengths,
        max_seq_len=max(DECODING + PREFILLING),
        slot_mapping=slots,
        num_decodes=len(DECODING),
        num_decode_tokens=decode_rows,
        num_prefills=len(PREFILLING),
        num_prefill_tokens=sum(NEW),
        prefill=vllm.indexer.DeepseekV32IndexerPrefillMetadata(chunks=chunks),
        decode=vllm.indexer.DeepSeekV32IndexerDecodeMetadata(
            block_table=tables[: len(DECODING)],
            seq_lens=lens.int(),
            decode_lens=torch.full((len(DECODING),), next_n, dtype=torch.int32),
            requires_padding=False,
            schedule_metadata=torch.empty(0),
        ),
    )


def forward_context(metadata):
    from vllm.forward_context import ForwardContext, override_forward_context

    context = ForwardContext(no_compile_layers={}, attn_metadata=metadata, slot_mapping={})
    return override_forward_context(context)


def call(operator, q, w, cache, buffer):
    """Calls the operator as the model file of V3.2 does, keys inserted and the buffer cleared."""
    named = {
        "skip_k_cache_insert": True,
        "use_pcp": False,
        "pcp_shard_decode_requests": False,
        "dense_mha_metadata_layer_name": "",
        "dcp_rank": 0,
        "dcp_world_size": 1,
        "cp_kv_cache_interleave_size": 1,
        "skip_topk_buffer_clear": True,
        "topk_backend": "auto",
    }
    known = inspect.signature(operator).parameters
    sizes = (128, "ue8m0", TOP_K, DIM, 4096, 4096)
    return operator(
        *(torch.empty(q.shape[0], 8), LAYER, cache, q, None, None, w, *sizes, buffer),
        **{name: value for name, value in named.items() if name in known},
    )


def test_vllm_finds_the_plugin_and_leaves_other_models_alone(vllm):
    names = {entry.name: entry.value for entry in entry_points(group="vllm.general_plugins")}
    assert names["misa"] == "misa.integrations.vllm:register"
    assert vllm.untouched
    build = importlib.import_module("vllm.model_executor.custom_op").CustomOp.__init__
    assert not hasattr(build.__wrapped__, "__wrapped__")


def test_vllm_has_the_replacement_everywhere(vllm):
    replacement = vllm.layers.sparse_attn_indexer
    assert replacement is not vllm.original
    assert vllm.attention.sparse_attn_indexer is replacement
    assert inspect.signature(replacement) == inspect.signature(vllm.original)


@pytest.mark.parametrize("through", ["layer", "function"])
@pytest.mark.parametrize("next_n", [1, 3])
def test_vllm_prefill_is_misa_and_decode_vllms(vllm, through, next_n):
    """Both ways that vLLM calls the operator. Keys of this step are inserted by vLLM's operator
    before they are read, in the function's case by the caller.
    """
    sequences = Sequences(DECODING + PREFILLING)
    rows = rows_of(next_n)
    q, w = queries(len(rows))
    keys = torch.randn((len(rows), DIM), generator=torch.Generator().manual_seed(5))
    slots = torch.tensor([sequences.slot(sequence, seen - 1) for sequence, seen in rows])
    buffer = torch.full((len(rows) + 2, COLUMNS), POISON, dtype=torch.int32)
    hidden = torch.empty(len(rows), 8)
    with forward_context({LAYER: vllm_metadata(vllm, sequences, next_n, slots)}):
        if through == "layer":
            layer = vllm.layer
            layer.k_cache.kv_cache, layer.topk_indices_buffer = sequences.cache, buffer
            result = layer.forward_cuda(hidden, q, keys, w)
        else:
            insert(keys, sequences.cache, slots, DIM, "ue8m0")
            buffer[: len(rows)] = -1
            result = call(vllm.attention.sparse_attn_indexer, q, w, sequences.cache, buffer)
    assert result.data_ptr() == buffer.data_ptr()
    expected = sequences.expected(q, w, rows, CONFIG)
    decode = len(DECODING) * next_n
    dense = Settings("dsa").config(TOP_K)
    expected[:decode] = sequences.expected(q[:decode], w[:decode], rows[:decode], dense)
    assert_rows(buffer, expected)


@pytest.mark.parametrize("next_n", [1, 3])
def test_vllm_decode_is_misa_if_asked_for(vllm, next_n):
    sequences = Sequences(DECODING + PREFILLING)
    rows = rows_of(next_n)
    q, w = queries(len(rows))
    buffer = torch.full((len(rows) + 2, COLUMNS), POISON, dtype=torch.int32)
    buffer[: len(rows)] = -1
    operator = plugin.replace(vllm.original, vllm.layers, selector())
    metadata = vllm_metadata(vllm, sequences, next_n, torch.full((len(rows),), -1))
    with forward_context({LAYER: metadata}):
        call(operator, q, w, sequences.cache, buffer)
    assert_rows(buffer, sequences.expected(q, w, rows, CONFIG))


def test_vllm_compressed_sequences(vllm):
    """DeepSeek-V4 indexes a key for every 4 tokens; positions count keys."""
    lengths = torch.tensor([1600, 523]).int()
    new = [40, 130]
    keys = lengths // 4
    sequences = Sequences(keys.tolist())
    starts = torch.tensor([0, *new]).cumsum(0).int()
    chunk = vllm.indexer.build_prefill_chunk_metadata(
        start_idx=0,
        end_idx=2,
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        uncompressed_seq_lens=lengths,
        compressed_seq_lens=keys,
        compressed_seq_lens_cpu=keys,
        block_table=sequences.table,
        compress_ratio=4,
    )
    metadata = vllm.indexer.DeepseekV32IndexerMetadata(
        seq_lens=lengths,
        max_seq_len=int(lengths.max()),
        slot_mapping=torch.zeros(sum(new), dtype=torch.int64),
        num_decodes=0,
        num_decode_tokens=0,
        num_prefills=2,
        num_prefill_tokens=sum(new),
        prefill=vllm.indexer.DeepseekV32IndexerPrefillMetadata(chunks=[chunk]),
    )
    rows = [(sequence, seen // 4) for sequence, seen in new_rows(lengths.tolist(), new)]
    q, w = queries(len(rows))
    buffer = torch.full((len(rows) + 2, COLUMNS), POISON, dtype=torch.int32)
    buffer[: len(rows)] = -1
    with forward_context({LAYER: metadata}):
        call(vllm.layers.sparse_attn_indexer, q, w, sequences.cache, buffer)
    assert_rows(buffer, sequences.expected(q, w, rows, CONFIG))


def test_vllm_profiling_run(vllm):
    """Before there is metadata vLLM's operator reserves its workspace and selects nothing."""
    q, w = queries(4)
    buffer = torch.full((6, COLUMNS), POISON, dtype=torch.int32)
    with forward_context(None):
        call(vllm.layers.sparse_attn_indexer, q, w, torch.empty(0), buffer)
    assert (buffer == POISON).all()
