# SPDX-License-Identifier: Apache-2.0
"""Scores of generated answers against references."""
