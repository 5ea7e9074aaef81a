# SPDX-License-Identifier: Apache-2.0
"""MISA_* variables and model configs."""

import logging
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from misa.integrations._counters import Counters
from misa.integrations._environment import Settings, has, read_settings


def test_nothing_set():
    assert read_settings(environment={}) is None
    assert read_settings(SimpleNamespace(index_topk=2048), {"MISA_HEADS": "4"}) is None
    assert read_settings(SimpleNamespace(use_misa=False, misa_topk_heads=4), {}) is None


def test_every_variable():
    settings = read_settings(
        environment={
            "MISA_INDEXER": "misa-r",
            "MISA_ROUTER": "static",
            "MISA_HEADS": "3",
            "MISA_BLOCK": "128",
            "MISA_RESIDUAL": "false",
            "MISA_FILTER_BLOCK": "64",
            "MISA_FILTER_BLOCKS": "32",
            "MISA_CANDIDATES": "4096",
            "MISA_SKETCH": "2",
            "MISA_DENSE_WORK": "1000",
            "MISA_ORDERED": "1",
            "MISA_STATIC_HEADS": "0,2, 5",
            "MISA_DECODE": "1",
        }
    )
    assert settings is not None and settings.decode
    config = settings.config(1024)
    assert (config.indexer, config.top_k, config.router) == ("misa-r", 1024, "static")
    assert (config.heads, config.block, config.residual) == (3, 128, False)
    assert (config.filter_block, config.filter_blocks) == (64, 32)
    assert (config.candidates, config.sketch) == (4096, 2)
    assert (config.dense_work, config.ordered) == (1000, True)
    assert tuple(config.static_heads) == (0, 2, 5)


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("MISA_INDEXER", "msia", "expected one of dsa, misa"),
        ("MISA_HEADS", "eight", "expected an integer, got 'eight'"),
        ("MISA_RESIDUAL", "yes", "expected 0 or 1, got 'yes'"),
        ("MISA_STATIC_HEADS", "1,,2", "expected integers separated by commas"),
        ("MISA_DECODE", "2", "expected 0 or 1, got '2'"),
        ("MISA_STRICT", "yes", "expected 0 or 1, got 'yes'"),
    ],
)
def test_bad_values_name_the_variable(variable, text, expected):
    with pytest.raises(ValueError, match=f"{variable}: {expected}"):
        read_settings(environment={"MISA_INDEXER": "misa", variable: text})


def test_a_model_names_the_indexer():
    model = SimpleNamespace(
        use_misa=True, misa_topk_heads=16, misa_k_block_size=512, misa_stage1_topk=0
    )
    one_stage = read_settings(model, {})
    assert one_stage == Settings("misa", (("heads", 16), ("block", 512)))
    model.misa_stage1_topk = 4096
    two_stages = read_settings(model, {})
    assert two_stages is not None
    config = two_stages.config(2048)
    assert (config.indexer, config.heads, config.candidates) == ("misa-dagger", 16, 4096)
    assert read_settings(SimpleNamespace(use_misa=True), {}) == Settings("misa")


def test_the_environment_overrides_the_model():
    model = SimpleNamespace(use_misa=True, misa_topk_heads=16, misa_k_block_size=512)
    fields = read_settings(model, {"MISA_HEADS": "4"})
    assert fields == Settings("misa", (("heads", 4), ("block", 512)))
    assert read_settings(model, {"MISA_INDEXER": "hisa"}) == Settings("hisa")


def test_an_indexer_must_fit_the_model():
    model = SimpleNamespace(index_topk=2048, index_n_heads=32, index_head_dim=128)
    fits = read_settings(environment={"MISA_INDEXER": "misa", "MISA_HEADS": "32"})
    assert fits is not None and fits.config_for(model).heads == 32
    for variable, value in (("MISA_CANDIDATES", "100"), ("MISA_HEADS", "33")):
        settings = read_settings(environment={"MISA_INDEXER": "misa", variable: value})
        assert settings is not None
        with pytest.raises(ValueError, match=variable.removeprefix("MISA_").lower()):
            settings.config_for(model)


@pytest.mark.parametrize(
    ("indexer", "fields", "expected"),
    [
        ("dsa", {}, True),
        ("misa", {}, False),
        ("misa-r", {}, False),
        ("auto", {}, False),
        ("hisa", {}, True),
        ("misa", {"MISA_HEADS": "64"}, True),
        ("misa-r", {"MISA_CANDIDATES": "4096", "MISA_SKETCH": "2"}, True),
        ("misa-r", {"MISA_CANDIDATES": "4096", "MISA_SKETCH": "2", "MISA_DECODE": "0"}, False),
        ("dsa", {"MISA_DECODE": "0"}, False),
        ("misa", {"MISA_DECODE": "1"}, True),
    ],
)
def test_what_decodes(indexer, fields, expected):
    """By default what reads less than all keys, and what selects the same as the engine."""
    settings = read_settings(environment={"MISA_INDEXER": indexer, **fields})
    assert settings is not None
    assert settings.decodes(settings.config(2048), 64) is expected


@pytest.mark.parametrize(("text", "strict"), [("0", False), ("1", True), (None, False)])
def test_strict(text, strict):
    environment = {"MISA_INDEXER": "dsa"} | ({} if text is None else {"MISA_STRICT": text})
    settings = read_settings(environment=environment)
    assert settings is not None and settings.strict is strict


def test_has():
    owner = SimpleNamespace(a=SimpleNamespace(b=None))
    assert has(owner, "a") and has(owner, "a.b")
    assert not has(owner, "b") and not has(owner, "a.c") and not has(owner, "a.b.c")


def test_counters_count_and_say_why_once(caplog):
    counters = Counters(logging.getLogger("misa.test"))
    with caplog.at_level(logging.INFO, "misa.test"):
        counters.add("misa_prefill", 7)
        for _ in range(2):
            counters.leave("decode", "a reason")
            counters.add("engine_decode", 3)
        counters.add("engine_decode", 1)
    assert counters.rows == {"misa_prefill": 7, "engine_decode": 7}
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["MISA: decode left to the engine's own operator: a reason"]
    counts = [record.message for record in caplog.records if record.levelname == "INFO"]
    assert counts[-1] == "MISA: rows so far: engine_decode 7, misa_prefill 7"


def test_captured_rows_count_by_what_is_on_the_device():
    counters = Counters(logging.getLogger("misa.test"))
    counters.prepare("cpu")
    counters.prepare("cpu")  # keeps the counts
    counters.add("misa_decode", 2)
    for _ in range(3):  # a replay does what the captured call did: an addition on the device
        counters.add("misa_decode", 8, capturing=True)
    assert counters.rows == {"misa_decode": 26}
