# SPDX-License-Identifier: Apache-2.0
"""Questions to the traces of indexers, each answered with a figure. See ../README.md."""
