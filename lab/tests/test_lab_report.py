# SPDX-License-Identifier: Apache-2.0
"""Verdicts and defaults by hand, and a page from invented JSON."""

import json
from xml.etree import ElementTree

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from lab import claims, plots, report, sparse  # noqa: E402
from lab.statistics import Interval, interval, share, widened  # noqa: E402

LENGTH, TOP_K, DOCUMENTS = 8192, 512, list(range(8))


def result(label, by_window, layers=2):
    recall = interval(by_window, DOCUMENTS)
    one = {"layer": 0, "recall": recall, "attention": recall}
    return {
        "label": label,
        "recall": recall,
        "attention": recall,
        "recall_by_window": by_window,
        "layers": [{**one, "layer": layer} for layer in range(layers)],
    }


def around(mean):
    """Of eight documents, some a little above the mean and some below."""
    return [mean + 0.001 * step for step in (-3, -2, -1, 0, 0, 1, 2, 3)]


RECALLS = {
    "dsa:fp8": around(0.98),
    "misa:h=8": around(0.8),
    "misa-r:h=3": around(0.85),
    "misa-r:h=3:m=2k": around(0.99),
    "misa-r:h=3:m=4k": around(0.995),
    "misa-dagger:h=8:m=4k": around(0.98)[::-1],
    "misa-r:h=3:m=8k:sketch=2:fp8": around(0.98),
    "recency": around(0.3),
}


def quality(indexer):
    def entry(values, **more):
        found = {name: interval(around(mean), DOCUMENTS) for name, mean in values.items()}
        return {**more, "top_k": TOP_K, **found}

    values = {"best": 0.9, "indexer": indexer, "recent": 0.5, "random": 0.1}
    values["over_recent"] = indexer - 0.5
    return {
        "step": 10,
        "length": LENGTH,
        "documents": DOCUMENTS,
        "layers": [entry(values, layer=layer) for layer in range(2)],
        "means": [entry(values)],
    }


def selection(recalls):
    results = [result(label, values) for label, values in recalls.items()]
    shape = {"step": 10, "length": LENGTH, "top_k": TOP_K, "documents": DOCUMENTS}
    return {**shape, "results": results}


def language(recency=0.1):
    def text(label, loss, kl):
        spread = (0.9 * kl, 1.1 * kl)
        over = Interval(loss - 3, loss - 3, loss - 3)
        return {
            "label": label,
            "windows": 8,
            "documents": 8,
            "loss": (loss, loss, loss),
            "loss_over_dsa": over,
            "kl": (kl, *spread),
            "top1": (0.5, 0.4, 0.6),
        }

    answers = {
        f"qasper/{i}": {
            "dsa": {"score": 0.5, "answer": ""},
            "misa:h=8": {"score": 0.4, "answer": ""},
            "hisa:blocks=16": {"score": 0.4, "answer": ""},
            "recency": {"score": recency, "answer": ""},
        }
        for i in range(6)
    }
    prompts = [
        {
            "label": label,
            "prompts": 6,
            "score": (score, score, score),
            "score_over_dsa": (score - 0.5,) * 3,
            "tasks": {"qasper": {"prompts": 6, "score": score}},
        }
        for label, score in (("dsa", 0.5), ("misa:h=8", 0.4))
    ]
    texts = [text("dsa", 3, 0), text("dense", 2.9, 0.3), text("dsa:fp8", 3.001, 0.001)]
    texts += [text("misa-r:h=3:m=4k", 3, 0.0005), text("misa-r:h=3:m=2k", 3.1, 0.01)]
    settings = {"step": 10, "heads": 64, "length": LENGTH, "top_k": TOP_K}
    return {"settings": settings, "answers": answers, "text": texts, "prompts": prompts}


def retrieval(texts=5):
    """Of 20 needles DSA answers all, MISA three quarters, in each of 5 texts, and MISA-R all."""
    cases = {
        f"needle-{i}/0": {
            "kind": "needle",
            "document": f"text {i % texts}",
            "questions": [
                {
                    "answers": {
                        "dsa": [1, 0.0],
                        "misa:h=8": [int(i % 4 > 0), -1.0],
                        "misa-r:h=3:m=4k": [1, 0.0],
                    }
                }
            ],
        }
        for i in range(20)
    }
    results = []
    for label, hits in (("dense", 20), ("dsa", 20), ("misa:h=8", 15)):
        depths = [{"depth": d, "count": 10, "share": share(hits // 2, 10)} for d in (0.25, 0.75)]
        answers = {
            "questions": 20,
            "exact": share(hits, 20),
            "log_probability": (-0.5, -0.6, -0.4),
            "by_depth": depths,
        }
        chosen = {"found": (0.7, 0.6, 0.8), "found_where_looked": None, "by_depth": depths}
        results.append({"kind": "needle", "label": label, "answers": answers, "selection": chosen})
    settings = {"step": 10, "heads": 64, "length": LENGTH, "top_k": TOP_K}
    return {"settings": settings, "cases": cases, "results": results}


def folder(path, *, indexer=0.85, recalls=RECALLS, step=10, **more):
    path.mkdir()
    settings = {"steps": 10, "heads": 64}
    files = {
        "state": {"step": step, "settings": settings, "log": [{"kl": 0.25}]},
        f"quality-{LENGTH}": quality(indexer),
        f"selection-{LENGTH}-{TOP_K}": selection(recalls),
        **more,
    }
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return claims.testbed(path)


def verdicts(testbed):
    return {
        claim.text.split(":")[0]: [one.verdict for one in claim.measure(testbed)]
        for claim in claims.CLAIMS
    }


def test_verdicts_by_hand():
    def verdict(low, high, documents=8):
        found = Interval((low + high) / 2, low, high)
        return claims.Measured({}, "", found, 0.5, documents).verdict

    assert verdict(0.5, 0.6) == "holds"
    assert verdict(0.4, 0.499) == "fails"
    assert verdict(0.4, 0.6) == "open"
    assert verdict(0.6, 0.7, documents=4) == "open"


def test_claims_by_hand(tmp_path):
    more = {f"language-{LENGTH}-{TOP_K}": language(), f"retrieval-{LENGTH}-{TOP_K}": retrieval()}
    found = verdicts(folder(tmp_path / "a", **more))
    assert found["8 routed heads keep more than 92 % of DSA's tokens in every layer"] == ["fails"]
    assert found["tasks do not suffer"] == ["fails"]  # 10 points
    assert found["MISA with 8 heads scores no less than HISA"] == ["holds"]
    # Where the last positions score as much as DSA, tasks tell nothing.
    deaf = folder(tmp_path / "b", **{f"language-{LENGTH}-{TOP_K}": language(recency=0.5)})
    assert verdicts(deaf)["tasks do not suffer"] == ["open"]
    # Paired with the floor's, the differences of these are of both signs.
    assert found["re-ranking 4 k candidates recovers what rounding keys to e4m3 keeps"] == ["open"]
    assert found["3 heads and a linear row keep no less than 8 routed heads"] == ["holds"]
    # 15 of 20 are 53 to 89 %; all of 20 are 84 % or more, which leaves 95 % open.
    assert found["needles are found at every length"] == ["fails"]
    # Of 8 texts, those of which MISA misses a needle it misses all of.
    alike = folder(tmp_path / "c", **{f"retrieval-{LENGTH}-{TOP_K}": retrieval(texts=8)})
    assert verdicts(alike)["needles are found at every length"] == ["open"]
    text = (
        "3 heads and a linear row, 4 k candidates re-ranked, answer 95 % or more of what DSA does"
    )
    assert found[text] == ["open"]


def test_what_makes_a_testbed_weak(tmp_path):
    strong = folder(tmp_path / "strong")
    assert claims.weakness(strong, LENGTH, TOP_K) == ""
    assert "not measured" in claims.weakness(strong, 2 * LENGTH, TOP_K)
    # 0.5 to 0.9 is there to gain; this gains a quarter.
    weak = folder(tmp_path / "weak", indexer=0.6)
    assert "close 25 %" in claims.weakness(weak, LENGTH, TOP_K)
    path = tmp_path / "young"
    young = folder(path)
    state = {**young.state, "settings": {"steps": 40, "heads": 64}}
    (path / "state.json").write_text(json.dumps(state))
    assert "stopped at 10 of 40" in claims.weakness(claims.testbed(path), LENGTH, TOP_K)


def test_costs_by_hand():
    def choice(label):
        return sparse.choice(label, TOP_K)

    # Of rows that see 1 to 8192 keys: 8 heads on each key, and 64 on the mean of each whole 1024,
    # of which the rows before 1024 have none, those before 2048 one and so on, and the last row 8.
    seen = LENGTH * (LENGTH + 1) / 2
    expected = 8 / 64 + (1024 * (1 + 2 + 3 + 4 + 5 + 6 + 7) + 8) / seen
    assert claims.products(choice("misa:h=8"), 64, LENGTH) == pytest.approx(expected)

    def up_to(most):  # of as many keys as a row sees, but no more
        return most * (most + 1) / 2 + (LENGTH - most) * most

    # 3 + 1 rows on each key, 64 on 128 samples and on the candidates.
    expected = 4 / 64 + (up_to(128) + up_to(4 * TOP_K)) / seen
    assert claims.products(choice("misa-r:h=3:m=4k"), 64, LENGTH) == pytest.approx(expected)
    assert claims.products(choice("dsa"), 64, LENGTH) == 1
    # 16 of 64 blocks of 128, and all their means.
    means = sum(n // 128 for n in range(1, LENGTH + 1))
    expected = (up_to(16 * 128) + means) / seen
    assert claims.products(choice("hisa:blocks=16"), 64, LENGTH) == pytest.approx(expected)
    # 32 bytes of codes and 2 of scale in place of 132, and the candidates' keys.
    expected = 34 / 132 + 4 * TOP_K / LENGTH
    sketched = choice("misa-r:h=3:m=4k:sketch=2:fp8")
    assert claims.key_bytes(sketched, LENGTH) == pytest.approx(expected)
    assert claims.key_bytes(choice("misa:h=8:fp8"), LENGTH) == 1
    assert claims.key_bytes(choice("misa:h=8"), LENGTH) == 256 / 132  # of bf16 keys


def test_defaults_by_hand(tmp_path):
    first = folder(tmp_path / "a")
    (one,) = claims.defaults([first])
    assert (one.heads, one.length, one.top_k, one.documents) == (64, LENGTH, TOP_K, 8)
    # m = 2 k keeps more than the floor from fewest products, the sketch as much from fewer bytes.
    assert one.products == "misa-r:h=3:m=2k"
    assert one.bytes == "misa-r:h=3:m=8k:sketch=2:fp8"
    assert one.auto == "misa-r:h=3:m=2k" and one.auto_keeps
    # In language m = 2 k is further from DSA than the floor.
    second = folder(tmp_path / "b", **{f"language-{LENGTH}-{TOP_K}": language()})
    (one,) = claims.defaults([first, second])
    assert one.products == "misa-r:h=3:m=4k" and one.testbeds == ["a", "b"]
    assert one.auto_keeps is False
    # A weak testbed has no say; where nothing keeps what the floor keeps, DSA stays.
    weak = folder(tmp_path / "c", indexer=0.6)
    poor = {label: RECALLS[label] for label in ("dsa:fp8", "misa:h=8", "recency")}
    (one,) = claims.defaults([weak, folder(tmp_path / "d", recalls=poor)])
    assert one.products in ("dsa", "dsa:fp8") and one.testbeds == ["d"]
    assert claims.defaults([weak]) == []


def test_a_layer_that_loses_is_not_made_up_for_by_others(tmp_path):
    label = "misa-r:h=3:m=4k"
    path = tmp_path / "a"
    folder(path)
    file = path / f"selection-{LENGTH}-{TOP_K}.json"
    found = json.loads(file.read_text())
    (own,) = (one for one in found["results"] if one["label"] == label)
    own["layers"][1]["recall"] = interval(around(0.9), DOCUMENTS)  # the floor's is 0.98
    file.write_text(json.dumps(found))
    testbed = claims.testbed(path)
    (one,) = claims._recalls_over(label, claims.FLOOR, 0)(testbed)
    assert one.verdict == "fails" and one.below == (1,) and "in the layers 1" in one.where
    assert not claims.keeps(found, [], label) and claims.keeps(found, [], "misa-r:h=3:m=2k")


def test_losing_a_tenth_of_a_point_counts_as_keeping(tmp_path):
    recalls = dict(RECALLS)
    recalls["misa-r:h=3:m=8k:sketch=2:fp8"] = [x - 1e-4 for x in RECALLS["dsa:fp8"]]
    (one,) = claims.defaults([folder(tmp_path / "a", recalls=recalls)])
    assert one.bytes == "misa-r:h=3:m=8k:sketch=2:fp8"


def test_every_layer_means_all_of_them(tmp_path):
    path = tmp_path / "a"
    recalls = RECALLS | {"misa:h=8": around(0.96)}
    held = folder(path, recalls=recalls)
    claim = "8 routed heads keep more than 92 % of DSA's tokens in every layer"
    assert verdicts(held)[claim] == ["holds"]
    held.state["settings"]["layers"] = 30
    assert verdicts(held)[claim] == ["open"]


def test_the_page(tmp_path):
    more = {f"language-{LENGTH}-{TOP_K}": language(), f"retrieval-{LENGTH}-{TOP_K}": retrieval()}
    old = {f"quality-{2 * LENGTH}": {**quality(0.9), "step": 9}}
    testbeds = [
        folder(tmp_path / "strong", **more, **old),
        folder(tmp_path / "weak", indexer=0.6),
    ]
    page = report.page(testbeds, tmp_path)
    # Strength first, and what is weak is said to be.
    assert page.index("How far the testbeds carry") < page.index("## Claims")
    assert "**weak counts as weak at 8,192 tokens, k = 512: its indexers close 25 %" in page
    assert "strong supports claims at 8,192 tokens, k = 512." in page
    assert f"`quality-{2 * LENGTH}.json`" in page
    fails = page[page.index("### What does not") : page.index("### What is open")]
    recall = widened(result("", RECALLS["misa:h=8"])["recall"], len(DOCUMENTS))
    assert (
        f"strong, 8,192 tokens, k = 512, layer 0, the worst of 2: {report.shown(recall, 100, 2)} %"
        in fails
    )
    assert "weak" not in fails
    assert "fails, and the testbed is weak" in page
    mends = "without a re-rank none that was measured; with one `misa-r:h=3:m=2k`"
    assert "`misa:h=8` is below 92 % in the layers 0, 1." in page and mends in page
    assert "| GLM-5 (arXiv 2605.07363) |  | 46.01 | 46.43 | 46.32 |" in page
    assert "50.00 [50.00, 50.00] | 40.00 [40.00, 40.00] |  |" in page
    names = {path.name for path in tmp_path.glob("*.svg")}
    shown = {"attention", "layers", "needles", "divergence"}
    assert {f"strong-{name}.svg" for name in shown} < names
    assert all(f"{tmp_path.name}/{name}" in page for name in names)
    for path in tmp_path.glob("*.svg"):
        ElementTree.parse(path)
    assert plots.drawn(testbeds[0]) == plots.drawn(testbeds[0])


def test_an_empty_folder_renders(tmp_path):
    path = tmp_path / "new"
    path.mkdir()
    (path / "state.json").write_text(json.dumps({"step": 0, "settings": {"steps": 9, "heads": 64}}))
    page = report.page([claims.testbed(path)], tmp_path)
    assert "not measured" in page and "None: no testbed" in page
