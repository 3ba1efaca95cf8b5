# SPDX-License-Identifier: Apache-2.0
"""What a run measures of itself: step time, speed, utilisation, the wait for data; and a trace on request.

The loop dispatches step n before it reads the metrics of step n - 1, so the device never waits for it. What is timed is
therefore the time between two such readings: while the device is busy, that is one step.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from jft import errors


class Meter:
    """Times of a run's steps.

        with meter.waiting():
            batch = ...                       # the wait for data
        ...                                   # dispatch step n
        ...                                   # read the metrics of step n - 1
        record = meter.step(tokens)           # of step n - 1
        meter.restart()                       # after a validation or a save: it is no step's time

    Args:
      devices: all devices of the run, of all processes.
      flops_per_token: what a token needs at least, forward and backward: about 6 N for full fine-tuning and 4 N for LoRA,
        whose frozen weights have no gradient (N: parameters of matmuls). 0 = unknown.
      peak_flops: of one device, in the dtype of the computation. 0 = unknown.
      clock: seconds.
    """

    def __init__(
        self,
        devices: int,
        *,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._devices, self._clock = devices, clock
        self._utilisation = flops_per_token / peak_flops / devices if peak_flops else 0.0
        self._last, self._waited, self._first = clock(), 0.0, True
        self._steps: list[tuple[float, int, float]] = []

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """The time in which the loop waits for its next batch. The device may still be busy meanwhile."""
        began = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - began

    def step(self, tokens: int) -> dict[str, float]:
        """The fields of a step's record, whose results have just been read.

        Args:
          tokens: that were not padding, of all processes.
        """
        now = self._clock()
        seconds, waited = now - self._last, self._waited
        if not self._first:  # the first after a start holds the compilation
            self._steps.append((seconds, tokens, waited))
        self._last, self._waited, self._first = now, 0.0, False
        return self._record(seconds, tokens, waited)

    def _record(self, seconds: float, tokens: int, waited: float) -> dict[str, float]:
        speed = tokens / seconds if seconds > 0 else 0.0
        record = {
            "step_seconds": round(seconds, 6),
            "tokens_per_second": round(speed, 1),
            "tokens_per_second_per_device": round(speed / self._devices, 1),
            "data_wait_seconds": round(waited, 6),
        }
        if self._utilisation:
            record["mfu"] = round(speed * self._utilisation, 4)
        return record

    def restart(self) -> None:
        """What has passed since the last step is not a step's time."""
        self._last, self._waited = self._clock(), 0.0

    def summary(self) -> dict[str, float]:
        """The fields of the median step, the first one of the run left out; {} before there are two."""
        if not self._steps:
            return {}
        seconds, tokens, waited = zip(*self._steps, strict=True)
        middle = statistics.median(seconds)
        # Batches hold different numbers of tokens: their mean, at the median time.
        return self._record(middle, round(statistics.fmean(tokens)), statistics.median(waited))


class Profile:
    """An XProf trace of steps `start` to `stop` - 1, from --profile=start:stop; "" = none.

        with profile.step(number, state):     # the results of the step before, to wait for at both ends
            ...                               # dispatch step `number`
        profile.close()                       # at the run's end, also after an error

    Args:
      spec: "start:stop".
      folder: where the trace goes; TensorBoard's profile plugin and XProf read it.
      first: the first step that this process runs, which is above 1 when a run goes on.
      last: the run's last step.

    Raises:
      UserError: the spec is none, or its steps are not among first to last.
    """

    def __init__(self, spec: str, folder: str, *, first: int, last: int):
        self._folder, self._running = folder, False
        self._start = self._stop = 0
        if spec:
            self._start, self._stop = _steps(spec, first, last)

    @contextlib.contextmanager
    def step(self, number: int, before: Any) -> Iterator[None]:
        import jax

        # A trace begins and ends with an idle device: only there the loop waits.
        if number == self._start:
            jax.block_until_ready(before)
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif number == self._stop:
            jax.block_until_ready(before)
            self.close()
        if not self._running:
            yield
            return
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            yield

    def close(self) -> None:
        import jax

        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def _steps(spec: str, first: int, last: int) -> tuple[int, int]:
    start, _, stop = spec.partition(":")
    if not (start.isdecimal() and stop.isdecimal()) or int(start) >= int(stop):
        raise errors.UserError(
            f"--profile={spec}: start:stop is wanted, as in 10:13 for steps 10 to 12"
        )
    if int(start) < first or int(stop) > last + 1:
        raise errors.UserError(
            f"--profile={spec}: this run goes from step {first} to {last}; stop may be {last + 1}"
        )
    return int(start), int(stop)
