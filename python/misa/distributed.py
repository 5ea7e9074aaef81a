# SPDX-License-Identifier: Apache-2.0
"""Selection over keys that are sharded across the ranks of a torch.distributed group.

Every rank has a part of the keys and all queries. The work is split in one of two ways:

- By queries: each rank receives the keys of the others and selects for its share of the queries.
  The selections are exchanged.
- By keys, for few queries and configs that score with all heads: each rank selects from its own
  keys for all queries. What it selected is exchanged with its scores, and the best of all ranks are
  the selection.

The result on every rank is that of one rank, bit for bit, whatever the config.

The sizes of what is exchanged follow from shapes, so that the host need not wait for a device.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist

import misa

from ._arrays import cuda_device, dtype_name
from ._call import (
    WORKSPACE_CAP,
    checked_config,
    checked_execution,
    checked_shape,
    empty_selected,
    select_into,
)
from ._peers import Attempt, Peers
from .torch_ops import require_one_device, require_tensors

_Execution = tuple[misa.Config, str, int, int]  # the last arguments of `select_into`

_UNITS = (64, 16, 4, 1)  # keys that may be moved as one
_ALIGNED = 4  # outputs begin on multiples of so many words

# The work is split by keys where selections have at most this part of the bytes of keys. Those who
# receive selections have to select once more.
_PART_OF_KEYS = 1 / 4

# An entry is an int64 of two halves: the upper one orders the score, NaN below every number; the
# lower one is the position with every bit inverted, so that of equal scores the lower position is
# the larger entry.
_MOST = 2**31 - 1
_PADDING = -(2**63)  # below every entry; its position is -1
_LOST = _MOST << 32  # above every entry; its position is -1, its score NaN


class Shards:
    """Which of all keys each rank has. Made once for all calls over the same keys, on every rank by
    itself.

    lengths: L_rank, the number of keys of every rank; L is their sum.
    positions: integers [L], on the device of the keys: the positions of the keys of the first rank,
        then those of the second, and so on; each of 0 to L - 1 is there once. If not given, the
        keys of the ranks follow each other. Keys that stay together in aligned groups of 4, 16 or
        64 are moved faster than single ones.

    Raises ValueError for wrong lengths or positions. Reading positions waits for their device.
    """

    def __init__(self, lengths: Sequence[int], positions: torch.Tensor | None = None) -> None:
        self.lengths = tuple(lengths)
        if min(self.lengths, default=-1) < 0:
            raise ValueError(f"lengths: expected one of 0 or more a rank, got {list(lengths)}")
        total = sum(self.lengths)
        if total >= 2**31:
            raise ValueError(f"lengths: expected a sum below 2^31, got {total}")
        self.padded = max(self.lengths)  # the keys that each rank sends
        self.unit = 1  # keys that stay together
        self.rows: torch.Tensor | None = None  # which unit of what was sent is each of the result
        self.positions: torch.Tensor | None = None  # int32; None: the keys follow each other
        self.ascending = True  # whether the positions of each rank do
        if positions is not None:
            self._place(positions, total)

    def _place(self, positions: torch.Tensor, total: int) -> None:
        require_tensors({"positions": positions}, ())
        if positions.is_floating_point() or positions.shape != (total,):
            raise ValueError(
                f"positions: expected integers [{total}], got {positions.dtype} "
                f"{list(positions.shape)}"
            )
        positions = positions.long()
        in_order = torch.arange(total, device=positions.device)
        if torch.equal(positions, in_order):
            return
        if not torch.equal(positions.sort().values, in_order):
            raise ValueError(f"positions: expected each of 0 to {total - 1} once")
        self.positions = positions.int()
        steps = [part.diff() for part in positions.split(self.lengths)]
        self.ascending = bool((torch.cat(steps) > 0).all())
        self.padded = _multiple(self.padded, _UNITS[0])
        ends = accumulate(self.lengths)
        for rank, (length, end) in enumerate(zip(self.lengths, ends, strict=True)):
            in_order[end - length : end] += rank * self.padded - (end - length)
        rows = torch.empty_like(in_order)
        rows[positions] = in_order
        for self.unit in _UNITS:
            # The last unit ends with what pads the keys of a rank.
            steps = torch.arange(self.unit, device=rows.device)
            ended = torch.cat([rows, rows[-1] + 1 + steps[: -total % self.unit]])
            units = ended.view(-1, self.unit)
            self.rows = units[:, 0] // self.unit
            if torch.equal(units, self.rows[:, None] * self.unit + steps):
                return


def splits_keys(
    q: torch.Tensor,
    config: misa.Config,
    shards: Shards,
    *,
    heads: bool = False,
    residual: bool = False,
) -> bool:
    """Whether :func:`select` splits the work by keys, with these of its arguments: a function of
    what is the same on every rank, of q its shape and dtype.

    It does if every row is scored by all heads without a block filter or a sketch, neither heads
    nor residual rows are returned, the keys of each rank are in order of position, and the selected
    positions, 8 bytes each, are at most a quarter of the bytes of the keys of the longest shard,
    taken to have the dtype of q.
    """
    tokens, model_heads, dim = q.shape
    routed = config.router != "all"
    every_head = config.heads == model_heads if routed else config.sketch == 0
    if not every_head or config.filter_block != 0 or not shards.ascending:
        return False
    if heads and routed or residual and config.residual:
        return False
    selections = tokens * config.top_k * torch.int64.itemsize
    return selections <= _PART_OF_KEYS * shards.padded * dim * q.element_size()


@torch.no_grad()
def select(
    q: torch.Tensor,
    w: torch.Tensor,
    k_local: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    shards: Shards | None = None,
    k_scale: torch.Tensor | None = None,
    config: misa.Config = misa.Config(),  # noqa: B008 (immutable)
    scores: bool = False,
    heads: bool = False,
    residual: bool = False,
    check: bool = True,
    backend: str = "auto",
    threads: int = 0,
    workspace_cap: int = WORKSPACE_CAP,
) -> misa.Selected:
    """`misa.select` on the keys of all ranks.

    A collective: every rank of `group` (None: the default group) calls it with the same arguments,
    except for its keys. All tensors are on one device for which the group has a backend.

    q: [T, H, D] float32, bfloat16, or float8_e4m3fn (or its bytes as uint8).
    w: [T, H] float32.
    k_local: [L_rank, D] in one of the dtypes of q; L_rank may differ and may be 0.
    k_scale: [L_rank] float32, with e4m3 keys only.
    ks, ke: [T] int32; query t sees the keys s with ks[t] <= s < ke[t] of all L keys.
    shards: which of the L keys each rank has. If not given, the keys of the ranks follow each
        other, and the ranks begin by agreeing on the numbers of keys, for which the host waits.
    check: whether to raise on every rank if one fails; on CUDA tensors the host then waits for the
        selection. Without it, and in the capture of a CUDA graph, a rank that fails raises alone,
        and on the others its rows are -1, their scores NaN: those of its share of the queries, or
        all of them if the work is split by keys.

    On CUDA tensors the call runs on PyTorch's current stream. With shards and without check it does
    not wait for it, and may be captured into a CUDA graph, after one that was not, since NCCL
    connects the ranks at their first collective. Entries of ks and ke out of range are clamped
    there.

    Returns what `misa.select` returns, the same on every rank.

    Raises what `misa.select` raises where it fails, and on the other ranks a RuntimeError that
    names the rank and its error. Without shards, ranks that disagree on the config, the shape of q
    or dtypes raise ValueError. With shards, these are taken to be the same, and a wrong q, config
    or shards to be wrong on every rank; a rank on which it is wrong alone leaves the others to the
    timeout of the group.
    """
    peers = Peers(group)
    backend, threads, workspace_cap = checked_execution(backend, threads, workspace_cap)
    attempt = Attempt()
    if shards is None:
        attempt(lambda: _check_shared(q, config, None, peers.size))
        attempt(lambda: _check_own(q, w, k_local, ks, ke, k_scale, None, None))
        options = config, scores, heads, residual
        shards = _agreed_shards(peers, attempt, (q, k_local, k_scale), options)
        length = shards.lengths[peers.rank]
    else:
        _check_shared(q, config, shards, peers.size)
        length = shards.lengths[peers.rank]
        attempt(lambda: _check_own(q, w, k_local, ks, ke, k_scale, shards, length))
    split: _ByKeys | _ByQueries
    if splits_keys(q, config, shards, heads=heads, residual=residual):
        split = _ByKeys(peers, shards, q, config, scores)
    else:
        split = _ByQueries(peers, shards, q, config, scores, heads, residual)
    arrays = q, w, k_local, ks, ke, k_scale
    split.select(attempt, arrays, (config, backend, threads, workspace_cap))
    (every,) = peers.gather(split.sent)
    if check and not (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        attempt.raise_together(peers, q.device, any(every[:, -1].tolist()))
    elif attempt.error is not None:
        raise attempt.error
    return split.merged(every)


def _agreed_shards(
    peers: Peers, attempt: Attempt, arrays: Sequence[torch.Tensor | None], options: tuple
) -> Shards:
    """Shards that follow each other, after a look at what must be the same on every rank. The
    arrays are q, the keys and their scales. What it raises, it raises on every rank."""
    tensors = [array for array in arrays if isinstance(array, torch.Tensor)]
    device = next((each.device for each in tensors if each.is_cuda), torch.device("cpu"))
    header = [-1, 0]
    if attempt.error is None:
        same = (*options, tensors[0].shape, [each.dtype for each in tensors])
        header = [zlib.crc32(repr(same).encode()), len(tensors[1])]
    # Through the host, if the group can, so that no device is waited for.
    by_host = "cpu" in str(dist.get_backend_config(peers.group))
    local = torch.tensor(header, device="cpu" if by_host else device)
    checksums, lengths = peers.gather(local)[0].T.tolist()
    attempt.raise_together(peers, device, min(checksums) < 0)
    others = [rank for rank, checksum in enumerate(checksums) if checksum != checksums[0]]
    if others:
        raise ValueError(
            "config, requested outputs, the shape of q and dtypes: expected the same on every "
            f"rank, got others than rank 0's on ranks {others}"
        )
    return Shards(lengths)


@lru_cache(maxsize=256)
def _layout(
    config: misa.Config, heads: int, dim: int, share: int, *wanted: bool
) -> tuple[list[tuple[torch.dtype, int, int] | None], int]:
    """Of each requested output of so many queries, one after the other in words of 4 bytes: dtype,
    width, and where it begins; and where the last one ends."""
    outputs: list[tuple[torch.dtype, int, int] | None] = []
    end = 0
    for form in empty_selected(torch.empty(1, heads, dim), config, *wanted):
        outputs.append(None if form is None else (form.dtype, form.shape[1], end))
        if form is not None:
            end = _multiple(end + share * form.shape[1], _ALIGNED)
    return outputs, end


class _ByQueries:
    """Each rank selects for its share of the queries. These are dealt one by one, so that causal
    rows make equal shares.

    What is sent: words of 4 bytes of every requested output, one after the other, then some that
    are 0 if all went well."""

    def __init__(
        self, peers: Peers, shards: Shards, q: torch.Tensor, config: misa.Config, *wanted: bool
    ) -> None:
        self.peers, self.shards = peers, shards
        self.tokens, heads, dim = q.shape
        self.share = -(-self.tokens // peers.size)
        self.outputs, count = _layout(config, heads, dim, self.share, *wanted)
        self.sent = torch.empty(count + _ALIGNED, dtype=torch.int32, device=q.device)

    def select(self, attempt: Attempt, arrays: Sequence[Any], execution: _Execution) -> None:
        """`arrays` are those of a rank; the rest is that of `select_into`."""
        q, w, k, ks, ke, scale = arrays
        words = attempt(lambda: _words(k, scale))
        if words is None:
            words = _no_words(q, k, scale, self.shards.lengths[self.peers.rank])
        k_words, *scale_words = _all_keys(self.peers, self.shards, words)
        mine = slice(self.peers.rank, None, self.peers.size)

        def select_mine() -> None:
            spans = torch.stack((ks[mine], ke[mine]))
            views = self._views(self.sent[None], spans.shape[1])
            into = misa.Selected(*(view if view is None else view.flatten(0, 1) for view in views))
            select_into(
                into, q[mine], w[mine], k_words.view(k.dtype), spans[0], spans[1],
                scale_words[0].view(torch.float32)[:, 0] if scale_words else None, None, *execution,
            )  # fmt: skip

        attempt(select_mine)
        if attempt.error is None:
            self.sent[-_ALIGNED:].zero_()
        else:
            self.sent.fill_(-1)

    def merged(self, every: torch.Tensor) -> misa.Selected:
        """From what every rank sent, [ranks, words], the selections for all queries."""

        def in_order(view: torch.Tensor) -> torch.Tensor:
            contiguous = view.clone(memory_format=torch.contiguous_format)
            return contiguous.flatten(0, 1)[: self.tokens]

        views = self._views(every, self.share)
        return misa.Selected(*(view if view is None else in_order(view) for view in views))

    def _views(self, words: torch.Tensor, rows: int) -> Iterator[torch.Tensor | None]:
        """Each output in words [ranks, words], as [rows, ranks, width], in order of the queries."""
        ranks, count = words.shape
        for output in self.outputs:
            if output is None:
                yield None
                continue
            dtype, width, begin = output
            yield words.view(dtype).as_strided((rows, ranks, width), (width, count, 1), begin)


class _ByKeys:
    """Each rank selects from its own keys for all queries, and the best of all ranks are selected.
    What is selected of all keys is selected of those of its rank too.

    What is sent: an entry for each selected position of each query, then one that is 0 if all went
    well."""

    def __init__(
        self, peers: Peers, shards: Shards, q: torch.Tensor, config: misa.Config, scores: bool
    ) -> None:
        self.peers, self.shards, self.config, self.scores = peers, shards, config, scores
        self.shape = len(q), config.top_k
        self.sent = torch.empty(len(q) * config.top_k + 1, dtype=torch.int64, device=q.device)

    def select(self, attempt: Attempt, arrays: Sequence[Any], execution: _Execution) -> None:
        """`arrays` are those of a rank; the rest is that of `select_into`."""
        attempt(lambda: self._select_own(execution, *arrays))
        if attempt.error is None:
            self.sent[-1:].zero_()
        else:
            self.sent.fill_(_LOST)

    def _select_own(
        self,
        execution: _Execution,
        q: torch.Tensor,
        w: torch.Tensor,
        k: torch.Tensor,
        ks: torch.Tensor,
        ke: torch.Tensor,
        k_scale: torch.Tensor | None,
    ) -> None:
        total, rank = sum(self.shards.lengths), self.peers.rank
        if not q.is_cuda:
            _require_spans(ks, ke, total)
        start, length = sum(self.shards.lengths[:rank]), self.shards.lengths[rank]
        positions = self.shards.positions
        ends = torch.stack((ks, ke)).clamp_(0, total)
        if positions is None:
            ends -= start
            before = ends[0].clamp_max(0)  # minus the keys that queries see on ranks before
            ends.clamp_(0, length)
        else:
            first = ends[0]
            ends = torch.searchsorted(positions[start : start + length], ends, out_int32=True)
        indices = torch.empty(self.shape, dtype=torch.int32, device=q.device)
        scores = torch.empty(self.shape, dtype=torch.float32, device=q.device)
        into = misa.Selected(indices, scores)
        select_into(into, q, w, k, ends[0], ends[1], k_scale, None, *execution)

        entries = self.sent[:-1].view(self.shape)
        low, high = _halves(entries)
        if positions is None:
            torch.sub((before - 1)[:, None], indices, out=low)
        else:
            # An index of -1 reads some position, since there are positions.
            own = positions[indices + (ends[0] + start)[:, None]]
            torch.sub((first - 1)[:, None], own, out=low)
        bits = scores.view(torch.int32)
        torch.bitwise_xor(bits, (bits >> 31) & _MOST, out=high)
        high.masked_fill_(scores.isnan(), -_MOST - 1)
        entries.masked_fill_(indices < 0, _PADDING)

    def merged(self, every: torch.Tensor) -> misa.Selected:
        """From what every rank sent, [ranks, entries], the selections for all queries."""
        tokens, top_k = self.shape
        entries = every[:, :-1].view(len(every), tokens, top_k).transpose(0, 1).flatten(1)
        best = entries.topk(top_k, dim=1, sorted=False).values
        if self.config.ordered:
            best = best.gather(1, (_halves(best)[0] ^ _MOST).argsort(dim=1))
        low, high = _halves(best)
        scores = None
        if self.scores:
            scores = (high ^ ((high >> 31) & _MOST)).view(torch.float32)
            scores.nan_to_num_(torch.nan, torch.inf, -torch.inf)  # every NaN the same
            scores.masked_fill_(best == _PADDING, -torch.inf)
        return misa.Selected(~low, scores)


def _halves(entries: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The lower and the upper halves of entries [T, n], as int32 [T, n]."""
    return entries.view(torch.int32).view(*entries.shape, 2).unbind(2)


def _check_shared(q: torch.Tensor, config: misa.Config, shards: Shards | None, ranks: int) -> None:
    """Checks what is the same on every rank."""
    checked_config(config)
    require_tensors({"q": q}, ())
    cuda_device("q", q)  # refuses any device but the CPU and CUDA devices
    checked_shape("q", q, "[T, H, D]")
    if shards is not None and len(shards.lengths) != ranks:
        raise ValueError(f"shards: expected those of {ranks} ranks, got {len(shards.lengths)}")


def _check_own(
    q: torch.Tensor,
    w: torch.Tensor,
    k: torch.Tensor,
    ks: torch.Tensor,
    ke: torch.Tensor,
    k_scale: torch.Tensor | None,
    shards: Shards | None,
    length: int | None,
) -> None:
    """Checks what may be wrong on one rank alone, as far as `misa.select` on a part of the queries
    does not; `length` is the number of keys that the rank has."""
    given = {"q": q, "w": w, "k_local": k, "ks": ks, "ke": ke, "k_scale": k_scale,
             "positions of shards": None if shards is None else shards.rows}  # fmt: skip
    require_tensors(given, ("k_scale", "positions of shards"))
    require_one_device(given)
    tokens, heads, dim = q.shape
    dtype_name("k_local", k.dtype)
    keys = len(k) if length is None and k.ndim > 0 else length
    expected = [
        ("k_local", k, k.dtype, (keys, dim)),
        ("w", w, torch.float32, (tokens, heads)),
        ("ks", ks, torch.int32, (tokens,)),
        ("ke", ke, torch.int32, (tokens,)),
    ]
    if k_scale is not None:
        expected += [
            ("k_local", k, torch.uint8 if k.dtype == torch.uint8 else torch.float8_e4m3fn, k.shape),
            ("k_scale", k_scale, torch.float32, (keys,)),
        ]
    for name, array, dtype, shape in expected:
        if array.dtype != dtype or array.shape != shape:
            raise ValueError(
                f"{name}: expected {str(dtype)[6:]} {list(shape)}, got {array.dtype} "
                f"{list(array.shape)}"
            )


def _require_spans(ks: torch.Tensor, ke: torch.Tensor, total: int) -> None:
    """Refuses in host memory what devices clamp."""
    for name, ends in (("ks", ks), ("ke", ke)):
        wrong = ((ends < 0) | (ends > total)).nonzero()
        if len(wrong) > 0:
            t = int(wrong[0])
            raise ValueError(f"{name}[{t}]: expected 0 to L = {total}, got {int(ends[t])}")


def _words(k: torch.Tensor, k_scale: torch.Tensor | None) -> list[torch.Tensor]:
    """The keys as words of 4 bytes [L_rank, words], and their scales, if any, as [L_rank, 1]."""
    words = [k.contiguous().view(torch.int32)]
    return words if k_scale is None else [*words, k_scale.contiguous()[:, None].view(torch.int32)]


def _no_words(
    q: torch.Tensor, k: torch.Tensor, k_scale: torch.Tensor | None, length: int
) -> list[torch.Tensor]:
    """Zeros in place of what `_words` returns where an argument is wrong."""
    # With scales, keys are e4m3.
    like = q if not isinstance(k, torch.Tensor) else k
    element = like.element_size() if k_scale is None else 1
    widths = [q.shape[2] * element // 4] + ([] if k_scale is None else [1])
    return [torch.zeros(length, width, dtype=torch.int32, device=q.device) for width in widths]


def _all_keys(peers: Peers, shards: Shards, words: list[torch.Tensor]) -> list[torch.Tensor]:
    """From arrays of this rank's keys [L_rank, words] those of all keys, in order of position,
    [L, words]."""

    def padded(local: torch.Tensor) -> torch.Tensor:
        if len(local) == shards.padded:
            return local
        sent = local.new_empty(shards.padded, local.shape[1])
        sent[: len(local)] = local
        return sent

    def in_order(every: torch.Tensor) -> torch.Tensor:
        if shards.rows is not None:
            units = every.view(-1, shards.unit * every.shape[2])[shards.rows]
            return units.view(-1, every.shape[2])[: sum(shards.lengths)]
        if min(shards.lengths) == shards.padded:
            return every.flatten(0, 1)
        parts = zip(every, shards.lengths, strict=True)
        return torch.cat([part[:length] for part, length in parts])

    return [in_order(every) for every in peers.gather(*map(padded, words))]


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of
