# SPDX-License-Identifier: Apache-2.0
"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Bad input, told in one line: the place, the cause with its number, and what to do.

    The `jft` command prints the message without a traceback and exits with 2.
    """
