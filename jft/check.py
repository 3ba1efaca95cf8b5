# SPDX-License-Identifier: Apache-2.0
"""What `jft check` does: reads data as training would, and tells what it found before anything is trained.

Without a tokenizer only the text is looked at. With one, every row is encoded, so that its tokens, and what the template
and the length make of it, are known too; with a model, answers that do not seem to belong to their prompts.
"""

import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jft import errors
from jft.data import accounting, checks, encoding, examples, findings, formats, lengths, rows
from jft.terminal import showing

PRIVATE = ("secret", "personal_data")  # kinds whose rows are never quoted
_CHUNK = 512  # examples tokenised together
_OUTLIERS = 500  # answers whose losses are computed, unless told otherwise


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to check and how; the names are those of the flags.

    Attributes:
      files: what would be trained on.
      valid: held-out files; looked at for what leaks from them into `files`.
      reading: how columns are understood.
      tokenizer: a model's name; "" = no tokens.
      model: a model's name, whose losses are computed; "" = none.
      revision: of either name.
      show: so many rows from the first on are kept to be shown.
      rows: numbers of rows to show.
    """

    files: tuple[str, ...]
    reading: formats.Reading
    valid: tuple[str, ...] = ()
    tokenizer: str = ""
    model: str = ""
    revision: str = ""
    max_length: int = 0
    overlength: str = "error"
    train_on: str = "assistant"
    system: str = ""
    chat_template: str = ""
    outliers: int = _OUTLIERS
    show: int = 0
    rows: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The report, and what is shown beside it."""

    report: findings.Report
    files: tuple[str, ...]
    unused: tuple[str, ...]  # columns that nothing read
    shown: tuple[showing.Shown, ...]
    tokenizer: Any = None


def run(asked: Asked) -> Outcome:
    """Reads everything once and reports.

    Raises:
      UserError: a file or a model can't be had, or a row that was asked for is not there.
    """
    reader = _Reader(asked)
    tables = [formats.Table(source, asked.reading) for source in asked.files]
    for table in tables:
        reader.read(table)
    for source in asked.valid:
        reader.read_valid(formats.Table(source, asked.reading))
    shapes = dict.fromkeys(table.shape.describe() for table in tables if table.shape)
    files = dict.fromkeys(str(file) for table in tables for file in table.files)
    unused = dict.fromkeys(name for table in tables for name in table.extra)
    return Outcome(
        reader.report("; ".join(shapes) or "nothing that can be used"),
        tuple(files),
        tuple(unused),
        tuple(reader.shown),
        reader.tokenizer,
    )


class _Reader:
    """Hands each row to everything that looks at rows."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._examination = checks.Examination(near=True, languages=True)
        self._measures: dict[str, lengths.Lengths] = {}
        self._read, self._faults = 0, 0
        self.shown: list[showing.Shown] = []
        self.model, self.tokenizer = _open(asked)
        self._account, self._answers = None, None
        if self.tokenizer is not None:
            self._account = accounting.Account(
                encoding.Encoder(self.tokenizer, train_on=asked.train_on, system=asked.system),
                accounting.Limits(
                    asked.max_length,
                    asked.overlength,
                    self.model.config.vocab_size if self.model else 0,
                ),
            )
        if self.model is not None and asked.outliers:
            from jft import outliers

            self._answers = outliers.Answers(asked.outliers)

    def read(self, table: formats.Table) -> None:
        """Everything about the rows that would be trained on."""
        waiting = progress(table, "rows")
        while chunk := list(itertools.islice(waiting, _CHUNK)):
            understood = [item for item in chunk if isinstance(item, examples.Example)]
            made = iter(self._account.add(understood) if self._account else [[]] * len(understood))
            for item in chunk:
                self._examination.add(item)
                if isinstance(item, examples.Fault):
                    self._faults += 1
                    self._show(item, item)
                else:
                    self._take(item, next(made))
            self._read += len(chunk)

    def _take(self, example: examples.Example, made: encoding.Encoded) -> None:
        self._measure(lengths.of_text(example))
        self._show(example, made)
        if isinstance(made, examples.Fault) or not made:
            return
        for row in made:
            trained = int(row.trained[1:].sum())
            self._measure({"tokens": len(row.tokens), "trained_tokens": trained})
        if self._answers is not None and self._known(made):
            # Of a preference pair the first row is the chosen answer's.
            row = made[0] if example.rejected else max(made, key=lambda row: row.trained.sum())
            self._answers.add(row, (example.path, example.number))

    def _known(self, made: list[rows.Row]) -> bool:
        """Whether the model has an embedding of every token: a tokenizer may know more."""
        return max(row.tokens.max() for row in made) < self.model.config.vocab_size

    def read_valid(self, table: formats.Table) -> None:
        for item in progress(table, "held-out rows"):
            self._examination.add(item, valid=True)

    def _measure(self, values: dict[str, int]) -> None:
        for name, value in values.items():
            self._measures.setdefault(name, lengths.Lengths()).add(value)

    def _show(self, item: examples.Example | examples.Fault, made: encoding.Encoded) -> None:
        wanted = self._asked.rows
        if item.number in wanted or (not wanted and len(self.shown) < self._asked.show):
            fault = made.message if isinstance(made, examples.Fault) else ""
            kept = tuple(made) if isinstance(made, list) else ()
            self.shown.append(showing.Shown(item.path, item.number, kept, fault))

    def report(self, shape: str) -> findings.Report:
        missing = set(self._asked.rows) - {shown.number for shown in self.shown}
        if missing:
            raise errors.UserError(
                f"--rows={min(missing)}: there is no such row among the {self._read:,} read"
            )
        found = list(self._examination.findings())
        kept = self._read - self._faults
        if self._account is not None:
            found += self._account.found()
            kept = self._account.kept
        statistics = self._statistics()
        if self._answers is not None:
            from jft import outliers

            finding, looked_at = outliers.find(self.model, self._answers, progress)
            found += [finding] if finding else []
            statistics["outliers"] = looked_at
        return findings.Report(self._read, kept, tuple(accounting.merged(found)), shape, statistics)

    def _statistics(self) -> dict[str, Any]:
        of = "tokens" if self._account is not None else "words"
        # A row of n tokens takes n - 1 positions.
        limit = self._asked.max_length + 1 if self._asked.max_length else 0
        histogram = self._measures[of].bins(limit) if of in self._measures else []
        return {
            **{name: values.describe() for name, values in self._measures.items()},
            "histogram": {"of": of, "bins": histogram},
            "max_length": self._asked.max_length,
            "tokenizer": self._asked.tokenizer or self._asked.model,
        }


def quotes(
    asked: Asked, found: Sequence[findings.Finding]
) -> dict[tuple[str, int], tuple[str, ...]]:
    """The turns of the first row of each finding, in a second look at the files that ends with the last of them.

    Rows that hold secrets or personal data are not quoted.
    """
    private = {place for f in found if f.kind in PRIVATE for place in f.places}
    wanted = {finding.places[0] for finding in found if finding.places} - private
    quoted: dict[tuple[str, int], tuple[str, ...]] = {}
    for source in (*asked.files, *asked.valid) if wanted else ():
        for item in formats.Table(source, asked.reading):
            if (item.path, item.number) in wanted:
                quoted[item.path, item.number] = _quote(item)
                if len(quoted) == len(wanted):
                    return quoted
    return quoted


def _quote(item: examples.Example | examples.Fault) -> tuple[str, ...]:
    if isinstance(item, examples.Fault):
        return (item.message.removeprefix(f"{item.path}:row {item.number}: "),)
    turns = [str(turn.get("content") or "") for turn in item.messages if turn["role"] != "system"]
    return tuple(turns) or (item.text,)


def progress(items: Any, unit: str, total: int | None = None) -> Iterator[Any]:
    """Goes through items with a bar on standard error, where that is a terminal and it takes more than seconds."""
    import tqdm

    quiet = not sys.stderr.isatty()
    return iter(tqdm.tqdm(items, unit=f" {unit}", total=total, delay=2, leave=False, disable=quiet))


def _open(asked: Asked) -> tuple[Any, Any]:
    """The model and the tokenizer, as far as they are asked for."""
    if not (asked.model or asked.tokenizer):
        return None, None
    from jft import models
    from jft.data import load

    if asked.model:
        import jax

        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        model = models.load(asked.model, dtype=dtype, revision=asked.revision or None)
        tokenizer = model.tokenizer
    else:
        model = None
        tokenizer = models.load_tokenizer(asked.tokenizer, asked.revision or None)
    load.use_template(tokenizer, asked.chat_template)
    return model, tokenizer
