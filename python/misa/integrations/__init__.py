# SPDX-License-Identifier: Apache-2.0
"""This library's indexers inside other projects' models and engines, one module per project."""
