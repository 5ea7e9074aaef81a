# SPDX-License-Identifier: Apache-2.0
"""Trained indexers to try MISA's quality claims on. See README.md."""
