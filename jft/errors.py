# SPDX-License-Identifier: Apache-2.0
"""The one exception that means "the user can mend this"."""

import contextlib
from collections.abc import Iterator

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


@contextlib.contextmanager
def from_library(what: str) -> Iterator[None]:
    """Whatever a library raises over bad input, as a UserError that begins with `what`.

    The tokenizers library raises bare Exception, or panics in Rust, which is no Exception at all.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{what}: {cause[0]}") from error
