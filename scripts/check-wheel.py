#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Checks the installed package in an environment that needs nothing but NumPy: every backend that
this machine can run selects what the specification does.

    python -I scripts/check-wheel.py

Keys, queries and weights are small integers and powers of two, whose scores no backend rounds: the
positions are equal, not close.
"""

import numpy as np

import misa
from misa import reference

CONFIGS = [
    misa.Config("dsa", top_k=64, ordered=True),
    misa.Config("misa", top_k=64, heads=3, block=64, ordered=True),
    misa.Config("misa-dagger", top_k=64, heads=3, block=64, candidates=96, ordered=True),
    misa.Config("hisa", top_k=64, filter_block=64, filter_blocks=4, ordered=True),
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
    print(f"misa {misa.version()} in {misa.__path__[0]}")
    for backend in misa.backends():
        if not backend.available:
            print(f"  {backend.name}: not here, needs {backend.requirement}")
            continue
        for config in CONFIGS:
            expected = reference.select(reference.rows(**arrays), config).indices
            selected = misa.select(**arrays, config=config, backend=backend.name).indices
            np.testing.assert_array_equal(selected, expected, f"{backend.name}, {config}")
        print(f"  {backend.name}: as the specification")


if __name__ == "__main__":
    main()
