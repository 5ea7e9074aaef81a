# SPDX-License-Identifier: Apache-2.0
"""Selection over sharded keys against the same selection on one rank."""

from __future__ import annotations

import multiprocessing
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
CASES["no keys"] = (
    Arrays(*arrays(torch.float32, "normal")[:2], torch.zeros(0, DIM),
           *torch.zeros(2, len(spans(1500)[0]), dtype=torch.int32), None),
    CONFIGS["misa-r"],
)  # fmt: skip
CASES["no queries"] = (
    Arrays(*(each[:0] if i != 2 else each for i, each in
             enumerate(arrays(torch.float32, "normal")[:5])), None),
    CONFIGS["misa"],
)  # fmt: skip

# Keys of each rank, by the number of ranks; what is left is the last one's.
SHARDS = {
    1: [[0]],
    2: [[701], [0]],
    3: [[0, 1499], [500, 3]],
    4: [[375, 375, 375], [640, 0, 77]],
}


def shard(case: Arrays, lengths: list[int], rank: int) -> dict[str, Any]:
    begin = min(sum(lengths[:rank]), len(case.k))
    end = len(case.k) if rank >= len(lengths) else begin + lengths[rank]
    scale = None if case.k_scale is None else case.k_scale[begin:end]
    return {
        "q": case.q, "w": case.w, "k_local": case.k[begin:end], "ks": case.ks, "ke": case.ke,
        "k_scale": scale,
    }  # fmt: skip


def join(store: Path, ranks: int, rank: int) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks
    )


def run_cases(store: Path, ranks: int, rank: int) -> None:
    """Every case on one rank; results go to a file beside `store`."""
    join(store, ranks, rank)
    if ranks == 3:
        misa.distributed._CHUNK_BYTES = 1 << 20  # queries take several steps
    results = {}
    for lengths in SHARDS[ranks]:
        for name, (case, config) in CASES.items():
            found = misa.distributed.select(
                **shard(case, lengths if ranks > 1 else [], rank),
                config=config, scores=True, heads=True, residual=True, threads=1,
            )  # fmt: skip
            results[name, tuple(lengths)] = found._asdict()
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


def rows_of_equal_heads(case: Arrays, config: misa.Config, one: Any, other: Any) -> torch.Tensor:
    """Queries [T] whose heads agree; asserts that others are pooled ones that nearly tie.

    The energy of a head is off by gamma_(B + D + M + 3) of its sum of magnitudes, for B keys of a
    mean, D products, M blocks and the roundings of the division, the weight and the key's scale.
    """
    equal = (one == other).all(1)
    for t in (~equal).nonzero()[:, 0].tolist():
        assert config.router == "pooled"
        k = case.k[case.ks[t] : case.ke[t]].double()
        if case.k_scale is not None:
            k *= case.k_scale[case.ks[t] : case.ke[t], None]
        q, w = case.q[t].double(), case.w[t].double().abs()
        blocks = k.split(config.block)
        means = torch.stack([block.mean(0) for block in blocks])
        sizes = torch.stack([block.abs().mean(0) for block in blocks])
        energy = (w * (means @ q.T).relu()).sum(0)
        gamma = (config.block + DIM + len(blocks) + 3) * 2**-24
        error = gamma * (w * (sizes @ q.T.abs())).sum(0).max()
        last = energy.topk(config.heads).values[-1]
        differing = set(one[t].tolist()) ^ set(other[t].tolist())
        assert ((energy[list(differing)] - last).abs() <= 2 * error).all()
    return equal


def same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    """Equality, of NaN too; two that are missing are equal."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.nan_to_num(nan=7e37), other.nan_to_num(nan=7e37))


def by_position(found: misa.Selected) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of each row ascending, -1 first, and their scores, NaN as one bit pattern."""
    indices, order = found.indices.sort(dim=1)
    return indices, found.scores.gather(1, order).nan_to_num(nan=7e37).view(torch.int32)


def rounding(case: Arrays, found: misa.Selected) -> torch.Tensor:
    """How far two scores of a query may lie apart, [T]: twice gamma_(D + R + 2) of the sum of
    magnitudes, at most |w| |q| |k| and |residual| |k| in norms; R rows, three of them residual."""
    length = case.k.float().nan_to_num(posinf=0, neginf=0).norm(dim=1).max()
    size = (case.w.abs() * case.q.float().norm(dim=2)).sum(1) + found.residual.norm(dim=1)
    return 2 * (DIM + HEADS + 3 + 2) * 2**-24 * (size * length).nan_to_num()


@pytest.fixture(scope="module")
def expected() -> dict[str, misa.Selected]:
    results = {}
    for name, (case, config) in CASES.items():
        routed = config.router != "all"
        results[name] = misa.select(
            **case._asdict(), config=config, scores=True, heads=routed, residual=config.residual
        )
    return results


@pytest.mark.parametrize("ranks", list(SHARDS))
def test_equals_one_rank(tmp_path: Path, ranks: int, expected: dict[str, misa.Selected]) -> None:
    store = tmp_path / "store"
    on_ranks(run_cases, store, ranks)
    everyone = [torch.load(f"{store}.{rank}") for rank in range(ranks)]
    assert len(everyone[0]) == len(CASES) * len(SHARDS[ranks])
    for (name, lengths), mine in everyone[0].items():
        for other in everyone[1:]:
            for field, value in other[name, lengths].items():
                assert same(value, mine[field]), f"{name}, {lengths}: {field} on another rank"
        found, one, (case, config) = misa.Selected(**mine), expected[name], CASES[name]
        rows = slice(None)
        if one.heads is None:
            assert found.heads is None
        else:
            rows = rows_of_equal_heads(case, config, found.heads, one.heads)
        if one.residual is None:
            assert found.residual is None
        else:
            assert torch.equal(found.residual[rows].nan_to_num(), one.residual[rows].nan_to_num())
        if case.q.dtype == torch.bfloat16 and config.residual:
            # Some instruction sets add the residual row as one of float32 (docs/numerics.md).
            error = rounding(case, one)[rows, None]
            values = [each.scores.nan_to_num(-3e38).sort(1).values[rows] for each in (found, one)]
            assert ((values[0] == values[1]) | ((values[0] - values[1]).abs() <= error)).all()
            continue
        for mine_, ones in zip(by_position(found), by_position(one), strict=True):
            assert torch.equal(mine_[rows], ones[rows]), f"{name}, {lengths}"
        if config.ordered:
            assert torch.equal(found.indices[rows], one.indices[rows]), f"{name}, {lengths}"


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
        for name in TENSORS
    },
    "q: expected a CPU or CUDA tensor, got one on meta": partial(on_meta, TENSORS),
    "heads: expected 1 to H": lambda given: given.update(
        config=misa.Config("misa", top_k=96, heads=HEADS + 1)
    ),
}


class Unlucky(RuntimeError):
    """What goes wrong in the middle of a step."""


def run_broken(store: Path, ranks: int, rank: int) -> None:
    """Errors on the last rank alone, and errors that every rank sees; a correct call ends each."""
    join(store, ranks, rank)
    case, config = CASES[f"misa-r normal {torch.float32}"]
    good = shard(case, [500] * (ranks - 1), rank) | {"config": config}
    expected = misa.distributed.select(**good).indices
    own = misa.select
    for message, change in BROKEN.items():
        given = dict(good)
        if rank == ranks - 1:
            change(given)
            with pytest.raises(ValueError, match=message):
                misa.distributed.select(**given)
        else:
            with pytest.raises(RuntimeError, match=f"rank {ranks - 1}: ValueError"):
                misa.distributed.select(**given)
        assert torch.equal(misa.distributed.select(**good).indices, expected)

    # The first call of misa.select checks, the second routes, the third scores.
    for failing in (2, 3):
        calls = 0

        def select(*arguments: Any, failing: int = failing, **options: Any) -> misa.Selected:
            nonlocal calls
            calls += 1
            if calls == failing:
                raise Unlucky
            return own(*arguments, **options)

        if rank == ranks - 1:
            misa.select = select
        with pytest.raises(Unlucky if rank == ranks - 1 else RuntimeError, match="Unlucky|^$"):
            misa.distributed.select(**good)
        misa.select = own
        assert torch.equal(misa.distributed.select(**good).indices, expected)

    for name, value in (("ke", case.ke.clamp(max=100)), ("config", misa.Config("dsa"))):
        with pytest.raises(ValueError, match=rf"{name}.*the same.*on ranks \[{ranks - 1}\]"):
            misa.distributed.select(**good | ({name: value} if rank == ranks - 1 else {}))
    quantised, _ = CASES[f"misa-r normal {torch.float8_e4m3fn}"]
    sketched = misa.Config("misa-r", top_k=96, heads=2, candidates=200, sketch=2)
    with pytest.raises(
        RuntimeError, match=r"sketch: expected 0 \(none\) in misa.distributed, got 2"
    ):
        misa.distributed.select(**shard(quantised, [500] * (ranks - 1), rank), config=sketched)
    with pytest.raises(ValueError, match=r"ke\[0\]: expected 0 to L = 1500, got 1501"):
        misa.distributed.select(**good | {"ke": case.ke.clone().fill_(1501)})
    assert torch.equal(misa.distributed.select(**good).indices, expected)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 3])
def test_error_on_one_rank_is_one_on_all(tmp_path: Path, ranks: int) -> None:
    on_ranks(run_broken, tmp_path / "store", ranks)


def run_group(store: Path, ranks: int, rank: int) -> None:
    """A group that leaves rank 0 out, with optional outputs not asked for."""
    join(store, ranks, rank)
    group = torch.distributed.new_group(list(range(1, ranks)))
    if rank > 0:
        case, config = CASES[f"misa normal {torch.float32}"]
        found = misa.distributed.select(**shard(case, [600], rank - 1), config=config, group=group)
        assert (found.scores, found.heads, found.residual) == (None, None, None)
        torch.save(found.indices, f"{store}.{rank}")
    torch.distributed.destroy_process_group()


def test_group(tmp_path: Path, expected: dict[str, misa.Selected]) -> None:
    store = tmp_path / "store"
    on_ranks(run_group, store, 3)
    one = expected[f"misa normal {torch.float32}"].indices.sort(dim=1).values
    for rank in (1, 2):
        assert torch.equal(torch.load(f"{store}.{rank}").sort(dim=1).values, one)
