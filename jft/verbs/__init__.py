# SPDX-License-Identifier: Apache-2.0
"""The verbs of the `jft` command: a small file's worth of flags for each, over the library.

Each module has a `run(arguments) -> exit code` for every verb of its own; `jft.cli` imports the one that is asked for.
"""
