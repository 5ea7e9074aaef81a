# SPDX-License-Identifier: Apache-2.0
"""Tensors that are no argument of a call: refused by a message that names the argument, what was
expected and what came, eager and compiled; and no gradient of those that are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import misa
import test_arguments as of_numpy
from test_arguments import CONFIG, WRITTEN, Call, cases, check_refused

torch = pytest.importorskip("torch")
from misa import deep_gemm, torch_ops  # noqa: E402
from test_torch import tensor  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")

ENTRIES = ("select", "select_paged", "select into", "append", "rebuild", "copy_pages",
           "Plan.run", "Plan.run_paged")  # fmt: skip
OPERATORS = ("select", "select_paged")


def calls() -> dict[str, Call]:
    """Those of NumPy, with tensors."""
    return {
        entry: (function, {name: tensor(array) for name, array in arguments.items()})
        for entry, (function, arguments) in of_numpy.calls().items()
        if entry in ENTRIES
    }


def zeros(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tensor: torch.zeros(tensor.shape, dtype=dtype)


KINDS: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "none": (lambda _: None, "none|None|null"),
    "list": (lambda tensor: [3], "list"),
    "array": (lambda tensor: zeros(torch.float32)(tensor).numpy(), "ndarray"),
    "meta": (lambda tensor: tensor.to("meta"), "meta"),
    "0-d": (lambda tensor: tensor.flatten()[0], "0 dimensions"),
    "sparse": (lambda tensor: zeros(torch.float32)(tensor).to_sparse(), "sparse_coo"),
    "mkldnn": (lambda tensor: zeros(torch.float32)(tensor).to_mkldnn(), "_mkldnn"),
    "quantized": (
        lambda tensor: torch.quantize_per_tensor(zeros(torch.float32)(tensor), 1, 0, torch.qint8),
        "qint8",
    ),
    "conjugate": (lambda tensor: zeros(torch.complex64)(tensor).conj(), "complex64"),
    "gradient": (lambda tensor: tensor.clone().requires_grad_(), "requires gradients"),
    "negated": (torch._neg_view, "negated"),
    "complex": (zeros(torch.complex64), "complex64"),
    "float16": (zeros(torch.float16), "float16"),
    "float64": (zeros(torch.float64), "float64"),
    "bool": (zeros(torch.bool), "bool"),
    "int8": (zeros(torch.int8), "int8"),
    "bf16": (zeros(torch.bfloat16), "bfloat16"),
    "e4m3": (zeros(torch.float8_e4m3fn), "float8_e4m3fn|e4m3"),
    "e5m2": (zeros(torch.float8_e5m2), "float8_e5m2"),
    "fnuz": (zeros(torch.float8_e4m3fnuz), "float8_e4m3fnuz"),
}


def wrong(entry: str, argument: str, kind: str) -> bool:
    if kind == "array":  # which append takes too, and a plan as an output
        return entry in (*OPERATORS, "select into") and argument != "q"
    if kind == "gradient":
        floats = ("page_sums", "largest_scales", "scores", "residual")
        return argument in floats and argument in WRITTEN.get(entry, ())
    if kind == "negated":
        return argument in WRITTEN.get(entry, ())
    return of_numpy.wrong(entry, argument, kind)


@pytest.mark.parametrize(("entry", "argument", "kind"), cases(ENTRIES, KINDS, wrong))
def test_refuses(entry: str, argument: str, kind: str) -> None:
    make, came = KINDS[kind]
    call = calls()[entry]
    check_refused(call, argument, make(call[1][argument]), came)


META = cases(OPERATORS, ["meta"], lambda *_: True)


def operator(entry: str) -> Call:
    """The operator itself, with everything it takes."""
    function, arguments = calls()[entry]
    rest = {"next_n": 1, "slots": False} if entry == "select_paged" else {}
    rest |= dict(zip(("top_k", "router", "heads", "block", "residual", "filter_block",
                      "filter_blocks", "candidates", "sketch", "dense_work", "ordered",
                      "static_heads"),
                     torch_ops._fields(CONFIG), strict=True))  # fmt: skip
    rest |= {"want_scores": True, "want_heads": True, "want_residual": True, "backend": "auto",
             "threads": 0, "workspace_cap": 1 << 28}  # fmt: skip
    return partial(getattr(torch.ops.misa, entry), **rest), arguments


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(("entry", "argument", "kind"), META)
def test_one_device(
    entry: str, argument: str, kind: str, direct: bool, backend: str | None
) -> None:
    """The dispatcher would run the shape-only kernel, whose outputs nobody writes."""
    function, arguments = operator(entry) if direct else calls()[entry]

    def step(**arguments: torch.Tensor) -> torch.Tensor:
        return function(**arguments)[0] + 1

    if backend is not None:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend=backend)
    check_refused((step, arguments), argument, arguments[argument].to("meta"), "meta")


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("q", torch.ones(3), r"q: expected \[T, H, D\], got 1 dimensions"),
        ("q", torch.tensor(1.0), r"q: expected \[T, H, D\], got 0 dimensions"),
        ("w", torch.ones(2, 8).bfloat16(), "w: expected float32, got bfloat16"),
        ("w", torch.ones(3, 8), "w: expected T = 2 as q has, got 3"),
        ("ke", torch.full((2,), 10, dtype=torch.int32), r"ke\[0\]: expected 0 to L = 9, got 10"),
    ],
)
def test_compiled_refuses(argument: str, value: Any, message: str, fullgraph: bool) -> None:
    """The error is that of the eager call, not one of the compiler."""
    function, arguments = calls()["select"]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **given: function(**given).indices + 1, fullgraph=fullgraph, backend="aot_eager"
    )
    for call in (function, compiled):
        with pytest.raises(ValueError, match=f"^{message}"):
            call(**(arguments | {argument: value}))


@pytest.mark.parametrize("entry", OPERATORS)
def test_all_on_meta(entry: str) -> None:
    """Shapes alone, of arguments whose shapes and dtypes are right."""
    function, arguments = calls()[entry]
    wanted = {"scores": True, "heads": True, "residual": True}
    want = function(**arguments, **wanted)
    meta = {name: tensor.to("meta") for name, tensor in arguments.items()}
    for got, real in zip(function(**meta, **wanted), want, strict=True):
        assert got.is_meta and (got.shape, got.dtype) == (real.shape, real.dtype)
    for argument, tensor_ in meta.items():
        check_refused((function, meta), argument, tensor_.to(torch.float64), "float64")
        check_refused((function, meta), argument, tensor_[None, None], "dimensions")
        if argument in ("w", "ks", "ke", "k_scale", "context_lens", "page_sums", "largest_scales"):
            longer = tensor_.new_empty(len(tensor_) + 1, *tensor_.shape[1:])
            check_refused((function, meta), argument, longer, str(len(longer)))


def test_meta_elsewhere() -> None:
    """What reads elements refuses tensors that have none."""
    _, arguments = calls()["select"]
    del arguments["offsets"]
    meta = {name: tensor.to("meta") for name, tensor in arguments.items()}
    with pytest.raises(ValueError, match="^q: expected a CPU or CUDA tensor, got one on meta"):
        misa.compare(**meta, configs=[CONFIG], baseline=CONFIG)
    q, w, k, ks, ke, scale = arguments.values()
    call = {"q": q.to(torch.float8_e4m3fn), "weights": w, "cu_seq_len_k_start": ks,
            "cu_seq_len_k_end": ke}  # fmt: skip
    logits = partial(deep_gemm.fp8_mqa_logits, kv=(k, scale))
    assert logits(**call).shape == (2, 9)
    for argument, given in call.items():
        check_refused((logits, call), argument, given.to("meta"), "meta")
        check_refused((logits, call), argument, given.double(), "float64")
    for kv, name in (((k.to("meta"), scale), r"kv\[0\]"), ((k, scale.to("meta")), r"kv\[1\]")):
        with pytest.raises(ValueError, match=f"^{name}: expected a CPU or CUDA tensor"):
            deep_gemm.fp8_mqa_logits(kv=kv, **call)
    call = {
        "q": q.to(torch.float8_e4m3fn)[:, None],
        "fused_kv_cache": torch.zeros(2, 64, 1, 68, dtype=torch.uint8),
        "weights": w,
        "context_lens": ke,
        "block_table": torch.zeros(2, 1, dtype=torch.int32),
    }
    logits = partial(deep_gemm.fp8_paged_mqa_logits, schedule_metadata=None, max_context_len=9)
    assert logits(**call).shape == (2, 9)
    for argument, given in call.items():
        check_refused((logits, call), argument, given.to("meta"), "meta")
        check_refused((logits, call), argument, given.double(), "float64")


def floats(entry: str) -> list[str]:
    return [name for name, given in calls()[entry][1].items() if given.dtype == torch.float32]


@pytest.mark.parametrize("backend", [None, "eager", "aot_eager"])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize(
    ("entry", "argument"), [(entry, name) for entry in OPERATORS for name in floats(entry)]
)
def test_gradients_do_not_flow(
    entry: str, argument: str, direct: bool, backend: str | None
) -> None:
    """No output requires gradients; what else is made of the inputs has its own."""
    function, arguments = operator(entry) if direct else calls()[entry]
    wanted = {} if direct else {"scores": True, "heads": True, "residual": True}
    plain = function(**arguments, **wanted)

    def step(factor: torch.Tensor, **arguments: torch.Tensor) -> tuple:
        selected = function(**arguments, **wanted)
        return *selected, (selected[1] * factor).sum() + (3 * arguments[argument]).sum()

    if backend is not None:
        torch._dynamo.reset()
        step = torch.compile(step, fullgraph=True, backend=backend)
    given = arguments[argument].clone().requires_grad_()
    factor = torch.ones_like(plain[1], requires_grad=True)
    *selected, loss = step(factor, **(arguments | {argument: given}))
    for got, want in zip(selected, plain, strict=True):
        assert not got.requires_grad and torch.equal(got, want)
    loss.backward()
    assert torch.equal(factor.grad, plain[1])
    assert torch.equal(given.grad, torch.full_like(given, 3))


@pytest.mark.parametrize("entry", ENTRIES)
def test_gradients_are_left_out(entry: str) -> None:
    """Inputs that require one, or are negated without a copy, are read like others."""
    reads = [name for name in calls()[entry][1] if name not in WRITTEN.get(entry, ())]
    for change in (lambda x: x.requires_grad_(), lambda x: torch._neg_view(-x)):
        results = []
        for changed in (False, True):
            function, arguments = calls()[entry]
            for name in reads:
                if changed and arguments[name].dtype == torch.float32:
                    arguments[name] = change(arguments[name])
            found = function(**arguments)
            results.append(arguments["cache"] if found is None else found.indices)
        assert torch.equal(*results)
