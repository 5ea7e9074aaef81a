# SPDX-License-Identifier: Apache-2.0
"""The command misa-bench-peers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

import misa
from inputs import program

torch = pytest.importorskip("torch")

from misa import _bench_peers as peers  # noqa: E402

SHAPE = ["--queries", "3", "--heads", "8", "--keys", "300", "--top-k", "16", "--rounds", "2"]
GGML = importlib.util.find_spec("llama_cpp") is not None


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_torch_selects_what_dsa_does() -> None:
    """Small integers, whose scores are exact: of tied ones either may be selected."""
    torch.manual_seed(0)
    q, k = (torch.randint(-3, 4, shape).float() for shape in ((3, 8, 128), (5000, 128)))
    w = torch.tensor([0.5, -0.25, 1.0])[:, None].expand(3, 8).contiguous()
    own = misa.select(
        q, w, k, torch.zeros(3, dtype=torch.int32), torch.full((3,), 5000, dtype=torch.int32),
        config=misa.Config("dsa", top_k=64), scores=True,
    )  # fmt: skip
    scores = torch.einsum("th,thl->tl", w, (q @ k.T).relu())
    theirs = scores.gather(1, peers.torch_step(q, w, k, 64)())
    assert torch.equal(theirs, own.scores.sort(descending=True).values)


def test_every_contender_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    call = [*SHAPE, "--misa", program(), "--indexers", "dsa,misa:h=2"]
    peers.main([*call, "--json"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["queries"], result["keys"], result["top_k"]) == (3, 300, 16)
    names = {"torch", "DSA", "MISA 2"} | ({"ggml"} if GGML else set())
    assert result["seconds"].keys() == names
    assert all(len(times) == 2 and min(times) > 0 for times in result["seconds"].values())
    assert ("ggml was left out: llama-cpp-python is not installed" in printed.err) is not GGML

    peers.main(call)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("queries 3, heads 8, keys 300, top_k 16, ")
    assert {line.split("  ")[1] for line in lines[1:]} == names


def test_what_cannot_run_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong, message in (
        (["--keys", "0"], "--keys: expected 1 or more, K, M or G after it or not, got '0'"),
        (["--keys", "K"], "--keys: expected 1 or more"),
        (["--keys", "1.5K"], "--keys: expected 1 or more"),
        (["--top-k", "301"], "--top-k: expected at most --keys = 300, got 301"),
        (["--rounds", "100"], "--runs times --rounds: expected less than 100"),
    ):
        with pytest.raises(SystemExit) as exit:
            peers.main([*SHAPE, *wrong])
        assert exit.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        peers.main([*SHAPE, "--misa", program(), "--indexers", "best"])
    assert "--indexers: indexer: expected dsa, " in str(exit.value.code)
    monkeypatch.setattr(peers, "own_program", lambda: None)
    peers.main([*SHAPE, "--json", "--peers", "torch"])
    printed = capsys.readouterr()
    assert json.loads(printed.out)["seconds"].keys() == {"torch"}
    assert "misa was left out" in printed.err


def test_sizes_are_those_of_misa() -> None:
    assert [peers.size(text) for text in ("7", "64K", "2k", "1M", "1G")] == [
        7, 65536, 2048, 1 << 20, 1 << 30,
    ]  # fmt: skip


def test_a_busy_machine_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter([peers.Busy(0.02, None), peers.Busy(0.3, "very"), peers.Busy(0.1, "somewhat")])
    monkeypatch.setattr(peers, "misa_turn", lambda *_: ({"DSA": 1.0}, next(turns)))
    peers.main([*SHAPE, "--rounds", "3", "--json", "--peers", "--misa", "misa"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert (result["waited_for_processor"], result["warning"]) == (0.3, "very")
    assert printed.err == "misa-bench-peers: very\n"


def test_one_round_has_no_spread(capsys: pytest.CaptureFixture[str]) -> None:
    peers.main([*SHAPE, "--rounds", "1", "--peers", "torch", "--misa", ""])
    assert capsys.readouterr().out.endswith(" ± –\n")


def test_the_command_is_installed() -> None:
    scripts = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'misa-bench-peers = "{peers.__name__}:{peers.main.__name__}"' in scripts
