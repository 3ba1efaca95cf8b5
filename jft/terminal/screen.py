# SPDX-License-Identifier: Apache-2.0
"""Standard output as rich writes to it: nothing in a text is taken for markup, and a reader that goes away is no error."""

import io
import sys
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich import console as rich_console


def standard_output() -> "rich_console.Console":
    from rich import console as rich_console

    class Console(rich_console.Console):
        def on_broken_pipe(self) -> NoReturn:
            """rich would end the program with the exit code of a check that found errors."""
            raise BrokenPipeError

    # An output that can't have a character gets a question mark for it.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(file=sys.stdout, markup=False, emoji=False, highlight=False)
