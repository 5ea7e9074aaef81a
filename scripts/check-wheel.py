#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the installed package in an environment that needs nothing but NumPy: every backend that
this machine can run selects what the specification does, from keys in one array and in the pages of
a cache.

    python -I scripts/check-wheel.py

Keys, queries and weights are small integers and powers of two, whose scores no backend rounds: the
positions are equal, not close. MISA-R and sketches do round; so many positions are re-ranked that
none of the best is missed.
"""

import numpy as np

import misa
from misa import reference

CONFIGS = [
    misa.Config("dsa", top_k=64, ordered=True),
    misa.Config("misa", top_k=64, heads=3, block=64, ordered=True),
    misa.Config("misa-dagger", top_k=64, heads=3, block=64, candidates=96, ordered=True),
    misa.Config("misa-r", top_k=64, heads=3, candidates=512, ordered=True),
    misa.Config("hisa", top_k=64, filter_block=64, filter_blocks=4, ordered=True),
]
SKETCHED = [  # of the e4m3 keys in pages
    misa.Config("dsa", top_k=64, candidates=512, sketch=2, ordered=True),
    misa.Config("misa-r", top_k=64, heads=3, candidates=512, sketch=4, ordered=True),
]


def main() -> None:
    rng = np.random.default_rng(0)
    ke = np.array([0, 1, 63, 64, 500, 1000, 1023, 1024], np.int32)
    arrays = {
        "q": rng.integers(-3, 4, (len(ke), 8, 128)).astype(np.float32),
        "w": rng.choice([-0.5, 0.25, 0.5, 1.0], (len(ke), 8)).astype(np.float32),
        "k": rng.integers(-3, 4, (ke.max(), 128)).astype(np.float32),
        "ks": np.zeros_like(ke),
        "ke": ke,
    }
    pages = rng.permutation(16).astype(np.int32)
    slots = pages.repeat(64) * 64 + np.arange(1024) % 64
    cache = misa.Cache(16, 128, scale_format="ue8m0")  # scales that keep integers as they are
    cache.append(arrays["k"], slots)
    of_pages = (arrays["q"], arrays["w"], cache.data, np.tile(pages, (len(ke), 1)), ke)
    derived = {"page_sums": cache.page_sums, "largest_scales": cache.largest_scales}
    sketches = {bits: np.zeros((16, 64 * row), np.uint8) for bits, row in ((2, 34), (4, 68))}
    for sketch in sketches.values():
        misa.append(cache.data, None, slots, sketches=sketch)
    ragged, paged = reference.rows(**arrays), reference.paged_rows(*of_pages)
    expected = {
        config: reference.select(paged if config.sketch else ragged, config).indices
        for config in CONFIGS + SKETCHED
    }
    print(f"misa {misa.version()} in {misa.__path__[0]}")
    for backend in misa.backends():
        if not backend.available:
            print(f"  {backend.name}: not here, needs {backend.requirement}")
            continue
        for config, positions in expected.items():
            options = {"config": config, "backend": backend.name}
            of_config = derived | {"sketches": sketches.get(config.sketch)}
            found = [misa.select_paged(*of_pages, **of_config, **options)]
            if not config.sketch:
                found.append(misa.select(**arrays, **options))
            for selected in found:
                np.testing.assert_array_equal(
                    selected.indices, positions, f"{backend.name}, {config}"
                )
        print(f"  {backend.name}: as the specification")


if __name__ == "__main__":
    main()
