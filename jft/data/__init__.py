# SPDX-License-Identifier: Apache-2.0
"""From files to batches: formats, chat templates and what they train, packing, batches, splits."""
