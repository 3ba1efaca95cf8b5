# SPDX-License-Identifier: Apache-2.0
"""When a run saves: every so many steps or minutes, whichever comes first."""

import time
from collections.abc import Callable

from jft import errors


class Schedule:
    """Says when a checkpoint is due. A save for another reason counts: the minutes begin again.

    Args:
      every_steps: at multiples of it; 0 = never for this reason.
      every_minutes: since the last save; 0 = never for this reason.
      clock: seconds that only go forward, whatever happens to the machine's date.
    """

    def __init__(
        self,
        every_steps: int,
        every_minutes: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        if every_steps < 0 or every_minutes < 0:
            raise errors.UserError(
                f"checkpoint.every_steps={every_steps}, checkpoint.every_minutes={every_minutes}:"
                " they must be 0 or more"
            )
        self._steps, self._seconds, self._clock = every_steps, 60 * every_minutes, clock
        self._since = clock()

    def at(self, number: int) -> bool:
        """Whether the step's number asks for a save: the same on every process."""
        return self._steps > 0 and number % self._steps == 0

    def overdue(self) -> bool:
        """Whether the time does, by this process's clock; says so once, then the minutes begin again."""
        late = self._seconds > 0 and self._clock() - self._since >= self._seconds
        if late:
            self.saved()
        return late

    def saved(self) -> None:
        self._since = self._clock()
