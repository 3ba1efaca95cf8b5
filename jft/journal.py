# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself while it trains: metrics.jsonl, timing.jsonl, the progress bar.

It is one step behind: the device works on step n while the results of step n - 1 are read.
"""

import contextlib
import pathlib
import sys
from collections.abc import Iterator

import jax
import tqdm

from jft import divergence, hosts, jobs, metrics

Read = tuple[int, dict[str, float]]


class Journal:
    """Of one attempt.

    Args:
      job: the run.
      start: steps done before.
      history: the text of metrics.jsonl up to there.
    """

    def __init__(self, job: jobs.Job, start: int, history: str):
        self.metrics = metrics.Lines(_lead_only(job.folder / "metrics.jsonl"), history)
        timing = job.folder / "timing.jsonl"
        self.timing = metrics.Lines(_lead_only(timing), metrics.up_to(timing, start))
        self.meter = job.meter()
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        interactive = sys.stderr.isatty()
        self._bar = tqdm.tqdm(
            total=job.steps,
            initial=start,
            unit="step",
            file=sys.stderr,
            mininterval=0.1 if interactive else 15,
            dynamic_ncols=interactive,
            smoothing=0.1,
            disable=not hosts.lead(),
        )

    def dispatched(self, number: int, values: dict[str, jax.Array]) -> None:
        """The device has this step to do; its results are read next time."""
        self._pending = number, values

    def read(self) -> Read | None:
        """The results of the step that was dispatched last, which this waits for; None if they were read before."""
        if self._pending is None:
            return None
        number, values = self._pending
        self._pending = None
        return number, {k: float(v) for k, v in values.items()}

    def step(self, number: int, values: dict[str, float]) -> None:
        values = dict(values)
        measured = self.meter.step(int(values.pop("positions")))
        self.metrics.write(step=number, **divergence.record(**values))
        self.timing.write(step=number, **measured)
        speed = f"{measured['tokens_per_second']:.0f} tokens/s"
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {speed}", refresh=False)
        self._bar.update()

    def validation(self, number: int, value: float) -> None:
        self.metrics.write(step=number, **divergence.record(valid_loss=value))
        self.say(f"step {number}: validation loss {value:.4f}")

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if hosts.lead():
            self._bar.write(line, file=sys.stderr)

    def validated(self, number: int) -> bool:
        return self.metrics.has(step=number, valid_loss=None)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens within is no step's time."""
        try:
            yield
        finally:
            self.meter.restart()

    def close(self) -> None:
        self._bar.close()
        self.metrics.close()
        self.timing.close()


def _lead_only(path: pathlib.Path) -> pathlib.Path | None:
    return path if hosts.lead() else None
