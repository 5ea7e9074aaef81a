# SPDX-License-Identifier: Apache-2.0
"""The size of the tiny model's text."""

LENGTH, VOCABULARY = 96, 40
