# SPDX-License-Identifier: Apache-2.0
"""What `jft check` shows a person: the report, and rows token by token. Plain where the output has no colours."""
