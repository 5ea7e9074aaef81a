# SPDX-License-Identifier: Apache-2.0
"""Models of Hugging Face transformers with this library's indexers, small and random."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", minversion="5.24")

import accelerate  # noqa: E402
from accelerate.hooks import (  # noqa: E402
    ModelHook,
    add_hook_to_module,
    remove_hook_from_module,
)
from models import (  # noqa: E402
    ARCHITECTURES,
    DIM,
    HEADS,
    TOP_K,
    build,
    indexers_of,
    tokens_of,
)
from safetensors.torch import load_file  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import misa  # noqa: E402
from inputs import program  # noqa: E402
from misa.integrations import transformers as integration  # noqa: E402

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# Logits of equal selections differ by single precision's rounding, carried through three layers.
# test_one_head_changes_logits shows that another selection moves them by more than ten times this.
LOGIT_TOLERANCE = 1e-3


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=list(ARCHITECTURES))
def model(request: pytest.FixtureRequest, device: str) -> torch.nn.Module:
    return build(request.param, device)


def assert_close(logits: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = LOGIT_TOLERANCE * expected.abs().max().item()
    torch.testing.assert_close(logits, expected, rtol=0, atol=tolerance)


def devices_of(device: str) -> dict[str, Any]:
    """A device map of the models of `build`: the last layer's weights stay on the disk."""
    first = {"cuda": 0}.get(device, device)
    parts = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm")
    return {
        **dict.fromkeys((*parts, "model.rotary_emb", "lm_head"), first),
        "model.layers.2": "disk",
    }


def dispatch(model: torch.nn.Module, folder: Path, **options: Any) -> None:
    """Has accelerate spread `model` over its device and the disk."""
    parts = devices_of(model.device.type)
    accelerate.dispatch_model(
        model, parts, main_device=parts["lm_head"], offload_dir=folder, **options
    )


def put_hooks_on(model: torch.nn.Module) -> None:
    for indexer in indexers_of(model):
        add_hook_to_module(indexer, ModelHook(), append=True)


def take_hooks_off(model: torch.nn.Module) -> None:
    for indexer in indexers_of(model):
        remove_hook_from_module(indexer)


def state_of(model: torch.nn.Module) -> dict[str, tuple[type, dict[str, Any]]]:
    """The class and the attributes of every module."""
    return {name: (type(each), dict(vars(each))) for name, each in model.named_modules()}


def wrap_forward(module: torch.nn.Module) -> None:
    """Puts a `forward` on the module that calls the one that it had, as hooks by hand do."""
    forward = module.forward
    module.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def record_calls(
    model: torch.nn.Module, run: Callable[[], Any]
) -> list[tuple[Any, tuple[Any, ...], torch.Tensor]]:
    """(indexer, its positional arguments, what it selected) of every call during `run`."""
    calls = []
    hooks = [
        each.register_forward_hook(
            lambda module, args, _, output: calls.append((module, args, output)), with_kwargs=True
        )
        for each in indexers_of(model)
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
def exact_scores(module: Any, arguments: tuple[Any, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [B, S, T] of a call without a cache in double precision, and a bound of what single
    precision loses of them: gamma_(D + H + 4) of the sum of magnitudes, for D products and H rows,
    the clip's product, the two scales and the weight's own rounding.
    """
    q, w, k = integration._project(module, *arguments[:3])
    q, w, k = q.double(), w.double(), k.double()
    scores = torch.einsum("bsh,bsht->bst", w, torch.einsum("bshd,btd->bsht", q, k).relu())
    sizes = torch.einsum("bshd,btd->bsht", q.abs(), k.abs())
    gamma = (DIM + HEADS + 4) * 2**-24
    return scores, gamma * torch.einsum("bsh,bsht->bst", w.abs(), sizes)


def assert_same_selection(calls: list, modules: int) -> None:
    """That selections are those of the models' own code, up to rounding."""
    assert len(calls) == modules
    for module, arguments, picked in calls:
        own = integration._own_class(module).forward(module, *arguments, cache=None)
        assert picked.dtype == own.dtype and picked.shape == own.shape
        # As many positions as there are columns, all distinct.
        assert (picked.sort(-1).values.diff(dim=-1) > 0).all()
        mask = arguments[3]
        visible = (mask if mask.dtype == torch.bool else mask == 0).expand(*own.shape[:2], -1)
        scores, error = exact_scores(module, arguments)
        scores = scores.masked_fill(~visible, -torch.inf)
        count = min(TOP_K, scores.shape[-1])
        kth = scores.topk(count).values[..., -1:]
        # Each side is off by `error` at most, and so is its k-th score.
        tolerance = 2 * error.masked_fill(~visible, 0).amax(-1, keepdim=True)
        chosen = [
            torch.zeros_like(visible).scatter(-1, each.long(), True) for each in (picked, own)
        ]
        differing = (chosen[0] ^ chosen[1]) & visible
        assert ((scores - kth).abs() <= tolerance)[differing].all()
        # Where a query sees no more than the columns, it selects all of it.
        short = visible.sum(-1, keepdim=True) <= count
        assert (chosen[0] | ~visible | ~short).all()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("options", [{"indexer": "dsa"}, {"indexer": "misa", "heads": HEADS}])
@torch.no_grad()
def test_all_heads_select_what_the_model_selects(
    model: torch.nn.Module, device: str, attention: str, options: dict[str, Any]
) -> None:
    model.set_attn_implementation(attention)
    tokens = tokens_of(device, 2, 75)
    own = model(tokens, use_cache=False).logits
    integration.enable(model, **options)
    calls = record_calls(model, lambda: assert_close(model(tokens, use_cache=False).logits, own))
    assert_same_selection(calls, len(indexers_of(model)))


@torch.no_grad()
def test_bfloat16(device: str) -> None:
    model = build("deepseek", device).to(torch.bfloat16)
    integration.enable(model, "dsa")
    calls = record_calls(model, lambda: model(tokens_of(device, 2, 75), use_cache=False))
    assert all(call[1][0].dtype == torch.bfloat16 for call in calls)
    assert_same_selection(calls, 3)


@torch.no_grad()
def test_one_head_changes_logits(model: torch.nn.Module, device: str) -> None:
    tokens = tokens_of(device, 2, 75)
    own = model(tokens).logits
    integration.enable(model, heads=1)
    change = (model(tokens).logits - own).abs()
    assert (change[:, :TOP_K] <= LOGIT_TOLERANCE * own.abs().max()).all()
    assert change[:, TOP_K:].max() > 10 * LOGIT_TOLERANCE * own.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@torch.no_grad()
def test_padding_changes_nothing(
    model: torch.nn.Module, device: str, attention: str, side: str
) -> None:
    model.set_attn_implementation(attention)
    integration.enable(model, heads=4)
    tokens, lengths = tokens_of(device, 3, 70), [70, 41, 9]
    mask = torch.zeros_like(tokens)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = 1
    # As `generate` numbers positions.
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(tokens, attention_mask=mask, position_ids=positions).logits
    for row in range(len(lengths)):
        kept = mask[row].bool()
        assert_close(padded[row, kept], model(tokens[row, kept][None]).logits[0])


@pytest.mark.parametrize("options", [{"indexer": "dsa"}, {"indexer": "misa", "heads": 4}])
@torch.no_grad()
def test_cached_decode_equals_prefill(
    model: torch.nn.Module, device: str, options: dict[str, Any]
) -> None:
    integration.enable(model, **options)
    tokens = tokens_of(device, 2, 60)
    full = model(tokens).logits
    cache, pieces = None, []
    for part in tokens.split([31, 20, *[1] * 9], dim=1):
        out = model(part, cache=cache, use_cache=True)
        cache = out.cache
        pieces.append(out.logits)
    assert_close(torch.cat(pieces, 1), full)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate_is_greedy_decoding(model: torch.nn.Module, device: str, cache: str) -> None:
    state = integration.enable(model, heads=4)
    tokens = tokens_of(device, 2, 40)
    mask = torch.ones_like(tokens)
    mask[1, :13] = 0
    out = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        cache_implementation=cache,
        disable_compile=True,
    )
    layers = len(indexers_of(model))
    assert state.calls == 6 * layers
    assert state.queries == layers * 2 * (40 + 5)
    for row, start in ((0, 0), (1, 13)):
        with torch.no_grad():
            logits = model(out[row : row + 1, start:]).logits[0, -7:-1]
        best = logits.max(-1).values - logits.gather(-1, out[row, -6:, None])[:, 0]
        assert (best <= LOGIT_TOLERANCE * logits.abs().max()).all()


@torch.no_grad()
def test_disable_restores(model: torch.nn.Module, device: str) -> None:
    tokens = tokens_of(device, 1, 50)
    own, keys, text = model(tokens).logits, list(model.state_dict()), repr(model)
    assert integration.usage(model) is None
    state = integration.enable(model, heads=1)
    assert integration.usage(model) is state
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(tokens).logits, own)
    assert f"selects with {state.config}" in repr(model)
    integration.disable(model)
    assert integration.usage(model) is None
    assert torch.equal(model(tokens).logits, own)
    assert repr(model) == text
    integration.disable(model)


@torch.no_grad()
def test_dispatched_model(model: torch.nn.Module, device: str, tmp_path: Path) -> None:
    tokens = tokens_of(device, 2, 50)
    own, layers = model(tokens).logits, len(indexers_of(model))
    dispatch(model, tmp_path)
    state = integration.enable(model, "dsa")
    assert_close(model(tokens).logits, own)
    assert (state.calls, state.queries) == (layers, layers * 2 * 50)
    state = integration.enable(model, heads=1)
    assert not torch.equal(model(tokens).logits, own)
    integration.disable(model)
    assert torch.equal(model(tokens).logits, own)
    assert state.calls == layers


@torch.no_grad()
def test_model_loaded_over_devices(model: torch.nn.Module, device: str, tmp_path: Path) -> None:
    integration.enable(model)
    tokens = tokens_of(device, 2, 50)
    expected = model(tokens).logits
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map=devices_of(device), offload_folder=tmp_path / "offloaded"
    )
    assert integration.usage(loaded) is None
    state = integration.enable(loaded)
    assert_close(loaded(tokens).logits, expected)
    assert state.calls == len(indexers_of(model))


@pytest.mark.parametrize(
    "steps",
    [
        steps
        for steps in itertools.permutations(["enable", "change", "disable", "hook", "unhook"])
        if steps.index("enable") < steps.index("change") < steps.index("disable")
        and steps.index("hook") < steps.index("unhook")
    ],
    ids="-".join,
)
@torch.no_grad()
def test_hooks_in_any_order(steps: tuple[str, ...]) -> None:
    model, tokens = build("glm"), tokens_of("cpu", 1, 40)
    own, state = model(tokens).logits, None
    for step in steps:
        if step == "enable":
            state = integration.enable(model, heads=1)
        elif step == "change":
            state = integration.enable(model, "dsa")
        elif step == "disable":
            integration.disable(model)
            state = None
        elif step == "hook":
            put_hooks_on(model)
        else:
            take_hooks_off(model)
        assert integration.usage(model) is state
        before = state.calls if state else 0
        logits = model(tokens).logits
        if state is None:
            assert torch.equal(logits, own)
            continue
        assert state.calls == before + 2
        if state.config.indexer == "dsa":
            assert_close(logits, own)
        else:
            assert not torch.equal(logits, own)


@pytest.mark.parametrize("hooks", ["none", "on", "taken off", "dispatched"])
def test_disable_leaves_the_model_as_it_was(hooks: str, tmp_path: Path) -> None:
    class Derived(integration.glm.GlmMoeDsaIndexer):
        pass

    model = build("glm")
    indexers_of(model)[0].__class__ = Derived
    if hooks == "dispatched":
        dispatch(model, tmp_path)
    elif hooks != "none":
        put_hooks_on(model)
    if hooks == "taken off":
        take_hooks_off(model)
    before, keys = state_of(model), list(model.state_dict())
    integration.enable(model)
    assert isinstance(indexers_of(model)[0], Derived)
    integration.enable(model, "dsa")
    assert list(model.state_dict()) == keys
    assert state_of(model) != before
    integration.disable(model)
    assert state_of(model) == before
    with (
        pytest.raises(RuntimeError, match="expected a forward pass"),
        integration.capture(model, tmp_path / "{layer}"),
    ):
        assert state_of(model) != before
    assert state_of(model) == before


def test_class_derived_from_an_enabled_one() -> None:
    # As FSDP makes the class of a module that it shards.
    model, tokens = build("deepseek"), tokens_of("cpu", 1, 30)
    state = integration.enable(model)
    for indexer in indexers_of(model):
        indexer.__class__ = type("Sharded", (type(indexer),), {})
    model(tokens)
    integration.disable(model)
    assert {type(each).__name__ for each in indexers_of(model)} == {"Sharded"}
    model(tokens)
    assert state.calls == 3
    state = integration.enable(model)
    model(tokens)
    assert state.calls == 3


@pytest.mark.parametrize("kind", ["by hand", "compiled", "over hooks", "under hooks", "partial"])
@torch.no_grad()
def test_forward_that_hides_the_class(kind: str, tmp_path: Path) -> None:
    model, tokens = build("deepseek"), tokens_of("cpu", 1, 40)
    own, indexer = model(tokens).logits, indexers_of(model)[1]
    if kind == "over hooks":
        put_hooks_on(model)
    if kind == "compiled":
        indexer.forward = torch.compile(indexer.forward, backend="eager")
    elif kind == "partial":
        indexer.forward = functools.partial(type(indexer).forward, indexer)
    else:
        wrap_forward(indexer)
    if kind == "under hooks":
        put_hooks_on(model)
    before = state_of(model)
    hidden = r"model: expected model\.layers\.1\.self_attn\.indexer to run .* got "
    with pytest.raises(ValueError, match=hidden):
        integration.enable(model)
    with pytest.raises(ValueError, match=hidden), integration.capture(model, tmp_path / "{layer}"):
        pass
    assert state_of(model) == before
    assert integration.usage(model) is None
    with integration.capture(model, tmp_path / "trace", layers=2):
        assert torch.equal(model(tokens).logits, own)


@torch.no_grad()
def test_forward_wrapped_while_enabled() -> None:
    model, tokens = build("deepseek"), tokens_of("cpu", 1, 40)
    own = model(tokens).logits
    state = integration.enable(model, heads=1)
    wrap_forward(indexers_of(model)[1])
    assert not torch.equal(model(tokens).logits, own)
    assert state.calls == 3
    # What the wrapper calls cannot be seen, so the choice stays.
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn"):
        integration.enable(model, "dsa")
    assert integration.usage(model) is state
    integration.disable(model)
    assert torch.equal(model(tokens).logits, own)
    assert state.calls == 3


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["copied", "pickled"],
)
@torch.no_grad()
def test_copies(duplicate: Callable[[Any], Any], hooked: bool) -> None:
    model, tokens = build("glm"), tokens_of("cpu", 1, 40)
    own = model(tokens).logits
    # Hooks that are on cannot be pickled; those taken off leave a `forward` on the module.
    put_hooks_on(model)
    if not hooked or duplicate is not copy.deepcopy:
        take_hooks_off(model)
    off = duplicate(model)
    state = integration.enable(model, heads=1)
    expected = model(tokens).logits
    twin = duplicate(model)
    assert integration.usage(off) is None
    assert torch.equal(off(tokens).logits, own)
    assert integration.usage(twin) == state and integration.usage(twin) is not state
    integration.disable(model)
    assert torch.equal(twin(tokens).logits, expected)
    assert (state.calls, integration.usage(twin).calls) == (2, 4)
    integration.enable(twin, "dsa")
    assert_close(twin(tokens).logits, own)
    integration.disable(twin)
    assert torch.equal(twin(tokens).logits, own)
    assert [type(each) for each in twin.modules()] == [type(each) for each in model.modules()]


@torch.no_grad()
def test_saved_whole(tmp_path: Path) -> None:
    model, tokens = build("deepseek"), tokens_of("cpu", 1, 40)
    integration.enable(model, heads=1)
    expected = model(tokens).logits
    torch.save(model, tmp_path / "model")
    # A process that knows nothing of this library loads what selects with it.
    script = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[3])"
    )
    torch.save(tokens, tmp_path / "tokens")
    paths = [str(tmp_path / name) for name in ("model", "tokens", "logits")]
    subprocess.run([sys.executable, "-c", script, *paths], check=True)
    assert_close(torch.load(tmp_path / "logits"), expected)


def test_enable_replaces_counts_and_logs(caplog: pytest.LogCaptureFixture) -> None:
    model, other = build("glm"), build("deepseek")
    with caplog.at_level(logging.INFO, logger="misa"):
        first = integration.enable(model, heads=1)
        second = integration.enable(model, "misa-r", heads=3)
    assert [record.name for record in caplog.records] == ["misa", "misa"]
    assert "GlmMoeDsaForCausalLM" in caplog.text and "misa-r" in caplog.text
    assert integration.usage(model) is second
    assert second.layers == (0, 2)
    assert second.config == misa.Config("misa-r", top_k=TOP_K, heads=3)
    integration.enable(other)
    for _ in range(2):
        model(tokens_of("cpu", 2, 20))
    assert (first.calls, second.calls, second.queries) == (0, 4, 4 * 40)
    assert integration.usage(other).calls == 0


@torch.no_grad()
def test_compiled_model_runs(device: str) -> None:
    model = build("deepseek", device)
    tokens = tokens_of(device, 2, 40)
    state = integration.enable(model, heads=4)
    expected = model(tokens, use_cache=False).logits
    compiled = torch.compile(model, backend="eager")
    assert_close(compiled(tokens, use_cache=False).logits, expected)
    assert state.calls == 6


@pytest.mark.parametrize(
    ("compiled", "hooked"), [("model", True), ("in place", False), ("indexers", True)]
)
@torch.no_grad()
def test_compiled_before(compiled: str, hooked: bool, tmp_path: Path) -> None:
    torch.compiler.reset()
    model = build("deepseek", num_hidden_layers=1, first_k_dense_replace=1)
    tokens = tokens_of("cpu", 2, 40)
    if hooked:
        put_hooks_on(model)
    run = functools.partial(model, tokens, use_cache=False)
    if compiled == "model":
        run = functools.partial(torch.compile(model, backend="eager"), tokens, use_cache=False)
    elif compiled == "in place":
        model.compile(backend="eager")
    else:
        for each in indexers_of(model):
            each.compile(backend="eager")
    own = run().logits
    state = integration.enable(model, heads=1)
    assert not torch.equal(run().logits, own)
    assert state.calls == 1
    state = integration.enable(model, "dsa")
    assert_close(run().logits, own)
    assert state.calls == 1
    integration.disable(model)
    assert_close(run().logits, own)
    assert state.calls == 1
    with integration.capture(model, tmp_path / "trace", layers=0):
        run()
    assert len(traced(tmp_path / "trace")["q"]) == 80


def test_wrong_models_and_options() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    for call in (integration.enable, integration.disable, integration.usage):
        with pytest.raises(ValueError, match="LlamaForCausalLM"):
            call(llama)
    model = build("deepseek")
    with pytest.raises(ValueError, match="heads: expected 1 to H = 32, got 33"):
        integration.enable(model, heads=33)
    with pytest.raises(ValueError, match=f"top_k: expected none, .* index_topk = {TOP_K}, got 3"):
        integration.enable(model, "misa", top_k=3)
    with pytest.raises(RuntimeError, match="backend: expected .* got 'abacus'"):
        integration.enable(model, backend="abacus")
    with pytest.raises(ValueError, match="D = 64 or 128, got 32"):
        integration.enable(build("deepseek", index_head_dim=32))
    assert integration.usage(model) is None


@torch.no_grad()
def test_hidden_keys_between_visible_ones() -> None:
    model = build("deepseek")
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[0, 4:6] = 0
    integration.enable(model)
    with pytest.raises(ValueError, match="attention_mask: expected one run"):
        model(tokens_of("cpu", 1, 12), attention_mask=mask)


def traced(path: Path) -> dict[str, torch.Tensor]:
    """The arguments of misa.select in a trace."""
    trace = load_file(path)
    attention = trace.pop("attn_last32", None)
    assert set(trace) == {"q", "w", "k", "ks", "ke"}
    if attention is not None:
        assert attention.dtype == torch.bfloat16 and attention.shape == (32, len(trace["k"]))
    return trace


@pytest.mark.parametrize("on", [False, True])
@torch.no_grad()
def test_capture(model: torch.nn.Module, device: str, tmp_path: Path, on: bool) -> None:
    if on:
        integration.enable(model, "dsa")
    tokens = tokens_of(device, 2, 40)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    layers = [each.layer_idx for each in indexers_of(model)]

    def run() -> None:
        with integration.capture(model, tmp_path / "layer{layer}.safetensors"):
            model(tokens, attention_mask=mask)
            model(tokens[:, :5])

    calls = record_calls(model, run)[: len(layers)]
    for layer, (module, arguments, picked) in zip(layers, calls, strict=True):
        trace = traced(tmp_path / f"layer{layer}.safetensors")
        assert trace["q"].shape == (80, HEADS, DIM)
        assert trace["k"].shape == (80, DIM)
        assert trace["ks"].tolist() == [0] * 40 + [40] * 9 + [49] * 31
        assert trace["ke"][:40].tolist() == list(range(1, 41))
        assert trace["ke"][40:].tolist() == [40] * 9 + list(range(50, 81))
        scores, error = exact_scores(module, arguments)
        whole = torch.einsum(
            "th,thl->tl",
            trace["w"].double(),
            torch.einsum("thd,ld->thl", trace["q"].double(), trace["k"].double()).relu(),
        )
        blocks = torch.stack([whole[:40, :40], whole[40:, 40:]])
        assert ((blocks - scores.cpu()).abs() <= error.cpu()).all()
        assert picked.shape == (2, 40, TOP_K)


@torch.no_grad()
def test_capture_of_decode_and_rows(device: str, tmp_path: Path) -> None:
    model = build("glm", device)
    tokens = tokens_of(device, 1, 40)
    cache = model(tokens[:, :39], use_cache=True).cache
    with integration.capture(model, tmp_path / "decode.safetensors", layers=2):
        model(tokens[:, 39:], cache=cache)
    trace = traced(tmp_path / "decode.safetensors")
    assert trace["q"].shape == (1, HEADS, DIM) and trace["k"].shape == (40, DIM)
    assert (trace["ks"].item(), trace["ke"].item()) == (0, 40)
    with integration.capture(model, tmp_path / "rows.safetensors", layers=2, rows=5):
        model(tokens)
    trace = traced(tmp_path / "rows.safetensors")
    assert trace["q"].shape == (5, HEADS, DIM) and trace["k"].shape == (40, DIM)
    assert trace["ke"].tolist() == [1, 11, 21, 30, 40]


@pytest.mark.parametrize("on", [False, True])
@torch.no_grad()
def test_capture_of_a_dispatched_model(
    model: torch.nn.Module, device: str, tmp_path: Path, on: bool
) -> None:
    layers = [each.layer_idx for each in indexers_of(model)]
    tokens = tokens_of(device, 2, 40)
    with integration.capture(model, tmp_path / "whole{layer}"):
        model(tokens)
    names = [type(each).__name__ for each in indexers_of(model)]
    if on:
        integration.enable(model, "dsa")
    # The last layer's indexer has all its weights while it runs, and none afterwards.
    dispatch(model, tmp_path / "offloaded", preload_module_classes=names[:1])
    offloaded = indexers_of(model)[-1].wk
    assert offloaded.weight.is_meta and not hasattr(offloaded, "_hf_hook")
    with integration.capture(model, tmp_path / "dispatched{layer}"):
        model(tokens)
    for layer in layers:
        whole, dispatched = (
            traced(tmp_path / f"{kind}{layer}") for kind in ("whole", "dispatched")
        )
        for name in ("q", "w", "k", "ks", "ke"):
            torch.testing.assert_close(dispatched[name], whole[name])


class NegatedQueries(ModelHook):
    """Hands an indexer other inputs than it is called with, as hooks that move them do."""

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        return (args[0], -args[1], *args[2:]), kwargs


@torch.no_grad()
def test_capture_sees_what_hooks_hand_over(tmp_path: Path) -> None:
    model, tokens = build("deepseek"), tokens_of("cpu", 2, 40)
    with integration.capture(model, tmp_path / "plain", layers=0):
        model(tokens)
    add_hook_to_module(indexers_of(model)[0], NegatedQueries())
    with integration.capture(model, tmp_path / "hooked", layers=0):
        model(tokens)
    plain, hooked = traced(tmp_path / "plain"), traced(tmp_path / "hooked")
    assert torch.equal(hooked["q"], -plain["q"])
    assert torch.equal(hooked["k"], plain["k"])


@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_capture_of_attention(
    model: torch.nn.Module, device: str, tmp_path: Path, cached: bool
) -> None:
    """Where the indexer selects all keys, a layer's attention is the dense one."""
    tokens = tokens_of(device, 2, 40)
    mask = torch.ones_like(tokens)
    mask[1, :9] = 0
    model.set_attn_implementation("eager")
    for each in indexers_of(model):
        each.index_topk = 64
    new = tokens[:, 10:] if cached else tokens
    cache = model(tokens[:, :10], attention_mask=mask[:, :10], use_cache=True).cache
    with integration.capture(model, tmp_path / "trace{layer}", rows=50):
        out = model(
            new, attention_mask=mask, cache=cache if cached else None, output_attentions=True
        )
    length = new.shape[1]
    kept = torch.linspace(0, 2 * length - 1, 50, dtype=torch.float64).round().long()[-32:]
    assert set((kept // length).tolist()) == {0, 1}
    for each in indexers_of(model):
        rows = load_file(tmp_path / f"trace{each.layer_idx}")["attn_last32"].float()
        own = out.attentions[each.layer_idx].mean(1).cpu()
        expected = torch.zeros_like(rows)
        for row, query in enumerate(kept.tolist()):
            sequence, t = divmod(query, length)
            if not mask[sequence, t - length]:
                continue  # padding sees no key
            expected[row, sequence * 40 : (sequence + 1) * 40] = own[sequence, t]
        torch.testing.assert_close(rows, expected, rtol=2**-8, atol=1e-5)


@torch.no_grad()
def test_capture_without_attention(tmp_path: Path) -> None:
    model, tokens = build("deepseek"), tokens_of("cpu", 1, 40)
    with integration.capture(model, tmp_path / "few", layers=0, rows=31):
        model(tokens)
    assert "attn_last32" not in load_file(tmp_path / "few")
    for module in model.modules():
        if isinstance(module, integration.deepseek.DeepseekV32Attention):
            module.__class__ = type("Other", (torch.nn.Module,), dict(vars(module.__class__)))
    with integration.capture(model, tmp_path / "other", layers=0):
        model(tokens)
    assert "attn_last32" not in load_file(tmp_path / "other")


@torch.no_grad()
def test_captures_and_selections_overlap(tmp_path: Path) -> None:
    model, tokens = build("glm"), tokens_of("cpu", 1, 40)
    before, own = state_of(model), model(tokens).logits
    with integration.capture(model, tmp_path / "outer{layer}"):
        state = integration.enable(model, heads=1)
        with integration.capture(model, tmp_path / "inner", layers=2):
            model(tokens[:, :10])
        twin = copy.deepcopy(model)
        integration.disable(model)
        assert torch.equal(model(tokens).logits, own)
    assert state.calls == 2
    assert state_of(model) == before
    integration.disable(twin)
    assert state_of(twin).keys() == before.keys()
    assert [type(each) for each in twin.modules()] == [type(each) for each in model.modules()]
    for path in ("outer0", "outer2", "inner"):
        assert len(traced(tmp_path / path)["q"]) == 10


def test_capture_arguments(tmp_path: Path) -> None:
    model = build("glm")
    for options, match in (
        ({"path": "x", "layers": 1}, r"layers: expected some of \[0, 2\], got 1"),
        ({"path": "x"}, "path: expected '{layer}' in it"),
        ({"path": "x", "layers": 0, "rows": 0}, "rows: expected 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=match), integration.capture(model, **options):
            pass
    with (
        pytest.raises(RuntimeError, match="expected a forward pass"),
        integration.capture(model, tmp_path / "x", layers=0),
    ):
        pass


@torch.no_grad()
def test_compare_reads_a_capture(tmp_path: Path) -> None:
    model = build("glm")
    with integration.capture(model, tmp_path / "trace", layers=2):
        model(tokens_of("cpu", 2, 75))
    configs = [misa.Config("misa", top_k=TOP_K, heads=heads) for heads in (HEADS, 1)]
    every, one = misa.compare(
        **traced(tmp_path / "trace"), configs=configs, baseline=misa.Config("dsa", top_k=TOP_K)
    )
    assert every["recall_min"] == 1
    assert one["recall_mean"] < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_program_reads_a_capture(tmp_path: Path, dtype: torch.dtype) -> None:
    path, selected = tmp_path / "trace", tmp_path / "selected"
    model = build("deepseek").to(dtype)
    with integration.capture(model, path, layers=1):
        model(tokens_of("cpu", 2, 40))
    subprocess.run([program(), "inspect", path], check=True, capture_output=True)
    subprocess.run(
        [program(), "select", path, "-o", selected, "--indexer", "dsa", "--top-k", str(TOP_K)],
        check=True,
        capture_output=True,
    )
    expected = misa.select(
        **traced(path), config=misa.Config("dsa", top_k=TOP_K, ordered=True)
    ).indices
    indices = load_file(selected)["indices"]
    hidden = torch.iinfo(torch.int32).max
    assert torch.equal(
        *(each.where(each >= 0, hidden).sort(-1).values for each in (indices, expected))
    )
    compared = subprocess.run(
        [program(), "compare", path, "--top-k", str(TOP_K), "--runs", "1", "--json"],
        check=True,
        capture_output=True,
    )
    (trace,) = json.loads(compared.stdout)["traces"]
    dense = next(each for each in trace["indexers"] if each["name"] == "dsa")
    assert 0 < dense["attention"]["kept"] <= trace["attention_bound"] < 1
