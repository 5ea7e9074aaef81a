# SPDX-License-Identifier: Apache-2.0
"""The page of `misa compare --html` in a headless browser: of 2 and of 61 traces, on a phone and on
a desk, in light and in dark. scripts/test-page.sh runs this.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from colorspacious import cspace_convert
from playwright.sync_api import Browser, Locator, Page, sync_playwright

ROOT = Path(__file__).parents[2]
PROGRAM = Path(os.environ.get("MISA_PROGRAM", ROOT / "build/release/cli/misa"))
LAYERS = 61
WIDTHS = [400, 1280]  # CSS pixels
SCHEMES = ["light", "dark"]
SMALLEST_TEXT = 10  # CSS pixels
LARGEST_PAGE = 2_000_000  # bytes

# Text and its place in pixels: what scrolled areas hide is cut off.
TEXTS = """() => {
  const texts = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const parent = node.parentElement;
    const unseen = !parent.checkVisibility() || parent.closest("script, style, noscript, #tip");
    if (unseen || !node.data.trim()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const drawn = parent.closest("svg");
    const scale = drawn ? parent.getScreenCTM().a : 1;
    const size = scale * parseFloat(getComputedStyle(parent).fontSize);
    for (const rect of drawn ? [parent.getBoundingClientRect()] : range.getClientRects()) {
      let [left, top, right, bottom] = [rect.left, rect.top, rect.right, rect.bottom];
      const view = parent.closest(".scroll")?.getBoundingClientRect();
      if (view) {
        [left, right] = [Math.max(left, view.left), Math.min(right, view.right)];
        [top, bottom] = [Math.max(top, view.top), Math.min(bottom, view.bottom)];
      }
      const text = node.data.trim();
      if (right - left > 1 && bottom - top > 1) texts.push({text, left, top, right, bottom, size});
    }
  }
  return texts;
}"""

# The colours of a cell as [0, 1] sRGB, the background over that of the page.
CELL_COLOURS = """() => {
  const parse = colour => colour.match(/[\\d.]+/g).map(Number);
  const page = parse(getComputedStyle(document.body).backgroundColor);
  return [...document.querySelectorAll(".heat td")].map(cell => {
    const style = getComputedStyle(cell);
    const [r, g, b, alpha = 1] = parse(style.backgroundColor);
    return {
      text: parse(style.color).slice(0, 3).map(v => v / 255),
      back: [r, g, b].map((v, i) => (v * alpha + page[i] * (1 - alpha)) / 255),
    };
  });
}"""


def misa(*arguments: str | Path) -> str:
    return subprocess.run(
        [PROGRAM, *map(str, arguments)], check=True, capture_output=True, text=True
    ).stdout


@pytest.fixture(scope="session")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict]]:
    """Each page's file, and what --json says of the same run."""
    folder = tmp_path_factory.mktemp("pages")
    layers = [folder / f"layer_{layer}.safetensors" for layer in range(LAYERS)]
    for layer, file in enumerate(layers):
        shape = ["--queries", "12", "--keys", "400", "--heads", "8", "--dim", "64"]
        misa("synth", "-o", file, "--kind", "structured", "--seed", str(layer), *shape)
    real = sorted((ROOT / "data").glob("trace_*.safetensors"))
    runs = {
        "2 traces": [*real, "--runs", "1"],
        "61 traces": [*sorted(layers), "--top-k", "32", "--runs", "1"],
        "untimed": [*layers[:3], "--top-k", "32", "--runs", "0"],
        "short rows": [layers[0], "--top-k", "400", "--runs", "1"],
    }
    made = {}
    for name, arguments in runs.items():
        file = folder / f"{name}.html"
        made[name] = file, json.loads(misa("compare", *arguments, "--html", file, "--json"))
    return made


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Debian's, or the one that playwright has downloaded.
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield browser
        browser.close()


def opened(browser: Browser, file: Path, width: int, scheme: str = "light") -> Page:
    """The page, once it is drawn; anything in its console fails the test."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.set_default_timeout(10_000)
    faults: list[str] = []
    page.on("console", lambda message: faults.append(message.text))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda r: faults.append(r.url) if r.url != file.as_uri() else None)
    page.goto(file.as_uri())
    settle(page)
    page.faults = faults
    return page


def settle(page: Page) -> None:
    """Waits until every visible plot is drawn for its width."""
    page.wait_for_function(
        """() => [...document.querySelectorAll("figure")].every(figure => {
          const drawn = figure.firstChild?.getAttribute("width");
          return !figure.checkVisibility() || Math.abs(drawn - figure.clientWidth) < 1;
        })"""
    )


def open_last_layer(page: Page) -> Locator:
    """The details of the last layer, which are drawn when they are asked for."""
    details = page.locator("details").last
    assert details.locator("table").count() == 0
    details.locator("summary").click()
    details.locator("table").wait_for()
    settle(page)
    return details


def expect_legible(page: Page) -> None:
    texts = page.evaluate(TEXTS)
    assert len(texts) > 50
    small = [t for t in texts if t["size"] < SMALLEST_TEXT]
    assert not small, f"text under {SMALLEST_TEXT} pixels: {small[:3]}"
    boxes = np.array([[t["left"], t["top"], t["right"], t["bottom"]] for t in texts])
    low, high = boxes[:, None, :2] + 1, boxes[:, None, 2:] - 1
    overlap = (low < boxes[None, :, 2:]).all(-1) & (high > boxes[None, :, :2]).all(-1)
    pairs = [(texts[a], texts[b]) for a, b in np.argwhere(np.triu(overlap, 1))]
    assert not pairs, f"{len(pairs)} texts overlap: {pairs[:3]}"
    # Nothing but the areas that are meant to scroll is wider than the page.
    wide = [t for t in texts if t["right"] > page.viewport_size["width"] or t["left"] < 0]
    assert not wide, f"text beside the page: {wide[:3]}"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["2 traces", "61 traces", "untimed", "short rows"])
def test_text_is_legible(browser, pages, name: str, width: int, scheme: str) -> None:
    file, data = pages[name]
    assert file.stat().st_size < LARGEST_PAGE
    page = opened(browser, file, width, scheme)
    expect_legible(page)
    details = open_last_layer(page)
    expect_legible(page)
    routed = details.get_by_role("group", name="Head use").count()
    assert routed == (0 if name == "short rows" else 1)
    # And after the window has become narrower.
    page.set_viewport_size({"width": width - 60, "height": 800})
    settle(page)
    expect_legible(page)
    assert page.faults == []
    page.close()


@pytest.mark.parametrize("name", ["2 traces", "61 traces"])
def test_columns_can_be_reached_on_a_phone(browser, pages, name: str) -> None:
    page = opened(browser, pages[name][0], 400)
    areas = page.locator(".scroll:has(table)")
    assert areas.count() == 2
    for area in areas.all():
        assert area.evaluate("a => a.scrollWidth > a.clientWidth")
        area.focus()
        area.evaluate("a => a.scrollLeft = a.scrollWidth")
        row = area.locator("tbody tr").last
        first, last = row.locator("th").bounding_box(), row.locator("td").last.bounding_box()
        view = area.bounding_box()
        # The last column is in sight, beside the first one, which stays.
        assert last["x"] + last["width"] <= view["x"] + view["width"] + 1
        assert view["x"] - 1 <= first["x"] and first["x"] + first["width"] <= last["x"] + 1
    page.close()


def test_layers_come_by_number(browser, pages) -> None:
    file, data = pages["61 traces"]
    page = opened(browser, file, 1280)
    heads = page.locator(".heat tbody th").all_inner_texts()
    assert heads == ["mean", "worst", *(f"layer {n}" for n in range(LAYERS))]
    assert page.locator("summary").all_inner_texts() == heads[2:]
    # The figures are those of the JSON, which keeps the order of the command line.
    cells = page.locator(".heat tbody tr").nth(2 + 17).locator("td").all_inner_texts()
    trace = next(t for t in data["traces"] if t["name"] == "17")
    expected = [f"{100 * i['recall']['mean']:.1f}\u00a0%" for i in trace["indexers"]]
    assert cells == expected
    assert [t["file"] for t in data["traces"]] == sorted(t["file"] for t in data["traces"])
    page.close()


@pytest.mark.parametrize("name", ["2 traces", "61 traces", "untimed"])
def test_begins_with_the_verdict_and_recall_against_cost(browser, pages, name: str) -> None:
    file, data = pages[name]
    page = opened(browser, file, 1280)
    assert page.locator(".verdict").inner_text().replace("\u00a0", " ") == data["verdict"]
    cost = "work" if name == "untimed" else "time"
    assert page.locator("h2").first.inner_text() == f"Recall against {cost}"
    marks = page.locator("figure").first.locator("[data-tip]")
    assert marks.count() == len(data["summary"])
    worst = data["summary"][1]["worst"]
    assert f"worst {100 * worst['recall']:.1f}" in marks.nth(1).get_attribute("data-tip")
    page.close()


def test_says_where_it_comes_from(browser, pages) -> None:
    file, data = pages["61 traces"]
    page = opened(browser, file, 400)
    foot = page.locator("footer").inner_text()
    assert data["date"] in foot and data["command"] in foot and data["processor"] in foot
    for trace in data["traces"]:
        digest = hashlib.sha256(Path(trace["file"]).read_bytes()).hexdigest()
        assert trace["sha256"] == digest and digest in foot and trace["file"] in foot
    page.close()


def test_the_keyboard_reaches_every_tooltip(browser, pages) -> None:
    page = opened(browser, pages["2 traces"][0], 1280)
    open_last_layer(page)
    tip = page.locator("#tip")
    groups = page.locator("[data-columns]").all()
    assert len(groups) == 9  # two plots of all, two panels each of two more, three of a layer's
    reached = set()
    page.locator("body").focus()
    for _ in range(40):
        page.keyboard.press("Tab")
        focus = page.evaluate("""() => [...document.querySelectorAll("[data-columns]")].indexOf(
          document.activeElement.closest("[data-columns]"))""")
        if focus < 0:
            continue
        assert focus not in reached, "a plot takes more than one press of Tab"
        reached.add(focus)
        # Still so when what had to be scrolled into view has been drawn.
        page.evaluate("""() => new Promise(done => requestAnimationFrame(() =>
          requestAnimationFrame(done)))""")
        assert tip.is_visible()
        texts = groups[focus].locator("[data-tip]").evaluate_all("a => a.map(m => m.dataset.tip)")
        seen = [tip.inner_text()]
        for _ in texts[1:40]:
            page.keyboard.press("ArrowRight")
            assert tip.is_visible()
            seen.append(tip.inner_text())
        assert seen == texts[:40]
        page.keyboard.press("End")
        assert tip.inner_text() == texts[-1]
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 1280 and box["y"] >= 0
        page.keyboard.press("Escape")
        assert not tip.is_visible()
        if len(reached) == len(groups):
            break
    assert reached == set(range(len(groups)))
    # Arrows up and down move by rows of a table.
    cells = page.locator(".heat td")
    cells.first.focus()
    page.keyboard.press("ArrowDown")
    columns = page.locator(".heat thead th").count() - 1
    assert tip.inner_text() == cells.nth(columns).get_attribute("data-tip")
    page.close()


def test_the_pointer_reaches_tooltips(browser, pages) -> None:
    page = opened(browser, pages["2 traces"][0], 400)
    # Of marks that overlap the last is on top.
    page.locator("figure").first.locator("[data-tip]").last.hover()
    assert page.locator("#tip").inner_text().startswith("Auto 3+1 m=2048\n")
    page.locator("h1").hover()
    assert not page.locator("#tip").is_visible()
    page.close()


def luminance(colour: np.ndarray) -> np.ndarray:
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return linear @ [0.2126, 0.7152, 0.0722]


def contrast(a, b) -> float:
    """As the Web Content Accessibility Guidelines define it, for [0, 1] sRGB."""
    dark, light = sorted([luminance(np.asarray(a)), luminance(np.asarray(b))])
    return (light + 0.05) / (dark + 0.05)


def seen_by(colour, deficiency: str | None) -> np.ndarray:
    """Coordinates in CAM02-UCS, where 1 is about the least difference that is seen."""
    if deficiency:
        space = {"name": "sRGB1+CVD", "cvd_type": deficiency, "severity": 100}
        colour = np.clip(cspace_convert(colour, space, "sRGB1"), 0, 1)
    return cspace_convert(colour, "sRGB1", "CAM02-UCS")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_colours_differ_for_every_reader(browser, pages, scheme: str) -> None:
    page = opened(browser, pages["2 traces"][0], 1280, scheme)
    names = [f"--s{i}" for i in range(8)]
    values = page.evaluate(
        "n => n.map(v => getComputedStyle(document.documentElement).getPropertyValue(v))",
        [*names, "--page"],
    )
    *series, back = [[int(v[i : i + 2], 16) / 255 for i in (1, 3, 5)] for v in values]
    for colour in series:
        assert contrast(colour, back) >= 3
    for deficiency in [None, "deuteranomaly", "protanomaly", "tritanomaly"]:
        seen = [seen_by(colour, deficiency) for colour in series]
        for a, b in itertools.combinations(range(8), 2):
            assert np.linalg.norm(seen[a] - seen[b]) >= 15, (names[a], names[b], deficiency)
    for cell in page.evaluate(CELL_COLOURS):
        assert contrast(cell["text"], cell["back"]) >= 4.5
    # Marks of one colour would still differ in shape.
    marks = page.locator("figure").first.locator("path[data-tip]")
    paths = marks.evaluate_all("a => a.map(m => m.getAttribute('d'))")
    fills = marks.evaluate_all("a => a.map(m => m.getAttribute('fill'))")
    shapes = [re.sub(r"[\d., -]+", " ", d) for d in paths]
    assert all(a != b for a, b in itertools.pairwise(shapes))
    assert len(set(zip(fills, shapes, strict=True))) == len(marks.all())
    page.close()
