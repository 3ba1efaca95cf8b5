# SPDX-License-Identifier: Apache-2.0
"""Judging models: scores of answers, likelihoods, what was forgotten, and whether a difference is one.

`scores.measure("rouge_l", answers)` gives a `result.Result`; `intervals.interval` and `intervals.difference` say how sure it is.
"""
