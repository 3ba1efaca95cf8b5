# SPDX-License-Identifier: Apache-2.0
"""The one exception that means "the user can mend this"."""

_LONGEST, _END = 1500, 300  # characters of a message, and of its end, which says what to do


class UserError(ValueError):
    """Bad input, told in one line: the place, the cause with its number, and what to do.

    The `jft` command prints the message without a traceback and exits with 2. It may quote a stranger's file: what is
    not printable (a line's end, a code that a terminal would obey) is escaped, and the middle of a long one left out.
    """

    def __init__(self, message: str) -> None:
        if len(message) > _LONGEST:
            message = f"{message[: _LONGEST - _END]} ... {message[-_END:]}"
        if not message.isprintable():
            message = "".join(x if x.isprintable() else repr(x)[1:-1] for x in message)
        super().__init__(message)
