# SPDX-License-Identifier: Apache-2.0
"""What the lab's figures have in common."""

from __future__ import annotations

from typing import Any

# Okabe and Ito's colours, which colour-blind readers tell apart too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#555555")
# Of matplotlib; the same figure is the same SVG.
SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "misa",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "legend.frameon": False,
}
