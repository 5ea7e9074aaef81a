# SPDX-License-Identifier: Apache-2.0
"""The sentence and the page that tell what `evaluate` found."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from html import escape
from typing import Any

import misa

_NAMES = {"dsa": "DSA", "misa": "MISA", "misa-dagger": "MISA†", "hisa": "HISA", "auto": "Auto"}
# A share below one is tinted by its distance from one, from 0.01 % to 100 % on a log scale.
_LEAST_LOST = 1e-4
BUSY = 0.05  # share of the time that a process waits for a processor, as in misa bench


def busy(result: dict[str, Any]) -> str:
    """What to say of a machine that did other work meanwhile; empty where it did not."""
    waited = result["waited_for_processor"]
    if waited < BUSY:
        return ""
    return (
        f"The machine was busy: this program waited for a processor {_percent(waited)} of the "
        "time, so times are too long and vary."
    )


def label(config: misa.Config) -> str:
    """An indexer as people write it, such as "MISA-R 3 + 1, m = 4096"."""
    given = asdict(config)
    parts = [_NAMES.get(config.indexer, "MISA-R")]
    if config.filter_block:
        parts[0] += f" {config.filter_blocks} × {config.filter_block}"
    if config.router != "all":
        parts[0] += f" {config.heads}{' + 1' if config.residual else ''}"
    if config.candidates:
        parts.append(f"m = {config.candidates}")
    shown = ("indexer", "top_k", "heads", "residual", "candidates", "filter_block", "filter_blocks")
    parts += [f"{n.replace('_', ' ')} = {v}" for n, v in given.items() if n not in shown]
    return ", ".join(parts)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _figure(value: float) -> str:
    """Two digits that count, without an exponent where that stays short."""
    return f"{value:.2g}" if value >= 1e-4 or value == 0 else f"{value:.0e}"


def verdict(result: dict[str, Any]) -> str:
    """One sentence on an indexer, from what there is."""
    parts = []
    if result["less_time"]:
        times = result["less_time"]["times"]
        amount, word = (times, "less") if times >= 1 else (1 / times, "more")
        same = amount < 1.05
        parts.append("DSA's indexer time" if same else f"{amount:.1f} × {word} indexer time")
    if result["output"]:
        parts.append(f"KL {_figure(max(result['output']['kl'], 0))}")
    for name, verb in (("attention_kept", "keeps"), ("recall", "finds")):
        if result[name]:
            share = f"{verb} {_percent(result[name]['worst'])}"
            what = "" if name == "attention_kept" else " of the set"
            parts.append(f"worst layer {result[name]['worst_layer']} {share}{what}")
            break
    return f"{result['config']['label']}: {', '.join(parts) or 'not measured yet'}"


_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --back: #fff;
  --lost: #d9480f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --back: #0d1117; --lost: #ff7b38; } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 74rem; color: var(--ink);
  background: var(--back); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .5rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .25rem; }
p, li { max-width: 44rem; } p { margin: .5rem 0; } .note, footer { color: var(--soft); }
.verdict { font-size: 1.1rem; font-weight: 600; max-width: none; }
.scroll { overflow: auto; max-height: 90vh; } table { border-collapse: collapse; font-size: .9rem;
  font-variant-numeric: tabular-nums; } caption { text-align: left; color: var(--soft); }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
td, tbody th { white-space: nowrap; } th { font-weight: 600; vertical-align: bottom; }
thead th { position: sticky; top: 0; background: var(--back); }
th:first-child { text-align: left;
  position: sticky; left: 0; background: var(--back); }
thead th:first-child { z-index: 1; }
.heat td { background: color-mix(in srgb, var(--lost) calc(var(--x, 0) * 1%), transparent); }
footer { margin-top: 2.5rem; font-size: .9rem; overflow-wrap: anywhere; }
"""


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """Rows of HTML cells, whose first is the row's name; the others begin with their tag."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = []
    for first, *cells in rows:
        row = "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in cells)
        body.append(f'<tr><th scope="row">{first}</th>{row}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _tinted(share: float | None) -> str:
    if share is None:
        return "<td>–</td>"
    lost = min(max(1 - share, _LEAST_LOST), 1)
    tint = 60 * (1 - math.log(lost) / math.log(_LEAST_LOST))
    return f'<td style="--x:{tint:.0f}">{100 * share:.2f}</td>'


def _summary(results: list[dict[str, Any]]) -> str:
    def share(figure: dict[str, Any] | None) -> list[str]:
        if figure is None:
            return ["–", "–"]
        worst = f"{_percent(figure['worst'])} (layer {figure['worst_layer']})"
        return [_percent(figure["mean"]), worst]

    rows = []
    for each in results:
        out, time = each["output"], each["less_time"]
        row = [escape(each["config"]["label"]) if "config" in each else "DSA, all heads"]
        if time and "config" in each:
            low, high = time["quartiles"]
            row += [f"{time['times']:.2f} ×", f"{low:.2f} to {high:.2f}"]
        else:
            row += ["1 ×" if time else "–", "–"]
        if out:
            row += [f"{max(out['kl'], 0):.3g}", f"{max(out['kl_max'], 0):.3g}"]
            row += [_percent(out["top1"]), f"{out['own_loss']:.4f}"]
            row.append(f"{out['loss'] - out['own_loss']:+.4f}")
        else:
            row += ["–"] * 5
        rows.append([*row, *share(each["recall"]), *share(each["attention_kept"])])
    head = (
        "indexer",
        "less time",
        "of a layer",
        "KL",
        "largest KL",
        "same top token",
        "own loss",
        "more loss",
        "recall",
        "worst recall",
        "attention kept",
        "worst kept",
    )
    return _table(head, rows)


def _by_keys(results: list[dict[str, Any]]) -> str:
    ranges = sorted(
        {r["keys"] for each in results for r in (each["output"] or {}).get("by_keys", [])}
    )
    if not ranges:
        return ""
    rows = []
    for keys in ranges:
        row = [f"{keys:,} to {2 * keys - 1:,}"]
        for each in results:
            found = [r for r in (each["output"] or {}).get("by_keys", []) if r["keys"] == keys]
            row += [f"{max(found[0]['kl'], 0):.3g}, {_percent(found[0]['top1'])}" if found else "–"]
        rows.append(row)
    head = ["keys that a position sees", *(escape(each["config"]["label"]) for each in results)]
    return (
        "<h2>By length of context</h2><p class=note>KL, and how often the likeliest next token is "
        f"the same.</p>{_table(head, rows)}"
    )


def _heat(
    title: str, note: str, layers: list[dict[str, Any]], results: list[dict[str, Any]], name: str
) -> str:
    """A table of a share, a row each layer and a column each indexer."""

    def rows() -> Iterable[list[str]]:
        for i, layer in enumerate(layers):
            shared = "" if layer["shares"] is None else f" (as {layer['shares']})"
            if name == "recall" and shared:
                continue
            cells = [_tinted(each["layers"][i][name]) for each in results]
            yield [f"{layer['layer']}{shared}", *cells]

    labels = (escape(e["config"]["label"]) if "config" in e else "DSA, all heads" for e in results)
    return f"<h2>{title}</h2><p class=note>{note}</p>{_table(['layer', *labels], rows(), 'heat')}"


def _times(layers: list[dict[str, Any]], results: list[dict[str, Any]]) -> str:
    rows = []
    for i, layer in enumerate(layers):
        if layer["shares"] is None and layer["rows"]:
            values = [each["layers"][i]["us_per_query"] for each in results]
            rows.append([str(layer["layer"]), *(f"{value:.3g}" for value in values)])
    labels = (escape(e["config"]["label"]) if "config" in e else "DSA, all heads" for e in results)
    return (
        "<h2>Time by layer</h2><p class=note>Microseconds a query, of scoring and selection by "
        f"this library.</p>{_table(['layer', *labels], rows)}"
    )


def render(result: dict[str, Any]) -> str:
    """The page, in one file without references to others."""
    settings, layers = result["settings"], result["layers"]
    every = [result["dsa"], *result["indexers"]]
    parts = [f"<h1>{escape(settings['model'])} with other indexers</h1>"]
    for each in result["indexers"]:
        sentence = escape(each["verdict"]).replace(" %", "&nbsp;%")
        parts.append(f'<p class="verdict">{sentence}</p>')
    if not result["complete"]:
        parts.append("<p>Not complete: these are the figures of the passes that are done.</p>")
    if warning := busy(result):
        parts.append(f"<p>{warning}</p>")
    attention = any(each["attention_kept"] for each in every)
    if layers and not attention:
        parts.append(
            "<p>Attention is missing: the model's attention modules are not those of DeepSeek-V3.2 "
            "or GLM-5.</p>"
        )
    parts.append(
        "<p class=note>Counted are positions that see more than "
        f"{settings['top_k']:,} keys; before, every indexer selects all. KL and loss are in nats, "
        "KL from the model with its own indexers. Less time: than this library's DSA with all "
        "heads, over all layers, and the quartiles of a layer. Recall: of the own indexer's set. "
        "Attention kept: of what the own indexer's set holds of the layer's dense attention.</p>"
    )
    parts.append(_summary(every))
    parts.append(_by_keys(result["indexers"]))
    if attention:
        held = [layer["attention_own"] for layer in layers if layer["attention_own"] is not None]
        note = (
            "Percent, of 16 queries a chunk. The own indexer's set holds "
            f"{_percent(min(held))} to {_percent(max(held))} of a layer's dense attention. The "
            "stronger the tint, the more is lost. (as N): the layer has the selection of layer N."
        )
        parts.append(_heat("Attention kept by layer", note, layers, every, "attention_kept"))
    if layers:
        note = "Percent. DSA falls short of 100 where rounding decides the last positions."
        parts.append(_heat("Recall by layer", note, layers, every, "recall"))
        parts.append(_times(layers, every))
    parts.append(_foot(result))
    title = f"{escape(settings['model'])}: indexers"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _foot(result: dict[str, Any]) -> str:
    settings = result["settings"]
    texts = "".join(
        f"<li>{text['tokens']:,} tokens, {text['sha256']}</li>" for text in settings["texts"]
    )

    def name(key: str) -> str:
        return escape(str(settings[key]))

    return (
        f"<footer><p>{name('model')} {name('name')}, config {name('model_config')}, weights "
        f"{name('weights')}, {name('dtype')}, attention {name('attention')}. Chunks of "
        f"{name('chunk')} tokens, backend {name('backend')}. {name('machine')}; misa "
        f"{name('misa')}, PyTorch {name('torch')}; {escape(result['date'])}.</p>"
        f"<p><code>{escape(result['command'])}</code></p>"
        f"<p>Texts, with the start of the SHA-256 of their tokens:</p><ol>{texts}</ol></footer>"
    )
