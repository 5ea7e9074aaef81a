# SPDX-License-Identifier: Apache-2.0
"""misa.compare, by itself and beside the program's `misa compare`."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import misa
from inputs import PACK, program, random_inputs, trace_inputs

FIELDS = [field.name for field in dataclasses.fields(misa.Config)]


def test_compare() -> None:
    inputs = random_inputs([*PACK, (301, 317), (301, 318)])  # 16 keys are a short row, 17 are not
    configs = [misa.Config("dsa", top_k=16), misa.Config("misa", top_k=16, heads=1)]
    dense, routed = misa.compare(**inputs.arguments(), configs=configs,
                                 baseline=misa.Config("dsa", top_k=16), scores=True)  # fmt: skip
    assert dense["recall_mean"] == dense["recall_min"] == dense["score_mass"] == 1
    for result, config in zip((dense, routed), configs, strict=True):
        assert misa.Config(**{n: result[n] for n in FIELDS}) == config
    want = misa.select(**inputs.arguments(), config=configs[0], scores=True)
    got = misa.select(**inputs.arguments(), config=configs[1])
    shares, kept, total = [], 0.0, 0.0
    for t in (0, 1, 2, 5):
        found = np.isin(want.indices[t], got.indices[t])
        shares.append(found.mean())
        kept += want.scores[t][found].sum(dtype=np.float64)
        total += want.scores[t].sum(dtype=np.float64)
    assert dense["rows"] == routed["rows"] == len(shares)
    assert routed["recall_mean"] == pytest.approx(np.mean(shares), rel=1e-12)
    assert routed["recall_min"] == min(shares) < 1
    assert routed["score_mass"] == pytest.approx(kept / total, rel=1e-6)  # float32 additions


def test_compare_of_short_rows_has_no_figures() -> None:
    config = misa.Config("misa", top_k=301, heads=1)
    (result,) = misa.compare(**random_inputs(PACK).arguments(), configs=[config], scores=True,
                             baseline=misa.Config("dsa", top_k=301))  # fmt: skip
    assert result["rows"] == 0
    assert all(np.isnan(result[name]) for name in ("recall_mean", "recall_min", "score_mass"))


def test_compare_refuses_another_top_k() -> None:
    configs = [misa.Config("misa", top_k=16, heads=1), misa.Config("misa", top_k=8, heads=1)]
    with pytest.raises(ValueError, match=r"^configs\[1\].top_k: expected 16, .*, got 8$"):
        misa.compare(**random_inputs(PACK).arguments(), configs=configs, baseline=configs[0])


# Of these 40 queries the first 20 see no more keys than are wanted.
TRACE = ["--queries", "40", "--keys", "200", "--heads", "8", "--dim", "64", "--dtype", "F32"]
TOP_K = 180


def test_compare_is_what_the_program_prints(tmp_path: Path) -> None:
    path = tmp_path / "trace.safetensors"
    subprocess.run([program(), "synth", "-o", path, *TRACE], check=True, capture_output=True)
    indexers = ["dsa", "misa:h=1", "misa:h=2:router=self", "misa-r:h=2:m=190"]
    call = [program(), "compare", path, "--top-k", str(TOP_K), "--runs", "1", "--json",
            "--indexers", ",".join(indexers)]  # fmt: skip
    printed = json.loads(subprocess.run(call, check=True, capture_output=True).stdout)
    (trace,) = printed["traces"]
    configs = [
        misa.Config("dsa", top_k=TOP_K),
        misa.Config("misa", top_k=TOP_K, heads=1),
        misa.Config("misa", top_k=TOP_K, heads=2, router="self"),
        misa.Config("misa-r", top_k=TOP_K, heads=2, candidates=190),
    ]
    results = misa.compare(
        **trace_inputs(path, 40).arguments(), configs=configs, baseline=configs[0]
    )
    assert trace["long_rows"] == 20
    assert [entry["name"] for entry in trace["indexers"]] == indexers
    for entry, result in zip(trace["indexers"], results, strict=True):
        assert result["rows"] == trace["long_rows"]
        assert result["recall_mean"] == pytest.approx(entry["recall"]["mean"], rel=1e-12)
        assert result["recall_min"] == entry["recall"]["min"]
        settings = {name: result[name] for name in FIELDS if name != "indexer"}
        settings["static_heads"] = list(settings["static_heads"])
        assert entry["settings"] == settings
    assert results[0]["recall_mean"] == 1 > results[1]["recall_mean"]
