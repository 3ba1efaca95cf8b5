# SPDX-License-Identifier: Apache-2.0
"""Says at once when training goes wrong: steps that had to be skipped, and spikes of the loss.

The program of a step decides alone, on the device, that a loss or gradient which is not finite changes nothing
(`step.train_step`). Here is what follows on the host, one step later: each skipped step is told, its rows are kept in
`divergence/step-N.jsonl`, and where more steps in a row are skipped than `optim.max_skipped` the run stops.
"""

import dataclasses
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Mapping
from typing import Any

from jft import errors, hosts

FOLDER = "divergence"
# A spike is a loss that lies SPREADS usual distances (and LEAST nats) above the median of the last WINDOW, of which
# there must be ENOUGH. A batch of few rows varies much more than a large one: the usual distance is measured, by the
# median absolute deviation, which a few odd losses do not change; LEAST is for runs whose loss is almost 0.
WINDOW, ENOUGH = 50, 20
SPREADS, LEAST = 12.0, 0.5
DEVIATION = (
    1.4826  # from the median absolute deviation to the standard deviation of a normal distribution
)


@dataclasses.dataclass
class Watch:
    """What is known of a run's losses; a resumed run goes on with it (`state`, `from_state`).

    Attributes:
      limit: steps in a row that may be skipped; see `optim.max_skipped`.
      in_a_row: skipped steps since the last good one.
      skipped: all skipped steps of the run.
      spikes: of the run.
      high: whether the loss has not come down since the last spike.
      losses: the last good ones, WINDOW at most.
    """

    limit: int
    in_a_row: int = 0
    skipped: int = 0
    spikes: int = 0
    high: bool = False
    losses: list[float] = dataclasses.field(default_factory=list)

    @classmethod
    def from_state(cls, limit: int, state: Mapping[str, Any]) -> "Watch":
        return cls(limit, **state)

    def state(self) -> dict[str, Any]:
        """As JSON, for the checkpoint."""
        found = dataclasses.asdict(self)
        del found["limit"]
        return found

    @property
    def over(self) -> bool:
        """Whether the run has to stop."""
        return self.in_a_row > self.limit

    def step(self, number: int, values: Mapping[str, float]) -> list[str]:
        """Takes in the metrics of the next step; what is to be said of it, in lines."""
        if values["skipped"]:
            self.in_a_row += 1
            self.skipped += 1
            return [f"step {number}: {_measured(values)}: not finite; the step was skipped"]
        self.in_a_row = 0
        said = self._spike(number, values["loss"])
        self.losses = [*self.losses, values["loss"]][-WINDOW:]
        return said

    def _spike(self, number: int, loss: float) -> list[str]:
        """A spike is told once, however long the loss stays up there."""
        if len(self.losses) < ENOUGH:
            return []
        middle = statistics.median(self.losses)
        usual = DEVIATION * statistics.median(abs(x - middle) for x in self.losses)
        before, self.high = self.high, loss > middle + max(SPREADS * usual, LEAST)
        if not self.high or before:
            return []
        self.spikes += 1
        return [
            f"step {number}: the loss jumped to {loss:.3f}; of the {len(self.losses)} steps before the median is"
            f" {middle:.3f} and the usual distance from it {usual:.3f}"
        ]


def record(**values: float) -> dict[str, float | None]:
    """Metrics as JSON can hold them: null for what is not finite."""
    return {k: v if math.isfinite(v) else None for k, v in values.items()}


def settle(
    watch: Watch,
    job: Any,
    number: int,
    values: Mapping[str, float],
    newest: Callable[[], int | None],
    examine: Callable[[], str] | None = None,
) -> list[str]:
    """What follows from a step's metrics, on every process alike.

    Args:
      watch: of the run; takes the step in.
      job: `jobs.Job`.
      number: of the step, from 1.
      values: its metrics.
      newest: the step of the newest checkpoint, if there is one.
      examine: finds the first operation that gave something not finite; then the run stops at the first skipped step.

    Returns:
      Lines to say.

    Raises:
      UserError: the run has to stop.
    """
    lines = watch.step(number, values)
    if not values["skipped"]:
        return lines
    kept = _keep(job, number)
    if examine is not None:
        raise errors.UserError(f"step {number}: {_measured(values)}: {examine()}; {kept}")
    if watch.over:
        raise errors.UserError(_refusal(watch, number, values, f"{kept}; {_newest(job, newest())}"))
    return [f"{line}; {kept}" for line in lines]


def _refusal(watch: Watch, number: int, values: Mapping[str, float], where: str) -> str:
    rows = "this step" if watch.in_a_row == 1 else f"{watch.in_a_row} steps in a row"
    if watch.skipped == number:  # the learning rate has not come into it
        advice = "not one step was finite: look at the rows, the weights and model.dtype"
    else:
        advice = "lower optim.learning_rate, or look at the rows"
    return (
        f"step {number}: {_measured(values)}: not finite, for {rows} (optim.max_skipped={watch.limit});"
        f" {where}; {advice}; --debug finds the first operation that is not finite"
    )


def _measured(values: Mapping[str, float]) -> str:
    return f"loss {values['loss']}, gradient norm {values['grad_norm']}"


def _newest(job: Any, saved: int | None) -> str:
    if saved is None:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is that of step {saved} in {job.folder / 'checkpoints'}"


def _keep(job: Any, number: int) -> str:
    """Writes the step's rows, and says where; a file that can't be written is no reason to stop."""
    path = job.folder / FOLDER / f"step-{number}.jsonl"
    if hosts.lead():
        try:
            _write(path, job, number)
        except OSError as error:
            return f"its rows could not be written to {path} ({error.strerror})"
    return f"its rows are in {path}"


def _write(path: pathlib.Path, job: Any, number: int) -> None:
    lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in rows(job, number)]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8", errors="surrogatepass")


def rows(job: Any, number: int) -> list[dict[str, Any]]:
    """The examples in the batch of a step, of all hosts: where each is from, what it says, and what the model sees of it."""
    found = []
    for place, members in enumerate(job.batches.members(number - 1)):
        for source, index in members:
            part = job.data.train[source]
            row, stored = part[index], part.source
            example = stored.example(int(stored.example_of[part.of[index]]))
            found.append(
                {"source": row.source, "batch_row": place, "tokens": len(row.tokens)}
                | {"trained_tokens": int(row.trained.sum())}
                | ({"messages": example.messages} if example.messages else {})
                | {"text": job.model.tokenizer.decode(row.tokens)}
            )
    return found
