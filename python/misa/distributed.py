# SPDX-License-Identifier: Apache-2.0
"""Selection over keys that are sharded across the ranks of a torch.distributed group.

Every rank has a part of the keys and all queries. Each receives the keys of the others, selects for
its share of the queries as one rank with all keys would, and the selections are exchanged. The
result on every rank is that of one rank, bit for bit, whatever the config.

The sizes of what is exchanged follow from shapes, so that the host need not wait for a device.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, TypeVar

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
from .torch_ops import require_one_device, require_tensors

T = TypeVar("T")

_UNITS = (64, 16, 4, 1)  # keys that may be moved as one
_ALIGNED = 4  # outputs begin on multiples of so many words


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
        and on the others the rows of its share of the queries are -1, their scores NaN.

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
    peers = _Peers(group)
    backend, threads, workspace_cap = checked_execution(backend, threads, workspace_cap)
    attempt = _Attempt()
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
    words = attempt(lambda: _words(k_local, k_scale))
    if words is None:
        words = _no_words(q, k_local, k_scale, length)
    k_words, *scales = (peers.all_keys(array, shards) for array in words)

    # Queries are dealt one by one, so that causal rows make equal shares.
    mine = slice(peers.rank, None, peers.size)
    share = -(-len(q) // peers.size)
    out = _Out(q, share, config, scores, heads, residual)

    def select_mine() -> None:
        ks_mine, ke_mine = ks[mine].contiguous(), ke[mine].contiguous()
        into = out.selected(len(ks_mine))
        k = k_words.view(k_local.dtype)
        scale = scales[0].view(torch.float32)[:, 0] if scales else None
        select_into(
            into, q[mine], w[mine], k, ks_mine, ke_mine, scale, None, config, backend, threads,
            workspace_cap,
        )  # fmt: skip

    attempt(select_mine)
    out.finish(failed=attempt.error is not None)
    every = peers.gather(out.words)
    if check and not (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        attempt.raise_together(peers, q.device, any(every[:, -1].tolist()))
    elif attempt.error is not None:
        raise attempt.error
    return out.merged(every, len(q))


class _Peers:
    """The ranks of a group and what they send each other. What is on a CUDA device is sent on its
    current stream."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group or dist.group.WORLD
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)

    def gather(self, local: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, of equal shapes and contiguous, as [ranks, …]."""
        every = local.new_empty(self.size, *local.shape)
        if local.numel() > 0:
            dist.all_gather_into_tensor(every.flatten(0, 1), local, group=self.group)
        return every

    def all_keys(self, local: torch.Tensor, shards: Shards) -> torch.Tensor:
        """From an array of this rank's keys [L_rank, words] that of all keys, in order of position,
        [L, words]."""
        words = local.shape[1]
        if len(local) < shards.padded:
            local, given = local.new_empty(shards.padded, words), local
            local[: len(given)] = given
        every = self.gather(local)
        if shards.rows is not None:
            units = every.view(-1, shards.unit * words)[shards.rows]
            return units.view(-1, words)[: sum(shards.lengths)]
        if min(shards.lengths) == shards.padded:
            return every.flatten(0, 1)
        parts = zip(every, shards.lengths, strict=True)
        return torch.cat([part[:length] for part, length in parts])

    def objects(self, mine: Any, device: torch.device) -> list[Any]:
        """An object of every rank."""
        every: list[Any] = [None] * self.size
        with torch.cuda.device(device if device.type == "cuda" else -1):
            dist.all_gather_object(every, mine, group=self.group)
        return every


class _Attempt:
    """Steps of one rank. Once one has failed, the later ones are left out, but the rank goes on to
    join the collectives, so that no rank waits for it."""

    def __init__(self) -> None:
        self.error: Exception | None = None

    def __call__(self, step: Callable[[], T]) -> T | None:
        if self.error is None:
            try:
                return step()
            except Exception as error:
                self.error = error
        return None

    def raise_together(self, peers: _Peers, device: torch.device, failed: bool) -> None:
        """Raises on every rank if one has failed, which all of them know."""
        if not failed:
            return
        errors = peers.objects(self.error and repr(self.error), device)
        if self.error is not None:
            raise self.error
        raise RuntimeError("; ".join(f"rank {i}: {e}" for i, e in enumerate(errors) if e))


def _agreed_shards(
    peers: _Peers, attempt: _Attempt, arrays: Sequence[torch.Tensor | None], options: tuple
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
    checksums, lengths = peers.gather(local).T.tolist()
    attempt.raise_together(peers, device, min(checksums) < 0)
    others = [rank for rank, checksum in enumerate(checksums) if checksum != checksums[0]]
    if others:
        raise ValueError(
            "config, requested outputs, the shape of q and dtypes: expected the same on every "
            f"rank, got others than rank 0's on ranks {others}"
        )
    return Shards(lengths)


class _Out:
    """The selections of a rank for its share of the queries, which are sent as one array: words of
    4 bytes of every requested output, one after the other, then some that are 0 if all went well.
    """

    def __init__(self, q: torch.Tensor, share: int, config: misa.Config, *wanted: bool) -> None:
        self.share = share
        self.forms = empty_selected(q[:1], config, *wanted)  # the widths and dtypes
        sizes = (0 if form is None else share * form.shape[1] for form in self.forms)
        self.begins = list(accumulate((_multiple(size, _ALIGNED) for size in sizes), initial=0))
        count = self.begins[-1] + _ALIGNED
        self.words = torch.empty(count, dtype=torch.int32, device=q.device)

    def selected(self, tokens: int) -> misa.Selected:
        """Where this rank writes the selections for so many queries."""
        views = self._views(self.words[None], tokens)
        return misa.Selected(*(view if view is None else view.flatten(0, 1) for view in views))

    def finish(self, failed: bool) -> None:
        """Says whether all went well."""
        if failed:
            self.words.fill_(-1)
        else:
            self.words[-_ALIGNED:].zero_()

    def merged(self, every: torch.Tensor, tokens: int) -> misa.Selected:
        """From the words of every rank, [ranks, words], the selections for all queries."""

        def in_order(view: torch.Tensor) -> torch.Tensor:
            return view.clone(memory_format=torch.contiguous_format).flatten(0, 1)[:tokens]

        views = self._views(every, self.share)
        return misa.Selected(*(view if view is None else in_order(view) for view in views))

    def _views(self, words: torch.Tensor, rows: int) -> Iterator[torch.Tensor | None]:
        """Each output in words [ranks, words], as [rows, ranks, width], in order of the queries."""
        for form, begin in zip(self.forms, self.begins, strict=False):
            if form is None:
                yield None
                continue
            ranks, count = words.shape
            width = form.shape[1]
            shape, strides = (rows, ranks, width), (width, count, 1)
            yield words.view(form.dtype).as_strided(shape, strides, begin)


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


def _words(k: torch.Tensor, k_scale: torch.Tensor | None) -> list[torch.Tensor]:
    """The keys as words [L_rank, words], and their scales, if any, as [L_rank, 1]."""
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


def _multiple(count: int, of: int) -> int:
    return -(-count // of) * of
