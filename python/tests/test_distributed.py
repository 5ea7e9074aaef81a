# SPDX-License-Identifier: Apache-2.0
"""Selection over sharded keys against the same selection on one rank."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")
if not torch.distributed.is_available():
    pytest.skip("torch was built without distributed", allow_module_level=True)

import misa  # noqa: E402
import misa.distributed  # noqa: E402

DIM, HEADS = 64, 8
SECONDS = 240  # a rank that has not ended by then hangs

CONFIGS = {
    "dsa": misa.Config("dsa", top_k=96),
    "dsa-ordered": misa.Config("dsa", top_k=96, ordered=True),
    "misa": misa.Config("misa", top_k=96, heads=3, block=128),
    "misa-all": misa.Config("misa", top_k=96, heads=HEADS, block=128),
    "misa-dagger": misa.Config("misa-dagger", top_k=96, heads=2, block=64, candidates=200),
    "misa-r": misa.Config("misa-r", top_k=96, heads=2),
    "misa-r-dagger": misa.Config("misa-r", top_k=64, heads=1, candidates=128, ordered=True),
    "linear": misa.Config("misa-r", top_k=96, heads=0),
    "misa-r-all": misa.Config("misa-r", top_k=96, heads=HEADS),
    "hisa": misa.Config("hisa", top_k=96, filter_block=64, filter_blocks=4),
    "hisa-routed": misa.Config(
        "hisa", top_k=96, filter_block=64, filter_blocks=5, router="dispersion", heads=3,
        candidates=150,
    ),
    "hisa-all": misa.Config(
        "hisa", top_k=96, filter_block=64, filter_blocks=5, router="pooled", heads=HEADS,
        candidates=150, residual=True,
    ),
    "pooled-residual": misa.Config("misa", top_k=96, heads=3, block=64, residual=True),
    "self-residual": misa.Config("misa", top_k=96, heads=3, router="self", residual=True),
    "qnorm": misa.Config("misa", top_k=96, heads=3, router="qnorm"),
    "weight": misa.Config("misa", top_k=96, heads=3, router="weight"),
    "static": misa.Config(
        "misa", top_k=96, heads=2, router="static", static_heads=(5, 1), residual=True
    ),
    "auto": misa.Config("auto", top_k=64, dense_work=HEADS * 130),
    "wide": misa.Config("dsa", top_k=3000),
}  # fmt: skip

SCORED_BY_ALL_HEADS = ("dsa", "dsa-ordered", "misa-all", "misa-r-all", "wide")


class Arrays(NamedTuple):
    """Arguments of misa.select."""

    q: torch.Tensor
    w: torch.Tensor
    k: torch.Tensor
    ks: torch.Tensor
    ke: torch.Tensor
    k_scale: torch.Tensor | None


def spans(keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three sequences one after the other: decode, chunked prefill, short and empty rows, and
    queries that see nothing although ke < ks."""
    a, b = keys // 2, keys // 2 + 130
    rows = [(0, a), (0, a), (0, 1), (0, 64), (0, a - 1)]
    rows += [(a, e) for e in range(a, b + 1, 10)]
    rows += [(b, keys), (b, keys - 3), (b, b), (b, b + 7), (keys, 0), (keys, keys)]
    ks, ke = torch.tensor(rows, dtype=torch.int32).unbind(1)
    return ks.contiguous(), ke.contiguous()


def arrays(dtype: torch.dtype, kind: str, keys: int = 1500) -> Arrays:
    generator = torch.Generator().manual_seed(keys)
    ks, ke = spans(keys)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q, w, k = normal(len(ks), HEADS, DIM), normal(len(ks), HEADS), normal(keys, DIM)
    if kind == "ties":
        # Few distinct scores, all of them exact: ties everywhere.
        q, k, w = (q * 0.6).round(), (k * 0.6).round(), w.sign()
        k[::3] = k[0]
        k[1::5] = 0
    if kind == "not finite":
        k[17, 3], k[keys // 2 + 20, 0], k[keys - 2, 5] = torch.nan, torch.inf, -torch.inf
        w[3, 2], q[9, 1, 1] = torch.nan, torch.inf
    if kind == "few numbers":
        # Rows with fewer numbers than top_k, infinite ones among them: NaN is selected too.
        k[torch.arange(keys) % 9 > 0] = torch.nan
        k[::27, 1] = torch.inf
    if kind == "one score":
        w.zero_()
    scale = None
    if dtype == torch.float8_e4m3fn:
        scale = torch.rand(keys, generator=generator) + 0.5
        if kind == "ties":
            scale = torch.ones(keys)
    return Arrays(q.to(dtype), w, k.to(dtype), ks, ke, scale)


CASES = {
    f"{name} {kind} {dtype}": (arrays(dtype, kind), config)
    for name, config in CONFIGS.items()
    for kind, dtype in (
        ("normal", torch.float32),
        ("normal", torch.bfloat16),
        ("normal", torch.float8_e4m3fn),
        ("ties", torch.float32),
        ("ties", torch.float8_e4m3fn),
        ("not finite", torch.bfloat16),
        ("not finite", torch.float8_e4m3fn),
    )
}
CASES["dsa few numbers"] = arrays(torch.bfloat16, "few numbers"), CONFIGS["dsa"]
CASES["dsa one score"] = arrays(torch.float8_e4m3fn, "one score"), CONFIGS["dsa"]
CASES["sketch"] = (
    arrays(torch.float8_e4m3fn, "normal"),
    misa.Config("misa-r", top_k=96, heads=2, candidates=200, sketch=2),
)
CASES["no keys"] = (
    Arrays(*arrays(torch.float32, "normal")[:2], torch.zeros(0, DIM),
           *torch.zeros(2, len(spans(1500)[0]), dtype=torch.int32), None),
    CONFIGS["misa-r"],
)  # fmt: skip
NO_QUERIES = Arrays(*(each[:0] if i != 2 else each for i, each in
                      enumerate(arrays(torch.float32, "normal")[:5])), None)  # fmt: skip
CASES["no queries"] = NO_QUERIES, CONFIGS["misa"]
CASES["dsa no queries"] = NO_QUERIES, CONFIGS["dsa-ordered"]

Layout = Callable[[int, int], list[torch.Tensor]]
"""From the numbers of keys and ranks, the positions of each rank's keys."""


def lengths(*wanted: int) -> Layout:
    """So many keys for each rank, one rank after the other; what is left for the last one."""

    def layout(keys: int, ranks: int) -> list[torch.Tensor]:
        ends = [min(sum(wanted[: i + 1]), keys) for i in range(ranks - 1)]
        return list(torch.arange(keys).tensor_split(ends))

    return layout


def stripes(width: int) -> Layout:
    """Stripes of so many keys, to one rank after the other."""

    def layout(keys: int, ranks: int) -> list[torch.Tensor]:
        owner = torch.arange(keys) // width % ranks
        return [(owner == rank).nonzero()[:, 0] for rank in range(ranks)]

    return layout


def zigzag(keys: int, ranks: int) -> list[torch.Tensor]:
    """A chunk from each end for every rank."""
    chunks = torch.arange(keys).tensor_split(2 * ranks)
    return [torch.cat([chunks[rank], chunks[-1 - rank]]) for rank in range(ranks)]


def ends_of_stripes(keys: int, ranks: int) -> list[torch.Tensor]:
    """Stripes for the first and the last rank, nothing for the others."""
    first, last = stripes(7)(keys, 2)
    return [first, *[first[:0]] * (ranks - 2), last]


def descending(keys: int, ranks: int) -> list[torch.Tensor]:
    """Keys of a rank that do not ascend."""
    return [part.flip(0) for part in torch.arange(keys).tensor_split(ranks)]


# By the number of ranks.
LAYOUTS: dict[int, dict[str, Layout]] = {
    1: {"one": lengths()},
    2: {
        "uneven": lengths(701), "empty": lengths(0), "stripes of a key": stripes(1),
        "descending": descending,
    },
    3: {"empty": lengths(0, 1499), "zigzag": zigzag, "stripes": ends_of_stripes},
    4: {"even": lengths(375, 375, 375), "empty": lengths(640, 0, 77), "stripes": stripes(48)},
}  # fmt: skip


def shard(case: Arrays, layout: Layout, ranks: int, rank: int) -> dict[str, Any]:
    """Arguments of a rank, with shards."""
    parts = layout(len(case.k), ranks)
    mine = parts[rank].to(case.k.device)
    return {
        "q": case.q, "w": case.w, "ks": case.ks, "ke": case.ke,
        "k_local": case.k.view(torch.uint8)[mine].view(case.k.dtype),
        "k_scale": None if case.k_scale is None else case.k_scale[mine],
        "shards": misa.distributed.Shards(
            [len(part) for part in parts], torch.cat(parts).to(case.k.device)
        ),
    }  # fmt: skip


def join(store: Path, ranks: int, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
    )


@contextmanager
def split_by(what: str) -> Iterator[None]:
    """Splits the work by keys wherever that is possible, or nowhere."""
    own = misa.distributed._PART_OF_KEYS
    misa.distributed._PART_OF_KEYS = {"keys": 1e9, "queries": -1}[what]
    yield
    misa.distributed._PART_OF_KEYS = own


def run_cases(store: Path, ranks: int, rank: int) -> None:
    """Every case on one rank; results go to a file beside `store`."""
    join(store, ranks, rank)
    results = {}
    wanted = {"scores": True, "heads": True, "residual": True, "threads": 1}
    for which, layout in LAYOUTS[ranks].items():
        for name, (case, config) in CASES.items():
            given = shard(case, layout, ranks, rank) | {"config": config} | wanted
            shards = given["shards"]
            with split_by("queries"):
                results[name, which] = misa.distributed.select(**given)._asdict()
            if shards.rows is None:
                given["shards"] = None
                results[name, f"{which}, agreed on"] = misa.distributed.select(**given)._asdict()
            if name.split()[0] in SCORED_BY_ALL_HEADS:
                given |= {"shards": shards, "heads": False, "residual": False}
                with split_by("keys"):
                    by_keys = misa.distributed.splits_keys(case.q, config, shards)
                    assert by_keys == (which != "descending")
                    results[name, f"{which}, keys"] = misa.distributed.select(**given)._asdict()
    torch.save(results, f"{store}.{rank}")
    torch.distributed.destroy_process_group()


def on_ranks(target: Any, store: Path, ranks: int) -> None:
    """Runs target(store, ranks, rank) in a process a rank; AssertionError if one fails or hangs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "misa"])
    processes = [context.Process(target=target, args=(store, ranks, i)) for i in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * ranks


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Equality, of NaN too; two that are missing are equal."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.nan_to_num(nan=7e37), other.nan_to_num(nan=7e37))


def by_position(found: misa.Selected) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of each row ascending, -1 first, and their scores, NaN as one bit pattern."""
    indices, order = found.indices.sort(dim=1)
    return indices, found.scores.gather(1, order).nan_to_num(nan=7e37).view(torch.int32)


@pytest.fixture(scope="module")
def expected() -> dict[str, misa.Selected]:
    results = {}
    for name, (case, config) in CASES.items():
        routed = config.router != "all"
        results[name] = misa.select(
            **case._asdict(), config=config, scores=True, heads=routed, residual=config.residual
        )
    return results


@pytest.mark.parametrize("ranks", list(LAYOUTS))
def test_equals_one_rank(tmp_path: Path, ranks: int, expected: dict[str, misa.Selected]) -> None:
    store = tmp_path / "store"
    on_ranks(run_cases, store, ranks)
    everyone = [torch.load(f"{store}.{rank}") for rank in range(ranks)]
    assert len(everyone[0]) >= len(CASES) * len(LAYOUTS[ranks])
    for (name, layout), mine in everyone[0].items():
        what = f"{name}, {layout}"
        for other in everyone[1:]:
            for field, value in other[name, layout].items():
                assert same(value, mine[field]), f"{what}: {field} on another rank"
        found, one, (_, config) = misa.Selected(**mine), expected[name], CASES[name]
        if not layout.endswith("keys"):
            assert same(found.heads, one.heads), what
            assert same(found.residual, one.residual), what
        for mine_, ones in zip(by_position(found), by_position(one), strict=True):
            assert torch.equal(mine_, ones), what
        if config.ordered:
            assert torch.equal(found.indices, one.indices), what


def on_meta(names: tuple[str, ...], given: dict[str, Any]) -> None:
    given.update({name: given[name].to("meta") for name in names})


TENSORS = ("q", "w", "k_local", "ks", "ke")
BROKEN = {
    "k_local: expected": lambda given: given.update(k_local=given["k_local"][:, :32]),
    "w: expected": lambda given: given.update(w=given["w"][:, 1:]),
    "ke: expected int32": lambda given: given.update(ke=given["ke"].long()),
    "ks: expected a torch.Tensor": lambda given: given.update(ks=None),
    "q: expected .T, H, D., got 2 dimensions": lambda given: given.update(q=given["q"][0]),
    **{
        f"{name}: expected a tensor on cpu .*, got one on meta": partial(on_meta, (name,))
        for name in TENSORS[1:]
    },
    "q: expected a CPU or CUDA tensor, got one on meta": partial(on_meta, TENSORS),
}
OWN = [name for name in BROKEN if not name.startswith("q:")]  # not of what all ranks share


class Unlucky(RuntimeError):
    """What goes wrong in the middle of a step."""


def run_broken(store: Path, ranks: int, rank: int) -> None:
    join(store, ranks, rank)
    break_on_ranks(ranks, rank, misa.Config("misa-r", top_k=96, heads=2, ordered=True))
    with split_by("keys"):
        break_on_ranks(ranks, rank, misa.Config("dsa", top_k=96, ordered=True))
    torch.distributed.destroy_process_group()


def break_on_ranks(ranks: int, rank: int, config: misa.Config) -> None:
    """Errors on the last rank alone, and errors that every rank sees; a correct call ends each."""
    case, _ = CASES[f"misa-r normal {torch.float32}"]
    known = shard(case, lengths(*[500] * (ranks - 1)), ranks, rank) | {"config": config}
    agreed = known | {"shards": None}
    last = rank == ranks - 1
    expected = misa.distributed.select(**known).indices
    broken = [(agreed, message) for message in BROKEN] + [(known, message) for message in OWN]
    for good, message in broken:
        given = dict(good)
        if last:
            BROKEN[message](given)
        with pytest.raises(
            ValueError if last else RuntimeError,
            match=message if last else f"rank {ranks - 1}: ValueError",
        ):
            misa.distributed.select(**given)
        assert torch.equal(misa.distributed.select(**good).indices, expected)

    own = misa.distributed.select_into

    def unlucky(*_: Any) -> None:
        raise Unlucky

    for good in known, agreed:
        if last:
            misa.distributed.select_into = unlucky
        with pytest.raises(Unlucky if last else RuntimeError, match=f"^$|rank {ranks - 1}: Unlu"):
            misa.distributed.select(**good)
        # Without a check, this rank alone raises, and nothing is selected for its queries, or for
        # any that its keys might be selected for.
        unchecked = {"check": False, "scores": True}
        if last:
            with pytest.raises(Unlucky):
                misa.distributed.select(**good, **unchecked)
        else:
            found = misa.distributed.select(**good, **unchecked)
            theirs = torch.arange(len(expected)) % ranks == ranks - 1
            theirs |= torch.tensor(config.router == "all")
            assert torch.equal(found.indices[~theirs], expected[~theirs])
            assert (found.indices[theirs] == -1).all()
            assert found.scores[theirs].isnan().all()
        misa.distributed.select_into = own
        assert torch.equal(misa.distributed.select(**good, check=False).indices, expected)

    # What every rank sees.
    for change in ({"config": misa.Config("hisa")}, {"q": case.q[:-1]}, {"q": case.q.bfloat16()}):
        given = agreed | (change if last else {})
        if "q" in change and last:
            given |= {name: given[name][: len(change["q"])] for name in ("w", "ks", "ke")}
        with pytest.raises(ValueError, match=rf"config.*the same.*on ranks \[{ranks - 1}\]"):
            misa.distributed.select(**given)
    for name, end in (("ke", 1501), ("ks", -1)):
        given = known | {name: torch.full_like(case.ke, end)}
        with pytest.raises(ValueError, match=rf"{name}\[0\]: expected .*1500, got {end}"):
            misa.distributed.select(**given)
    for change, message in (
        ({"shards": misa.distributed.Shards([1500])}, f"shards: expected those of {ranks} ranks"),
        ({"shards": misa.distributed.Shards([0] * (ranks - 1) + [1500])}, "k_local: expected"),
        ({"config": misa.Config("misa", heads=HEADS + 1)}, "heads: expected 1 to H"),
    ):
        with pytest.raises(ValueError, match=message):
            misa.distributed.select(**known | change)
    assert torch.equal(misa.distributed.select(**known).indices, expected)


@pytest.mark.parametrize("ranks", [2, 3])
def test_error_on_one_rank_is_one_on_all(tmp_path: Path, ranks: int) -> None:
    on_ranks(run_broken, tmp_path / "store", ranks)


def run_group(store: Path, ranks: int, rank: int) -> None:
    """A group that leaves rank 0 out, with optional outputs not asked for."""
    join(store, ranks, rank)
    group = torch.distributed.new_group(list(range(1, ranks)))
    if rank > 0:
        case, config = CASES[f"misa normal {torch.float32}"]
        given = shard(case, lengths(600), 2, rank - 1) | {"config": config, "group": group}
        found = misa.distributed.select(**given)
        assert (found.scores, found.heads, found.residual) == (None, None, None)
        torch.save(found.indices, f"{store}.{rank}")
    torch.distributed.destroy_process_group()


def test_group(tmp_path: Path, expected: dict[str, misa.Selected]) -> None:
    store = tmp_path / "store"
    on_ranks(run_group, store, 3)
    one = expected[f"misa normal {torch.float32}"].indices.sort(dim=1).values
    for rank in (1, 2):
        assert torch.equal(torch.load(f"{store}.{rank}").sort(dim=1).values, one)


def run_on_devices(store: Path, ranks: int, rank: int) -> None:
    """Every case on CUDA devices; then a captured call, and a rank that fails."""
    torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{store}", rank=rank, world_size=ranks,
        device_id=torch.device("cuda", rank),
    )  # fmt: skip
    wanted = {"scores": True, "heads": True, "residual": True}
    for name, (case, config) in CASES.items():
        there = Arrays(*(each if each is None else each.cuda() for each in case))
        one = misa.select(**there._asdict(), config=config, **wanted)
        for which, layout in LAYOUTS[ranks].items():
            given = shard(there, layout, ranks, rank) | {"config": config} | wanted
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            found = misa.distributed.select(**given, check=False)
            torch.cuda.set_sync_debug_mode("default")
            checks = [found, misa.distributed.select(**given)]
            if given["shards"].rows is None:
                checks.append(misa.distributed.select(**given | {"shards": None}))
            what = f"{name}, {which}"
            for found in checks:
                assert same(found.heads, one.heads), what
                assert same(found.residual, one.residual), what
            if name.split()[0] in SCORED_BY_ALL_HEADS:
                given |= {"heads": False, "residual": False}
                for way in "keys", "queries":
                    with split_by(way):
                        torch.cuda.set_sync_debug_mode("error")
                        checks.append(misa.distributed.select(**given, check=False))
                        torch.cuda.set_sync_debug_mode("default")
            for found in checks:
                for mine, ones in zip(by_position(found), by_position(one), strict=True):
                    assert torch.equal(mine, ones), what

    case, _ = CASES[f"misa-r-dagger normal {torch.float8_e4m3fn}"]
    there = Arrays(*(each if each is None else each.cuda() for each in case))
    for config in CONFIGS["misa-r-dagger"], CONFIGS["dsa-ordered"]:
        with split_by("keys"):
            capture_and_break(there, ranks, rank, config)
    torch.distributed.destroy_process_group()


def capture_and_break(there: Arrays, ranks: int, rank: int, config: misa.Config) -> None:
    """Ends out of range, a captured call, and a rank that fails."""
    beyond = there._replace(
        ks=torch.full_like(there.ks, -(2**31)), ke=torch.full_like(there.ke, 2**31 - 1)
    )
    one = misa.select(**beyond._asdict(), config=config).indices
    for layout in LAYOUTS[ranks].values():
        given = shard(beyond, layout, ranks, rank) | {"config": config}
        assert torch.equal(misa.distributed.select(**given).indices, one)

    one = misa.select(**there._asdict(), config=config).indices
    given = shard(there, lengths(701), ranks, rank) | {"config": config}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = misa.distributed.select(**given)
    found.indices.zero_()
    graph.replay()
    assert torch.equal(found.indices, one)

    def unlucky(*_: Any) -> None:
        raise Unlucky

    own, last = misa.distributed.select_into, rank == ranks - 1
    for shards in given["shards"], None:
        if last:
            misa.distributed.select_into = unlucky
        with pytest.raises(Unlucky if last else RuntimeError, match=f"^$|rank {ranks - 1}: Unlu"):
            misa.distributed.select(**given | {"shards": shards})
        misa.distributed.select_into = own
        found = misa.distributed.select(**given | {"shards": shards})
        assert torch.equal(found.indices, one)


@pytest.mark.skipif(
    torch.cuda.device_count() < 2
    or not torch.distributed.is_nccl_available()
    or not hasattr(misa._core, "DevicePlan"),
    reason="no two CUDA devices with NCCL, or a build without CUDA backends",
)
def test_equals_one_device(tmp_path: Path) -> None:
    on_ranks(run_on_devices, tmp_path / "store", 2)


@pytest.mark.parametrize(
    ("lengths", "positions", "message"),
    [
        ([], None, "lengths: expected one of 0 or more a rank"),
        ([3, -1], None, "lengths: expected one of 0 or more a rank"),
        ([2**30, 2**30], None, "lengths: expected a sum below"),
        ([2, 1], [0, 1, 2], "positions: expected a torch.Tensor, got list"),
        ([2, 1], torch.tensor([0, 2]), r"positions: expected integers \[3\], got torch.int64"),
        ([2, 1], torch.tensor([0.0, 2, 1]), r"positions: expected integers \[3\], got .*float32"),
        ([2, 1], torch.tensor([0, 2, 2]), "positions: expected each of 0 to 2 once"),
        ([2, 1], torch.tensor([0, 3, 1]), "positions: expected each of 0 to 2 once"),
    ],
)
def test_wrong_shards(lengths: list[int], positions: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        misa.distributed.Shards(lengths, positions)


@pytest.mark.parametrize(
    ("by_keys", "tokens", "config", "outputs", "layout"),
    [(True, 128, misa.Config("dsa"), (), lengths(1 << 17)),
     (False, 129, misa.Config("dsa"), (), lengths(1 << 17)),
     (True, 128, misa.Config("dsa"), (), lengths(1 << 18)),
     (True, 128, misa.Config("dsa"), (), zigzag),
     (False, 1, misa.Config("dsa"), (), descending),
     (True, 1, misa.Config("dsa"), ("heads", "residual"), stripes(1)),
     (True, 1, misa.Config("misa", heads=64), (), stripes(1)),
     (False, 1, misa.Config("misa", heads=64), ("heads",), stripes(1)),
     (False, 1, misa.Config("misa-r", heads=64), ("residual",), stripes(1)),
     (False, 1, misa.Config("misa"), (), stripes(1)),
     (False, 1, misa.Config("misa-r", heads=0), (), stripes(1)),
     (False, 1, misa.Config("dsa", candidates=4096, sketch=2), (), stripes(1)),
     (False, 1, misa.Config("hisa"), (), stripes(1)),
     (False, 1, misa.Config("hisa", router="pooled", heads=64), (), stripes(1))],
)  # fmt: skip
def test_how_the_work_is_split(
    by_keys: bool, tokens: int, config: misa.Config, outputs: tuple[str, ...], layout: Layout
) -> None:
    """By keys where that is exact and few bytes are selected: 128 rows of 2048 positions, 8 bytes
    each, are a quarter of 2^17 keys of 64 bytes."""
    parts = layout(1 << 18, 2)
    shards = misa.distributed.Shards([len(part) for part in parts], torch.cat(parts).int())
    q = torch.empty(tokens, 64, 64, dtype=torch.float8_e4m3fn)
    wanted = dict.fromkeys(outputs, True)
    assert misa.distributed.splits_keys(q, config, shards, **wanted) == by_keys


@pytest.mark.parametrize(
    ("layout", "keys", "unit"),
    [(stripes(64), 1280, 64), (stripes(64), 1290, 64), (stripes(16), 999, 16), (stripes(6), 999, 1),
     (zigzag, 64 * 4 * 5, 64), (zigzag, 16 * 4 * 5, 16), (stripes(1), 999, 1)],
)  # fmt: skip
def test_units_of_shards(layout: Layout, keys: int, unit: int) -> None:
    """Keys are moved in the longest runs that the layout allows."""
    parts = layout(keys, 2)
    shards = misa.distributed.Shards([len(part) for part in parts], torch.cat(parts).int())
    assert shards.unit == unit
    sent = torch.full((2, shards.padded), -1)
    for into, part in zip(sent, parts, strict=True):
        into[: len(part)] = part
    moved = sent.view(-1, unit)[shards.rows].flatten()[:keys]
    assert torch.equal(moved, torch.arange(keys))
